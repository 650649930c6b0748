"""What SFT trains on and how: the trained strings, the loss against slow loops, rows and accumulation, learning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP
from trl import SFTTrainer

from llamachat.chat_format import TokenizedExample
from llamachat.chat_format.tokenizer import SPACE, Tokenizer
from llamachat.config.sections import Tuning
from llamachat.data.packing import IGNORED, collate_packed, collate_padded
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.runs.inputs import StepInputs
from llamachat.training.policy import load_start
from llamachat.training.session import Session
from sft import loss as loss_module
from sft.config import Config
from sft.loss import answer_token_losses
from sft.tuning import Tuning as Dialogs
from sft.tuning import answer_loss
from tests.sft.tiny_sft import inputs_of, open_session, pair, toy_dialogs
from tests.tiny_llama import LORA, move_adapter, tiny_llama

CPU = torch.device("cpu")
FULL = Tuning()
QLORA = LORA.model_copy(update={"method": "qlora"})
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "row_tokens": 64},
    "one long row": {"packing": True, "row_tokens": 96},
    "8 x 1": {"packing": False, "rows_per_microbatch": 1},
    "1 x 8": {"packing": False, "rows_per_microbatch": 8},
    "3 of 3, one empty row": {"packing": False, "rows_per_microbatch": 3},
}


# --- what is trained

TALK = [
    {"role": "system", "content": "Be brief."},
    *pair("Hello, who are you?", "  I am a small model.  "),
    *pair("What is the capital of France?", "Paris.", train=False),
    *pair("Thanks!", "You are welcome."),
]
# Written by hand: white space around an answer goes, one space before its EOS comes, a marked answer is left out.
EVERY = ["I am a small model. </s>", "You are welcome. </s>"]


def trained_strings(batch: dict[str, Tensor], tokenizer: Tokenizer) -> list[str]:
    """Each unbroken run of labels as text."""
    strings = []
    for labels in batch["labels"].tolist():
        for is_trained, run in groupby(labels, key=lambda label: label != IGNORED):
            if is_trained:
                strings.append("".join(tokenizer.pieces(list(run))).replace(SPACE, " ").strip())
    return strings


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("train_on", "talk", "trained"),
    [
        ("every_answer", TALK, EVERY),
        ("last_answer", TALK, EVERY[1:]),
        ("last_answer", TALK[:3], EVERY[:1]),
        ("last_answer", TALK[:5], []),  # its last answer is marked: nothing is left to learn
    ],
)
def test_the_trained_strings_are_answers_and_their_eos(
    packing: bool, train_on: Any, talk: Any, trained: list[str], base: Path, tmp_path: Path
):
    others = toy_dialogs(30)
    answers = [[f"{m['content']} </s>" for m in turns if m["role"] == "assistant"] for turns in others]
    expected = [answer for each in answers for answer in (each if train_on == "every_answer" else each[-1:])]
    config = Config(train_on=train_on, packing=packing, epochs=1, examples_per_step=8)
    with open_session(config, inputs_of(tmp_path, base, [*others, talk], max_tokens=128)) as (_, training):
        tokenizer = training.chat_format.tokenizer
        got = trained_strings(collate_packed(training.examples.validation), tokenizer)
        for start in range(0, len(training.plan.rows), training.plan.rows_per_microbatch):
            rows = range(start, start + training.plan.rows_per_microbatch)
            got += trained_strings(training.collate(rows), tokenizer)
        print(*got, sep="\n")
        assert sorted(got) == sorted(expected + trained)
        assert training.examples.dropped == ({} if trained else {"left out: no answer to learn (train: false)": 1})


# --- the loss


def slow_losses(model: nn.Module, example: TokenizedExample) -> list[Tensor]:
    """-log p of each learnt token given the tokens before it, from one dialog alone."""
    logprobs_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(-1)
    learnt = [t for t, is_learnt in enumerate(example.loss_mask) if is_learnt]
    return [-logprobs_TV[t - 1, example.input_ids[t]] for t in learnt]


def some_examples() -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in (9, 4, 17, 6):
        ids = torch.randint(3, 420, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.5).tolist()
        examples.append(TokenizedExample((1, *ids, 2), (False, *mask, True)))
    return examples


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
@pytest.mark.parametrize("chunk", [2048, 3])
def test_losses_of_answer_tokens_equal_a_loop_over_single_dialogs(
    collate: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_module, "tokens_per_chunk", lambda on_cpu: chunk)
    model, examples = tiny_llama(), some_examples()
    with torch.no_grad():
        expected = torch.stack([loss for example in examples for loss in slow_losses(model, example)])
        got = answer_token_losses(model, collate(examples))
        rows = [[example] for example in examples]
        assert answer_loss(model, examples, row_tokens=12, device=CPU) == pytest.approx(
            float(expected.mean()), abs=1e-6
        )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert sum(answer_token_losses(model, collate(row)).numel() for row in rows) == expected.numel()


def test_a_row_without_examples_has_no_loss_and_zero_gradients():
    model = tiny_llama()
    losses = answer_token_losses(model, collate_packed([]))
    losses.sum().backward()
    assert losses.numel() == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_a_bf16_model_gives_fp32_losses():
    assert answer_token_losses(tiny_llama(dtype=torch.bfloat16), collate_packed(some_examples())).dtype == torch.float32


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_our_loss_is_the_one_of_trl(tuning: Tuning, packing: bool, base: Path, tmp_path: Path):
    config = Config(packing=packing, rows_per_microbatch=4, examples_per_step=8)
    with open_session(config, inputs_of(tmp_path, base, toy_dialogs(12), tuning=tuning)) as (session, training):
        move_adapter(training.model)
        trainer: Any = session.trainer(training, tmp_path / "scratch")
        batch = training.collate(range(training.plan.rows_per_microbatch))
        for items in (None, torch.tensor(97)):
            model = training.model
            ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
            theirs = SFTTrainer.compute_loss(trainer, model, dict(batch), num_items_in_batch=items)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


# --- rows, micro-batches and optimizer steps


@dataclass
class Seen(TrainerCallback):
    """Gradients of every optimizer step, and the weights after the last."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def train_and_see(session: Session, training: Dialogs, scratch: Path) -> Seen:
    seen = Seen()
    trainer = session.trainer(training, scratch, on_log=lambda _, f: seen.losses.append(f["sft/loss"]))
    trainer.add_callback(seen)
    trainer.train()
    seen.weights = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    return seen


def slow_step(inputs: StepInputs, examples: Sequence[TokenizedExample]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step, one dialog at a time."""
    model = load_start(inputs).model
    tokens = sum(sum(example.loss_mask) for example in examples)
    total = 0.0
    for example in examples:
        loss = torch.stack(slow_losses(model, example)).sum() / tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_every_layout_of_a_step_gives_the_gradients_of_a_slow_loop(tuning: Tuning, base: Path, tmp_path: Path):
    inputs = inputs_of(tmp_path, base, toy_dialogs(26), tuning=tuning)
    runs: dict[str, Seen] = {}
    first: list[TokenizedExample] = []
    for name, layout in LAYOUTS.items():
        config = Config(epochs=1, examples_per_step=8, learning_rate=1e-4, max_grad_norm=1e9, **layout)
        with open_session(config, inputs) as (session, training):
            if name == "packed":
                assert training.plan.num_steps == 3 and training.plan.microbatches_per_step > 1
                assert () in training.plan.rows  # a step that needs fewer rows than another
                assert any(len(row) > 1 for row in training.plan.rows)
            first = [training.examples.train[index] for row in training.plan.step_rows(0) for index in row]
            runs[name] = train_and_see(session, training, tmp_path / "scratch")
    loss, gradients = slow_step(inputs, first)
    for seen in runs.values():
        assert seen.losses[0] == pytest.approx(loss, abs=1e-5)
        assert seen.gradients[0].keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(seen.gradients[0][key], gradient, atol=1e-6, rtol=1e-5)
        assert seen.losses == pytest.approx(runs["8 x 1"].losses, abs=1e-5)
        for key, weight in runs["8 x 1"].weights.items():
            torch.testing.assert_close(seen.weights[key], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tuning", [FULL, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_recomputed_activations_give_the_same_gradients(
    tuning: Tuning, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward, layers = LlamaMLP.forward, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal layers
        layers += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    dtype = "bfloat16" if tuning.method == "qlora" else "float32"
    inputs = inputs_of(tmp_path, base, toy_dialogs(12), tuning=tuning, dtype=dtype)
    runs, counts = [], []
    for is_on in (False, True):
        config = Config(epochs=1, examples_per_step=16, gradient_checkpointing=is_on)
        with open_session(config, inputs) as (session, training):
            layers = 0
            runs.append(train_and_see(session, training, tmp_path / "scratch"))
            counts.append(layers)
    assert counts[1] == 2 * counts[0] > 0, "each layer runs a second time, in the backward pass"
    assert runs[0].gradients[0].keys() == runs[1].gradients[0].keys()
    for key, gradient in runs[0].gradients[0].items():
        torch.testing.assert_close(runs[1].gradients[0][key], gradient, atol=1e-7, rtol=1e-5)


def test_the_rate_rises_over_the_warm_up_and_falls_as_a_half_cosine(base: Path, tmp_path: Path):
    config = Config(epochs=2, examples_per_step=4, learning_rate=1.0e-3, warmup_fraction=0.25)
    with open_session(config, inputs_of(tmp_path, base, toy_dialogs(20))) as (session, training):
        steps = training.plan.num_steps
        rates: list[float] = []
        on_log = lambda _, figures: rates.append(figures["optim/learning_rate"])  # noqa: E731
        session.trainer(training, tmp_path / "scratch", on_log=on_log).train()
    warmup = round(steps / 4)
    assert 1 < warmup < steps == len(rates)
    rising = [s / warmup for s in range(warmup)]
    falling = [0.5 * (1 + math.cos(math.pi * s / (steps - warmup))) for s in range(steps - warmup)]
    assert rates == pytest.approx([1e-3 * share for share in rising + falling], abs=1e-9)


# --- learning


def test_eight_dialogs_are_learnt_by_heart_and_said_again(base: Path, tmp_path: Path):
    config = Config(epochs=60, examples_per_step=8, learning_rate=1e-2, weight_decay=0)
    inputs = inputs_of(tmp_path, base, toy_dialogs(12))
    with open_session(config, inputs) as (session, training):
        questions = training.examples.train
        assert len(questions) == 8
        assert answer_loss(training.model, questions, row_tokens=96, device=CPU) > 5
        train_and_see(session, training, tmp_path / "scratch")
        assert answer_loss(training.model, questions, row_tokens=96, device=CPU) < 0.1
        chat_format = training.chat_format
        engine = HuggingFaceEngine(training.model, chat_format.stop_ids, chat_format.tokenizer.pad_id)
        greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=40, seed=0)
        for example in questions:
            length = example.loss_mask.index(True)
            answer = example.input_ids[length : example.input_ids.index(2) + 1]
            (group,) = engine.generate([example.input_ids[:length]], samples_per_prompt=1, sampling=greedy)
            assert (tuple(group[0].token_ids), group[0].is_finished) == (answer, True)


@pytest.mark.parametrize("wrong", ["loss on questions alone", "labels one place late"])
def test_a_wrong_mask_or_a_shifted_label_does_not_learn_the_answers(
    wrong: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = Config(epochs=40, examples_per_step=8, learning_rate=1e-2, weight_decay=0, packing=False)
    collate = Dialogs.collate

    def late(self: Dialogs, numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = collate(self, numbers)
        return batch | {"labels": batch["labels"].roll(1, dims=1)}

    with open_session(config, inputs_of(tmp_path, base, toy_dialogs(12))) as (session, training):
        right = training.examples.train
        if wrong == "labels one place late":
            monkeypatch.setattr(Dialogs, "collate", late)
        else:
            flipped = [replace(example, loss_mask=tuple(not m for m in example.loss_mask)) for example in right]
            training = replace(training, examples=replace(training.examples, train=flipped))
        train_and_see(session, training, tmp_path / "scratch")
        assert answer_loss(training.model, right, row_tokens=96, device=CPU) > 1.0
