"""The SFT stage whole, in process: what it publishes and records, what it starts from, what it refuses."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from llamachat.chat_format import TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.config.sections import Split, Tuning
from llamachat.errors import ConfigError, DataError, DivergedError
from llamachat.runs.artifacts import StepFolder, read_artifact
from llamachat.runs.reader import read_summary
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.training.policy import Start, load_start, publish_policy
from sft import train as train_module
from sft import tuning as tuning_of_sft
from sft.config import CPU_ROW_TOKENS, Config
from tests.sft.tiny_sft import inputs_of, open_session, pair, toy_dialogs
from tests.tiny_llama import LORA, move_adapter

IDS = torch.tensor([[1, 270, 279, 383, 357, 331, 262, 289]])
SHORT = Config(epochs=1, examples_per_step=8, learning_rate=1e-3, sample_prompts=2)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The logits on `IDS` and the weights of each model at the moment it is published."""
    seen: list[Any] = []

    def spy(start: Start, *args: Any, **kwargs: Any) -> Any:
        weights = {name: p.detach().clone() for name, p in start.model.named_parameters()}
        with torch.no_grad():
            own = start.model.eval()(IDS).logits
        plain = plain_logits(start.model)
        assert float((own - plain).norm() / plain.norm()) < (1e-6 if own.dtype == torch.float32 else 1e-2)
        seen.append((plain, weights))
        return publish_policy(start, *args, **kwargs)

    monkeypatch.setattr(train_module, "publish_policy", spy)
    return seen


def plain_logits(model: Any) -> torch.Tensor:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.set_attn_implementation("eager")  # training on a CPU attends by sequence, which rounds differently
    with torch.no_grad():
        return model.eval()(IDS).logits


# --- what it publishes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_result_loads_with_plain_transformers_to_the_logits_of_training(
    dtype: str, base: Path, tmp_path: Path, published: list[Any]
):
    artifact = sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(20), dtype=dtype))
    loaded = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert torch.equal(plain_logits(loaded), published[0][0])
    assert not torch.equal(
        plain_logits(AutoModelForCausalLM.from_pretrained(base, dtype=loaded.dtype)), published[0][0]
    )
    assert loaded.config.use_cache
    assert AutoTokenizer.from_pretrained(artifact.path)("Paris").input_ids[0] == 1
    assert not [path for path in artifact.path.iterdir() if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_lora_only_the_adapter_changes_and_plain_peft_gives_the_logits_of_training(
    dtype: str, base: Path, tmp_path: Path, published: list[Any]
):
    before = {name: weight.clone() for name, weight in load_file(base / "model.safetensors").items()}
    artifact = sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(20), tuning=LORA, dtype=dtype))
    logits, weights = published[0]
    trunk = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, weight in trunk.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(weight, before[plain].to(weight.dtype)), name
    assert len(trunk) == len(before)
    grown = [weight for name, weight in weights.items() if ".lora_B." in name]
    assert len(grown) == 2 * 7 and all(bool(weight.any()) for weight in grown)  # they start from zero
    plain_base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    loaded = PeftModel.from_pretrained(plain_base, str(artifact.path), autocast_adapter_dtype=False)
    assert torch.equal(plain_logits(loaded), logits)
    assert not (artifact.path / "model.safetensors").exists()
    assert artifact.manifest.details["rank"] == 4


def test_the_record_holds_the_loss_on_held_out_answers_and_the_samples(base: Path, tmp_path: Path):
    config = SHORT.model_copy(update={"epochs": 3.0})
    inputs = inputs_of(tmp_path, base, toy_dialogs(30), tracking={"eval_every": 2, "sample_every": 3})
    artifact = sft.run(config, inputs)
    folder = inputs.folder
    record = MetricsRecord(folder.metrics).read()
    losses = [row for row in record if "sft/loss" in row]
    steps = len(losses)
    evals = {row["step"]: row["sft/eval_loss"] for row in record if "sft/eval_loss" in row and row["step"] > 0}
    assert [row["step"] for row in losses] == list(range(1, steps + 1))
    assert list(evals) == [*range(2, steps, 2), steps]
    samples = SamplesRecord(folder.samples).read()
    assert [row["step"] for row in samples[::2]] == [*range(3, steps, 3), steps]
    assert len({row["prompt"] for row in samples}) == 2
    summary = read_summary(folder)
    assert summary["sft/eval_loss"] == evals[steps] < summary["sft/eval_loss_base"] - 0.5
    assert folder.curves.stat().st_size > 10_000
    # A second implementation: the plain model of the artifact, a dialog at a time.
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    chat_format = load_chat_format("llama2", load_tokenizer(artifact.path))
    with open_session(config, inputs) as (_, training):
        held_out = training.examples.validation
        learnt = sum(sum(example.loss_mask) for example in training.examples.train)
    nats, count = 0.0, 0
    for example in held_out:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        for place, is_learnt in enumerate(example.loss_mask):
            if is_learnt:
                nats, count = nats - float(logprobs[place - 1, ids[0, place]]), count + 1
    assert nats / count == pytest.approx(evals[steps], abs=1e-5)
    assert losses[-1]["sft/trained_tokens"] == 3 * learnt
    assert losses[-1]["sft/epoch"] == 3.0
    assert chat_format.name == artifact.manifest.details["chat_format"]


def test_measuring_and_sampling_leave_the_training_as_it_is(base: Path, tmp_path: Path, published: list[Any]):
    tuning = LORA.model_copy(update={"dropout": 0.3})
    for name, every in (("often", 1), ("never", 1000)):
        folder = tmp_path / name
        folder.mkdir()
        tracking = {"eval_every": every, "sample_every": every, "save_every": every}
        sft.run(SHORT, inputs_of(folder, base, toy_dialogs(20), tuning=tuning, tracking=tracking))
    often, never = (weights for _, weights in published)
    assert all(torch.equal(weight, never[name]) for name, weight in often.items())


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_training_that_diverges_stops_with_a_fix_and_publishes_nothing(eval_every: int, base: Path, tmp_path: Path):
    config = SHORT.model_copy(update={"learning_rate": 1e30, "epochs": 3.0, "sample_prompts": 0})
    inputs = inputs_of(tmp_path, base, toy_dialogs(20), tracking={"eval_every": eval_every, "save_every": 1})
    with pytest.raises(DivergedError, match=r"sft: the .*loss .* is (nan|inf), .* sft\.learning_rate"):
        sft.run(config, inputs)
    folder = inputs.folder
    assert not folder.artifact.exists() and not folder.summary.exists()
    losses = [row["sft/loss"] for row in MetricsRecord(folder.metrics).read() if "sft/loss" in row]
    assert all(map(math.isfinite, losses))


def test_the_system_text_of_the_base_goes_before_dialogs_without_one(base: Path, tmp_path: Path):
    own = [{"role": "system", "content": "Be brief."}, *pair("Thanks!", "You are welcome.")]
    inputs = inputs_of(tmp_path, base, [own, *toy_dialogs(10)], system="Always answer.", max_tokens=128)
    with open_session(SHORT, inputs) as (_, training):
        chat_format = training.chat_format
        examples = training.examples
    texts = [chat_format.tokenizer.decode(example.input_ids) for example in (*examples.train, *examples.validation)]
    assert sum("Always answer." in text for text in texts) == 10
    assert sum("Be brief." in text for text in texts) == 1
    assert all(prompt[0] == Message("system", "Always answer.") for prompt in examples.prompts if len(prompt) == 2)


# --- what it starts from


def test_an_adapter_is_continued_in_a_copy(base: Path, tmp_path: Path, published: list[Any]):
    first = sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(20), tuning=LORA))
    bytes_before = (first.path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "second").mkdir()
    second = sft.run(SHORT, inputs_of(tmp_path / "second", base, toy_dialogs(20), tuning=LORA, policy=first))
    assert (first.path / "adapter_model.safetensors").read_bytes() == bytes_before
    assert second.manifest.details["base"] == str(base)
    assert second.manifest.inputs == {"policy": str(first.path)}
    (_, one), (_, two) = published
    assert one.keys() == two.keys()  # one adapter, not one on another
    metrics = MetricsRecord(tmp_path / "second" / "runs" / "one" / "sft" / "metrics.jsonl").read()
    start = next(row["sft/eval_loss_base"] for row in metrics if "sft/eval_loss_base" in row)
    assert start == pytest.approx(read_summary(StepFolder(first.path.parent))["sft/eval_loss"], abs=1e-6)


def test_lora_on_a_full_policy_takes_that_policy_for_its_trunk(base: Path, tmp_path: Path, published: list[Any]):
    first = sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(20)))
    (tmp_path / "second").mkdir()
    second = sft.run(SHORT, inputs_of(tmp_path / "second", base, toy_dialogs(20), tuning=LORA, policy=first))
    assert second.manifest.details["base"] == str(first.path)
    trunk = AutoModelForCausalLM.from_pretrained(first.path)
    assert torch.equal(plain_logits(PeftModel.from_pretrained(trunk, str(second.path))), published[1][0])


@pytest.mark.parametrize(
    ("tuning", "named"),
    [
        (Tuning(), "tuning.method: 'full'"),
        (LORA.model_copy(update={"rank": 8}), "tuning.rank: 8"),
        (LORA.model_copy(update={"alpha": 16.0}), "tuning.alpha: 16"),
        (LORA.model_copy(update={"targets": ("q_proj",)}), "tuning.targets: q_proj"),
    ],
)
def test_an_adapter_is_not_continued_under_another_tuning(tuning: Tuning, named: str, base: Path, tmp_path: Path):
    inputs = inputs_of(tmp_path, base, toy_dialogs(12), tuning=LORA)
    start = load_start(inputs)
    move_adapter(start.model)
    artifact = publish_policy(start, inputs, dropped={}, notes={})
    (tmp_path / "second").mkdir()
    with pytest.raises(ConfigError, match=named) as refused:
        sft.run(SHORT, inputs_of(tmp_path / "second", base, toy_dialogs(12), tuning=tuning, policy=artifact))
    assert str(artifact.path) in str(refused.value)


# --- what it refuses, and what it leaves out


def test_training_in_fp16_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"base\.dtype: float16\. .* loss scaling.* bfloat16, or to float32"):
        sft.run(Config(sample_prompts=0), inputs_of(tmp_path, base, toy_dialogs(8), dtype="float16"))


def test_on_a_gpu_held_out_answers_are_evaluated_in_rows_as_long_as_those_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []

    def loss(model: Any, examples: Any, *, row_tokens: int, device: Any) -> float:
        lengths.append(row_tokens)
        return 1.0

    monkeypatch.setattr(tuning_of_sft, "answer_loss", loss)
    for device in ("cpu", "meta"):  # which is no CPU
        model = torch.nn.Linear(1, 1, device=device)
        for row_tokens in ("auto", 512):
            config = Config(row_tokens=row_tokens)
            inputs: Any = SimpleNamespace(base=SimpleNamespace(max_tokens=2048))
            parts: Any = {"chat_format": None, "plan": None, "examples": SimpleNamespace(validation=[])}
            tuning_of_sft.Tuning(config=config, inputs=inputs, model=model, **parts).evaluate(1)
    assert lengths == [CPU_ROW_TOKENS, CPU_ROW_TOKENS, 2048, 512]


@pytest.mark.parametrize("split", [Split(test=0, validation=0, judge=0), Split(test=0.5, validation=0.49, judge=0)])
def test_an_empty_side_of_the_split_is_reported(split: Split, base: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.sft: \d+ training dialogs? and \d+ validation dialogs?"):
        sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(4), split=split))


def test_where_no_dialog_fits_the_error_says_so(base: Path, tmp_path: Path):
    inputs = inputs_of(tmp_path, base, [pair("What is Paris? " * 30 + str(n), "Paris.") for n in range(20)])
    with pytest.raises(DataError, match=r"20 x left out: .*longer than \d+ tokens.*raise base.max_tokens"):
        sft.run(SHORT, inputs)


def test_dialogs_that_do_not_fit_are_shortened_or_left_out_and_counted(base: Path, tmp_path: Path):
    long_turn = pair("What is Paris? " * 30, "Paris.")
    long_talk = [message for n in range(1, 9) for message in pair(f"And what is {n} and {n}?", "I like the weather.")]
    inputs = inputs_of(tmp_path, base, [*toy_dialogs(20), long_turn, long_talk])
    artifact = sft.run(SHORT, inputs)
    held_out_or_not = read_artifact(inputs.folder.path).manifest.dropped_records
    assert held_out_or_not == artifact.manifest.dropped_records
    assert held_out_or_not == {
        "left out: the last turn pair alone is longer than 96 tokens": 1,
        "shortened: oldest turns dropped to fit 96 tokens": 1,
    }


def test_a_held_out_question_that_fills_the_model_is_not_sampled(base: Path, tmp_path: Path):
    # Longer than the model's 128 positions; every dialog but the toys is held out.
    talks = [pair(f"What is {word}? " * 40, "Paris.") for word in ("Paris", "France", "a cat", "a mat", "that", "it")]
    inputs = inputs_of(tmp_path, base, [*talks, *toy_dialogs(20)], split=Split(test=0, validation=0.6, judge=0))
    config = SHORT.model_copy(update={"sample_prompts": 8})
    with open_session(config, inputs) as (_, training):
        encode = training.chat_format.encode_prompt
        assert training.examples.prompts
        assert all(len(encode(prompt)) < 96 for prompt in training.examples.prompts)
        assert TrainOn(config.train_on) is TrainOn.EVERY_ANSWER
    sft.run(config, inputs)
