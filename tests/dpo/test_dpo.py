"""Direct preference optimisation: its loss by hand and against TRL's, rows, the reference, what it publishes, learning."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpo
from dpo.config import Config
from dpo.loss import dpo_losses
from dpo.pairs import collate
from dpo.tuning import Tuning as Pairs
from dpo.tuning import pair_logprobs
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Split, Tuning
from llamachat.data.pairs import UNSAFE_CHOSEN, PairExample
from llamachat.data.records import Preference
from llamachat.errors import DataError
from llamachat.models.loading import load_policy
from llamachat.models.start_checks import fast_tokenizer
from llamachat.runs.artifacts import Artifact
from llamachat.runs.reader import read_summary
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.training.policy import load_start, publish_policy
from pipelines.planning.estimates import TOKENS_OF_A_PAIR_ON_A_CPU, bytes_per_token, estimate_step
from pipelines.recipe.recipe import load
from tests.dpo.tiny_dpo import dpo_inputs, open_session
from tests.recipes import preference_data, write_pairs, write_recipe
from tests.reward.tiny_reward import data_of, preference, toy_pairs
from tests.tiny_llama import LORA, move_adapter

FULL = Tuning()
QLORA = LORA.model_copy(update={"method": "qlora"})
SHORT = Config(epochs=1, pairs_per_step=8, learning_rate=1e-3, sample_prompts=1)


# --- the loss


@pytest.mark.parametrize(
    # beta (1 - -1) = 1: -log sigmoid(1) = 0.313262, -log sigmoid(-1) = 1.313262. The slope is 0.5 (sigmoid(1) - (1 - epsilon)).
    ("label_smoothing", "loss", "slope"),
    [(0.0, 0.313262, -0.134471), (0.1, 0.9 * 0.313262 + 0.1 * 1.313262, -0.084471)],
)
def test_the_loss_by_hand(label_smoothing: float, loss: float, slope: float):
    policy_B, reference_B = torch.tensor([1.0], requires_grad=True), torch.tensor([-1.0])
    losses_B = dpo_losses(policy_B, reference_B, beta=0.5, label_smoothing=label_smoothing)
    losses_B.sum().backward()
    assert policy_B.grad is not None
    assert (losses_B.item(), policy_B.grad.item()) == (pytest.approx(loss, abs=1e-6), pytest.approx(slope, abs=1e-6))


def move(model: Any) -> None:
    """A policy that is not the one it began as."""
    move_adapter(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))


def step_gradients(training: Pairs, trainer: Any, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step, as the trainer adds them up over its rows."""
    model, plan = training.model, training.plan
    model.zero_grad(set_to_none=True)
    loss = torch.zeros(())
    for number in range(step * plan.rows_per_step, (step + 1) * plan.rows_per_step):
        part = trainer.compute_loss(model, training.collate([number]))
        part.backward()
        loss += part.detach()
    return float(loss), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_gap(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys() and got
    gap = torch.cat([(got[name] - expected[name]).flatten() for name in got]).norm()
    return float(gap / torch.cat([grad.flatten() for grad in expected.values()]).norm())


class TokenizedDpoTrainer(DPOTrainer):
    """TRL's, on token ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def trl_step(
    start: Any, policy: dict[str, Tensor], pairs: list[PairExample], scratch: Path, **loss: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one padded batch by TRL, for a policy of these weights that began as `start`."""
    examples = [
        {
            "prompt_ids": list(pair.chosen[: -pair.chosen_tokens]),
            "chosen_ids": list(pair.chosen[-pair.chosen_tokens :]),
            "rejected_ids": list(pair.rejected[-pair.rejected_tokens :]),
        }
        for pair in pairs
    ]
    model, reference = start(), start()
    if hasattr(reference, "get_base_model"):  # its adapter adds nothing yet
        reference = reference.unload()
    model.load_state_dict(policy)
    trainer = TokenizedDpoTrainer(
        model,
        reference,
        args=DPOConfig(
            output_dir=str(scratch),
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_dropout=False,
            gradient_checkpointing=False,
            **loss,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=fast_tokenizer(start.chat_format, scratch),
    )
    total = trainer.compute_loss(model, DataCollatorForPreference(pad_token_id=0)(examples))
    total.backward()
    return total.item(), gradients(model)


class Start:
    """Models as the step begins with, one at each call."""

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs
        self.chat_format = load_start(inputs).chat_format

    def __call__(self) -> Any:
        return load_start(self._inputs).model


@pytest.mark.parametrize(
    # TRL's sigmoid loss has no label smoothing. Its robust one is (0.9 right - 0.1 wrong) / 0.8: with 1.8 times the
    # sigmoid one less 0.8 of it, 0.9 right + 0.1 wrong is left.
    ("label_smoothing", "trl"),
    [
        (0.0, {"loss_type": ["sigmoid"]}),
        (0.1, {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8], "label_smoothing": 0.1}),
    ],
)
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_loss_and_gradients_of_a_step_are_those_of_trl_on_a_padded_batch(
    tuning: Tuning, label_smoothing: float, trl: dict[str, Any], base: Path, tmp_path: Path
):
    config = Config(pairs_per_step=12, beta=0.3, label_smoothing=label_smoothing, row_tokens=128)
    inputs = dpo_inputs(tmp_path, base, tuning=tuning)
    with open_session(config, inputs) as (session, training):
        move(training.model)
        trainer: Any = session.trainer(training, tmp_path / "scratch")
        loss, got = step_gradients(training, trainer, 0)
        pairs = [training.examples.train[index] for row in training.plan.step_rows(0) for index in row]
        policy = {name: weight.detach().clone() for name, weight in training.model.state_dict().items()}
    assert training.plan.rows_per_step > 2 and len(pairs) == 12
    wanted, expected = trl_step(Start(inputs), policy, pairs, tmp_path / "trl", beta=0.3, **trl)
    assert loss == pytest.approx(wanted, rel=1e-5) and abs(loss - math.log(2)) > 0.01
    assert relative_gap(got, expected) < 1e-4


# --- rows


def test_a_row_by_hand():
    (answers,) = preference_pair(
        chosen=(1, 5, 6, 7, 2), rejected=(1, 5, 6, 8, 9, 2), chosen_tokens=2, rejected_tokens=3
    )
    plain, branching = (collate([answers, answers], branches=branches) for branches in (False, True))
    assert plain["input_ids"][0, :11].tolist() == [1, 5, 6, 7, 2, 1, 5, 6, 8, 9, 2]
    assert plain["states_at"].tolist()[:5] == [2, 3, 7, 8, 9]
    assert branching["input_ids"][0, :8].tolist() == [1, 5, 6, 7, 2, 8, 9, 2]
    assert branching["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0]
    # The first token of the rejected answer is predicted by the last one that both share, in the row of the chosen one.
    assert branching["states_at"].tolist() == [2, 3, 2, 5, 6, 10, 11, 10, 13, 14]
    for batch in (plain, branching):
        assert batch["next_tokens"].tolist() == 2 * [7, 2, 8, 9, 2]
        assert batch["answers"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def preference_pair(**ids: Any) -> list[PairExample]:
    text = Message("assistant", "Nothing of it is read here.")
    record = Preference(prompt=(), chosen=text, rejected=text)
    return [PairExample(**ids, margin=0.0, preference=record, domain="helpfulness", source="x")]


def test_log_probabilities_are_those_of_a_slow_loop_with_and_without_branches(base: Path, tmp_path: Path):
    inputs = dpo_inputs(tmp_path, base)
    with open_session(SHORT, inputs) as (_, training):
        pairs, branching = training.examples.validation, training.held_out_reference_P2
    plain: Any = load_start(inputs).model
    slow = torch.tensor([[answer_logprob(plain, *side) for side in sides(pair)] for pair in pairs])
    assert sum(pair.shared for pair in pairs) > 5 * len(pairs)
    assert torch.allclose(branching, slow, atol=1e-3)
    assert torch.allclose(pair_logprobs(plain, pairs, row_tokens=100), slow, atol=1e-3)


def sides(pair: PairExample) -> list[tuple[tuple[int, ...], int]]:
    return [(pair.chosen, pair.chosen_tokens), (pair.rejected, pair.rejected_tokens)]


@torch.no_grad()
def answer_logprob(model: Any, ids: tuple[int, ...], count: int) -> float:
    logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs_TV[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids)))


def test_shorter_rows_change_neither_loss_nor_gradients(base: Path, tmp_path: Path):
    config = Config(pairs_per_step=12, beta=0.3, row_tokens=2000)
    with open_session(config, dpo_inputs(tmp_path, base)) as (session, training):
        move(training.model)
        trainer: Any = session.trainer(training, tmp_path / "scratch")
        loss, expected = step_gradients(training, trainer, 0)
        shorter = training.smaller()
        while shorter is not None and shorter.plan.rows_per_step < 4:
            shorter = shorter.smaller()
        assert shorter is not None and training.plan.rows_per_step == 1
        again, got = step_gradients(shorter, trainer, 0)
        last = shorter
        while (shorter := last.smaller()) is not None:  # down to one pair a row
            last = shorter
        assert max(len(row) for row in last.plan.rows) == 1
    assert again == pytest.approx(loss, rel=1e-5) and relative_gap(got, expected) < 1e-4


def test_gradient_checkpointing_changes_no_gradient(base: Path, tmp_path: Path):
    gradients = []
    for is_on in (False, True):
        (tmp_path / str(is_on)).mkdir()
        config = Config(pairs_per_step=12, gradient_checkpointing=is_on)
        with open_session(config, dpo_inputs(tmp_path / str(is_on), base, tuning=LORA)) as (session, training):
            move(training.model)
            trainer: Any = session.trainer(training, tmp_path / "scratch")
            if is_on:
                training.model.gradient_checkpointing_enable()
            training.model.train()
            gradients.append(step_gradients(training, trainer, 0)[1])
    assert relative_gap(gradients[1], gradients[0]) < 1e-5


# --- the stage


@pytest.mark.parametrize("tuning", [FULL, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_it_learns_to_prefer_the_chosen_answers(tuning: Tuning, base16: Path, tmp_path: Path):
    config = Config(epochs=6, pairs_per_step=8, learning_rate=3e-3, sample_prompts=2)
    inputs = dpo_inputs(tmp_path, base16, tuning=tuning, dtype="bfloat16", tracking={"eval_every": 8})
    artifact = dpo.run(config, inputs)
    record = list(MetricsRecord(inputs.folder.metrics).read())
    evaluated = [row for row in record if "dpo/eval_loss" in row]
    first, summary = evaluated[0], read_summary(inputs.folder)
    # The policy is its own reference yet.
    assert first["dpo/eval_loss"] == pytest.approx(math.log(2), abs=0.02)
    assert first["dpo/eval_reward_chosen"] == pytest.approx(0, abs=0.05)
    assert summary["dpo/eval_loss"] < 0.3 and summary["dpo/eval_accuracy"] > 0.9
    assert summary["dpo/eval_reward_chosen"] > summary["dpo/eval_reward_rejected"] + 1
    assert summary["dpo/epoch"] == 6 and summary["dpo/loss"] < 0.3
    assert artifact.manifest.details["method"] == tuning.method
    assert len(SamplesRecord(inputs.folder.samples).read()) >= 2
    policy = load_policy(artifact.path, dtype="bfloat16")
    with open_session(config, dpo_inputs(tmp_path, base16, tuning=tuning, dtype="bfloat16")) as (_, training):
        gained = pair_logprobs(policy.model, training.examples.validation, row_tokens=500)
        gained -= training.held_out_reference_P2
    assert float((config.beta * gained).mean(dim=0)[0]) == pytest.approx(summary["dpo/eval_reward_chosen"], abs=0.05)


def test_with_the_answers_exchanged_it_learns_the_reverse(base: Path, tmp_path: Path):
    right = dpo_inputs(tmp_path / "right", base, data=data_of(tmp_path / "right", helpfulness=toy_pairs(40)))
    with open_session(SHORT, right) as (_, training):
        reference_P2, held_out = training.held_out_reference_P2, training.examples.validation
    pairs = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in toy_pairs(40)]
    inputs = dpo_inputs(tmp_path, base, data=data_of(tmp_path, helpfulness=pairs))
    artifact = dpo.run(Config(epochs=4, pairs_per_step=8, learning_rate=3e-3, sample_prompts=0), inputs)
    moved = pair_logprobs(load_policy(artifact.path).model, held_out, row_tokens=500) - reference_P2
    assert bool((moved[:, 0] < moved[:, 1]).float().mean() > 0.9)


def test_an_adapter_that_is_continued_is_compared_with_itself_and_not_with_the_base(base: Path, tmp_path: Path):
    (tmp_path / "first").mkdir()
    first = moved_policy(tmp_path / "first", base)
    inputs = dpo_inputs(tmp_path, base, tuning=LORA, policy=first)
    with open_session(SHORT, inputs) as (_, training):
        pairs, reference_P2 = training.examples.validation, training.held_out_reference_P2
        begun = training.evaluate(0)
    assert begun.loss == pytest.approx(math.log(2), abs=1e-6)
    by_base = pair_logprobs(load_start(dpo_inputs(tmp_path, base)).model, pairs, row_tokens=500)
    by_first = pair_logprobs(load_policy(first.path).model, pairs, row_tokens=500)
    assert torch.allclose(reference_P2, by_first, atol=1e-3) and not torch.allclose(reference_P2, by_base, atol=1)
    assert dpo.run(SHORT, inputs).manifest.inputs["policy"] == str(first.path)


def moved_policy(folder: Path, base: Path) -> Artifact:
    inputs = dpo_inputs(folder, base, tuning=LORA)
    start = load_start(inputs)
    move_adapter(start.model)
    return publish_policy(start, inputs, dropped={}, notes={})


def test_the_reference_of_an_earlier_start_is_read_again_unless_it_is_damaged(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    inputs = dpo_inputs(tmp_path, base)
    with open_session(SHORT, inputs) as (_, training):
        first = training.reference_P2
    path = inputs.folder.checkpoints / "reference.safetensors"
    written = path.stat().st_mtime_ns
    with open_session(SHORT, inputs) as (_, training):
        assert torch.equal(training.reference_P2, first)
    assert path.stat().st_mtime_ns == written and not caplog.records
    path.write_bytes(path.read_bytes()[:-4])
    with open_session(SHORT, inputs) as (_, training):
        assert torch.equal(training.reference_P2, first)
    assert "reference.safetensors: computed again, since the file is damaged" in caplog.text


def test_it_reads_both_kinds_of_pairs_and_counts_what_it_leaves_out(base: Path, tmp_path: Path):
    wrong = preference("Is the moon far?", "the cat", "It is.", chosen_is_safe=False, rejected_is_safe=True)
    same = preference("Is it?", "the cat", "the\u2581cat")  # SentencePiece writes a space so
    data = data_of(
        tmp_path,
        helpfulness=[*toy_pairs(20), *[same] * 2],
        safety=[*toy_pairs(10, "the moon"), wrong],
        split=Split(test=0, validation=0.2, judge=0),
    )
    with open_session(SHORT, dpo_inputs(tmp_path, base, data=data)) as (_, training):
        examples = training.examples
    assert len(examples.train) + len(examples.validation) == 30
    assert {pair.domain for pair in examples.train} == {"helpfulness", "safety"}
    assert examples.dropped == {"left out: both answers have the same tokens": 2, UNSAFE_CHOSEN: 1}


def test_without_pairs_that_fit_the_error_says_so(base: Path, tmp_path: Path):
    long = [preference(f"What is {n:o}? " * 40, "Paris.", "the cat") for n in range(12)]
    inputs = dpo_inputs(tmp_path, base, data=data_of(tmp_path, helpfulness=long))
    named = r"data\.helpfulness and data\.safety: 0 training pairs .*left out: .*longer than 96 tokens.*raise base\.max_tokens"
    with pytest.raises(DataError, match=named):
        dpo.run(SHORT, inputs)


def test_the_plan_counts_its_pairs_and_their_tokens(tmp_path: Path):
    """100 and 100 pairs, of which half train; all files have lines of the same length."""
    data = {
        **preference_data(tmp_path),
        "helpfulness": [{"path": str(write_pairs(tmp_path / "a.jsonl", 100))}],
        "safety": [{"path": str(write_pairs(tmp_path / "b.jsonl", 100))}],
        "split": {"test": 0.125, "validation": 0.125, "judge": 0.25},
    }
    path = write_recipe(tmp_path, data=data, steps=["sft", "dpo"])
    (estimate, twice) = (
        estimate_step(recipe, recipe.step("dpo"))
        for recipe in (load(path, ["dpo.pairs_per_step=2"]), load(path, ["dpo.pairs_per_step=2", "dpo.epochs=2"]))
    )
    assert estimate is not None and twice is not None
    assert (estimate.optimizer_steps, twice.optimizer_steps) == (50, 100)
    assert estimate.seconds < twice.seconds < 2 * estimate.seconds  # the reference is read once
    pieces = json.loads((Path(load(path).base.model) / "config.json").read_text())["vocab_size"]
    tokens = (tmp_path / "a.jsonl").stat().st_size / 100 / bytes_per_token(pieces) * TOKENS_OF_A_PAIR_ON_A_CPU
    assert f"{tokens:.0f} tokens per pair" in estimate.assumed
