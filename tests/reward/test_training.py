"""The reward stage against TRL, against itself in other layouts, and from toy pairs to an artifact that tells them apart."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

import reward
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Split, Tuning
from llamachat.data.pairs import PairExample
from llamachat.errors import DivergedError
from llamachat.models import sequence_attention
from llamachat.models.loading import trunk_digest
from llamachat.models.reward_model import load_reward_model, reward_trunk_digest
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.runs.record import MetricsRecord
from llamachat.training.session import check_finite
from reward import train as train_module
from reward.batches import Batches, plan_batches, smaller
from reward.config import Config, Contrast
from reward.presentation import markdown
from reward.ranking import Ranking
from tests.reward.tiny_reward import data_of, open_session, reward_inputs, toy_labels, toy_pairs
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import LORA, move_adapter

FULL = Tuning()


def move_head(model: Any) -> None:
    """Scores that differ: the head starts at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "score" in name and weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def step_gradients(ranking: Ranking, trainer: Any, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step, as the trainer adds them up over its rows."""
    model, plan = ranking.model, ranking.batches.plan
    model.zero_grad(set_to_none=True)
    loss = torch.zeros(())
    for number in range(step * plan.rows_per_step, (step + 1) * plan.rows_per_step):
        part = trainer.compute_loss(model, ranking.batches.collate([number]))
        part.backward()
        loss += part.detach()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pairs_of_step(batches: Batches, step: int) -> list[PairExample]:
    groups = [index for row in batches.plan.step_rows(step) for index in row if index < len(batches.groups)]
    return [batches.pairs[place] for index in groups for place in batches.groups[index]]


def relative_gap(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys() and got
    gap = torch.cat([(got[name] - expected[name]).flatten() for name in got]).norm()
    return float(gap / torch.cat([grad.flatten() for grad in expected.values()]).norm())


@pytest.mark.parametrize("centring", [None, 0.01])
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_trl_on_padded_batches(
    tuning: Tuning, centring: float | None, base: Path, tmp_path: Path
):
    config = Config(pairs_per_step=12, margin="large", center_rewards_coefficient=centring, row_tokens=64)
    with open_session(config, reward_inputs(tmp_path, base, tuning=tuning)) as (session, ranking):
        model = ranking.model
        move_adapter(model)
        move_head(model)
        trainer: Any = session.trainer(ranking, tmp_path / "scratch")
        loss, got = step_gradients(ranking, trainer, 0)
        pairs = pairs_of_step(ranking.batches, 0)
        assert len(pairs) == 12 and {pair.margin for pair in pairs} > {0.0, 3.0}
        batch = DataCollatorForPreference(pad_token_id=0)(
            [
                {"chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected), "margin": pair.margin}
                for pair in pairs
            ]
        )
        model.zero_grad(set_to_none=True)
        theirs: Any = RewardTrainer.compute_loss(
            trainer, model, batch
        )  # a loss, and a pair where outputs are asked for
        theirs.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    assert relative_gap(got, expected) < 1e-4


def test_rows_and_accumulation_change_neither_loss_nor_gradients(base: Path, tmp_path: Path):
    inputs = reward_inputs(tmp_path, base, which="safety", data=labelled(tmp_path))
    config = Config(pairs_per_step=10, margin="small", safety_auxiliary_weight=0.7, row_tokens=1000)
    with open_session(config, inputs) as (session, ranking):
        move_head(ranking.model)
        trainer = session.trainer(ranking, tmp_path / "scratch")
        loss, got = step_gradients(ranking, trainer, 0)
        few = ranking.batches.plan.rows_per_step
        in_parts = replace(ranking, batches=smaller(ranking.batches, 64))
        assert in_parts.batches.plan.rows_per_step > 2 * few
        again, other = step_gradients(in_parts, trainer, 0)
        assert ranking.batches.counts == in_parts.batches.counts
    assert again == pytest.approx(loss, rel=1e-5)
    assert relative_gap(got, other) < 1e-5


def test_a_step_is_worth_what_its_pairs_and_labels_are_by_hand(base: Path, tmp_path: Path):
    """Scores are all 0 at the start: log(1 + e^margin) a pair and log 2 a label, each mean with its weight."""
    inputs = reward_inputs(tmp_path, base, which="safety", data=labelled(tmp_path))
    config = Config(pairs_per_step=10, margin="small", safety_auxiliary_weight=0.7, row_tokens=64)
    with open_session(config, inputs) as (session, ranking):
        loss, _ = step_gradients(ranking, session.trainer(ranking, tmp_path / "scratch"), 0)
        margins = [pair.margin for pair in pairs_of_step(ranking.batches, 0)]
    mean = sum(math.log(1 + math.exp(margin)) for margin in margins) / 10
    assert len(margins) == 10 and loss == pytest.approx(mean + 0.7 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_language_loss_is_that_of_the_language_model_on_chosen_answers(tuning: Tuning, base: Path, tmp_path: Path):
    """At the start, against transformers: mean loss over the answers' tokens, and its gradients under a head that is frozen."""
    config = Config(pairs_per_step=10, margin="none", language_weight=0.5, row_tokens=64)
    with open_session(config, reward_inputs(tmp_path, base, tuning=tuning)) as (session, ranking):
        trainer = session.trainer(ranking, tmp_path / "scratch")
        loss, got = step_gradients(ranking, trainer, 0)
        pairs = pairs_of_step(ranking.batches, 0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total, tokens = torch.zeros(()), 0
    for pair in pairs:
        count = pair.chosen_tokens
        labels = [*[-100] * (len(pair.chosen) - count), *pair.chosen[-count:]]
        one = model(input_ids=torch.tensor([pair.chosen]), labels=torch.tensor([labels]))
        total, tokens = total + one.loss * count, tokens + count
    (0.5 * total / tokens).backward()
    assert loss == pytest.approx(math.log(2) + 0.5 * float(total) / tokens, rel=1e-5)
    if tuning is FULL:  # the head starts at zero: the ranking loss moves no weight of the trunk yet
        expected = {f"model.{n}": p.grad for n, p in model.model.named_parameters() if p.grad is not None}
        assert relative_gap({name: grad for name, grad in got.items() if name in expected}, expected) < 1e-4
    assert not any("lm_head" in name for name in got)


def labelled(folder: Path) -> Any:
    return data_of(
        folder,
        helpfulness=toy_pairs(20),
        safety=toy_pairs(40, "the moon", chosen_is_safe=True, rejected_is_safe=False),
        labels=toy_labels(40),
    )


@pytest.mark.parametrize("trains_together", [False, True])
@pytest.mark.parametrize(("dtype", "rounded_bytes"), [("float32", 2), ("float32", 4), ("bfloat16", 2)])
def test_attention_by_sequence_is_eager_attention(
    dtype: str,
    rounded_bytes: int,
    trains_together: bool,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sequence_attention, "ROUNDED_BYTES", rounded_bytes)  # numbers are rounded up in fp32, too
    inputs = reward_inputs(tmp_path, base, dtype=dtype, attention="eager")
    with open_session(Config(pairs_per_step=12, row_tokens=300), inputs) as (session, ranking):
        move_head(ranking.model)
        trainer = session.trainer(ranking, tmp_path / "scratch")
        loss, expected = step_gradients(ranking, trainer, 0)
        use_sequence_attention(ranking.model.train(), trains_together=trains_together)
        again, got = step_gradients(ranking, trainer, 0)
        branching = replace(ranking, batches=replace(ranking.batches, branches=True))
        shared, gradient = step_gradients(branching, trainer, 0)
        assert sum(p.shared for p in ranking.examples.train) > len(ranking.examples.train)
        for layer in ranking.model.model.layers:
            layer.self_attn.attention_dropout = 1e-9  # eager attention with a mask made of the pieces
        masked, _ = step_gradients(branching, trainer, 0)
        padded = torch.tensor([[1, 5, 6, 0], [1, 7, 8, 9]])
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        model: Any = ranking.model.eval()
        ours = model(input_ids=padded, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        theirs = model(input_ids=padded, attention_mask=mask).logits
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    assert again == pytest.approx(loss, abs=tolerance)
    assert masked == pytest.approx(loss, abs=tolerance)
    assert relative_gap(got, expected) < (1e-5 if dtype == "float32" else 2e-2)
    # A prompt that both answers share is computed once, in products of other shapes.
    assert shared == pytest.approx(loss, abs=tolerance)
    assert relative_gap(gradient, expected) < (1e-5 if dtype == "float32" else 2e-2)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("branches", "trains_together"), [(False, False), (True, False), (True, True)])
def test_comparisons_in_one_dialog_stay_together_and_weigh_what_they_do_alone(
    branches: bool, trains_together: bool, base: Path, tmp_path: Path
):
    """Loss and gradients against every comparison in a row of its own, computed whole."""
    inputs = reward_inputs(tmp_path, base, attention="eager")
    with open_session(Config(pairs_per_step=12, row_tokens=300), inputs) as (session, ranking):
        move_head(ranking.model)
        trainer = session.trainer(ranking, tmp_path / "scratch")
        one, two, three, *_ = ranking.examples.train
        # Two answers of one dialog, each with three alternatives. The second's shares the tokens up to where the
        # first's alternative ends: their positions continue without a jump, and they are apart all the same.
        whole = one.chosen + one.chosen[1:] + two.chosen[1:]
        cut = len(one.chosen) + len(two.chosen) // 2
        short, half = (*one.chosen[: cut - 2], 7, 8), (*whole[:cut], 9)
        several = [
            replace(one, chosen=chosen, rejected=rejected, margin=0.1 * number)
            for number, (chosen, rejected) in enumerate(
                [
                    *[(one.chosen, two.rejected), (one.chosen, three.rejected), (one.chosen, (*short, 7, 8)[:cut])],
                    *[(whole, half), (whole, two.rejected), (whole, (*whole, 5, 6))],
                    *[(two.chosen, one.rejected), (two.chosen, three.rejected)],
                ]
            )
        ]
        use_sequence_attention(ranking.model.train(), trains_together=trains_together)
        options: Any = {"epochs": 1, "seed": 0, "has_pair_labels": False, "branches": branches}
        batches = plan_batches(several, [], pairs_per_step=8, row_tokens=1000, **options)
        loss, got = step_gradients(replace(ranking, batches=batches), trainer, 0)
        parts = []
        for pair in several:
            alone = plan_batches([pair], [], pairs_per_step=1, row_tokens=1000, **(options | {"branches": False}))
            parts.append(step_gradients(replace(ranking, batches=alone), trainer, 0))
        divided = smaller(batches, len(whole) + 40)
        again, other = step_gradients(replace(ranking, batches=divided), trainer, 0)
        steps = plan_batches(several, [], pairs_per_step=2, row_tokens=1000, **options).counts
        language = plan_batches(several, [], pairs_per_step=8, row_tokens=1000, **options, learns_language=True)
        smallest = smaller(language, 1)  # each pair stands alone
    assert sorted(map(len, batches.groups)) == [2, 6] and len(divided.groups) > 2
    assert sorted(count for count, _, _ in steps) == [2, 6]  # whole groups
    assert len(smallest.groups) == 8 and language.counts == smallest.counts  # three chosen answers, each learnt once
    assert language.counts == ((8, 0, 3 * one.chosen_tokens),)  # each pair was made of `one`
    assert loss == pytest.approx(sum(part for part, _ in parts) / 8, rel=1e-5) == again
    mean = {name: torch.stack([gradient[name] for _, gradient in parts]).sum(dim=0) / 8 for name in got}
    assert relative_gap(got, mean) < 1e-5 and relative_gap(other, mean) < 1e-5
    everything = sum(pair.tokens for pair in several)
    assert (sum(batches.plan.tokens_per_step) < everything / 2) == branches


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_it_learns_toy_pairs_and_publishes_what_it_learnt(
    method: str, tiny_sentencepiece: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_base(tmp_path / "base", tiny_sentencepiece, dtype=torch.bfloat16)
    before = trunk_digest(folder)
    tuning = FULL if method == "full" else LORA.model_copy(update={"method": method})
    inputs = reward_inputs(tmp_path, folder, tuning=tuning, dtype="bfloat16")
    digests: list[str] = []
    build = train_module.build_reward_model

    def built(*args: Any, **kwargs: Any) -> Any:
        start = build(*args, **kwargs)
        digests.append(reward_trunk_digest(start.model))
        return start

    monkeypatch.setattr(train_module, "build_reward_model", built)
    rate = 3e-3 if method == "full" else 3e-2
    artifact = reward.run(Config(epochs=4, pairs_per_step=8, learning_rate=rate, other_share=0.3), inputs)
    summary = json.loads(inputs.folder.summary.read_text())
    rows = list(MetricsRecord(inputs.folder.metrics).read())
    assert rows[0]["rm/helpfulness/eval_loss"] == pytest.approx(math.log(2))
    assert rows[0]["rm/helpfulness/eval_accuracy"] == 0.5
    assert summary["rm/helpfulness/eval_loss"] < 0.2 and summary["rm/helpfulness/eval_accuracy"] == 1.0
    assert summary["rm/helpfulness/test/helpfulness/accuracy"] == 1.0
    assert artifact.manifest.kind == "reward_model" and artifact.manifest.details["which"] == "helpfulness"
    assert trunk_digest(folder) == before
    loaded = load_reward_model(artifact.path)
    question = Message("user", "What is the capital 7?")
    good, bad = loaded.score(
        [[question, Message("assistant", text)] for text in ("It is the capital.", "the cat and the cat 7")]
    )
    assert good > bad + 1
    if method != "full":
        assert reward_trunk_digest(loaded.model) == digests[0]
    for name in ("artifact", "checkpoints"):
        for file in (inputs.folder.path / name).rglob("*config.json"):
            assert "per_sequence" not in file.read_text()


def test_safety_labels_are_learnt_with_a_weight_and_not_without(base: Path, tmp_path: Path):
    results = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / f"{weight}"
        inputs = reward_inputs(
            folder,
            base,
            which="safety",
            data=data_of(folder / "data", safety=toy_pairs(40, "the moon"), labels=toy_labels(60)),
        )
        config = Config(epochs=4, pairs_per_step=8, learning_rate=3e-3, safety_auxiliary_weight=weight)
        reward.run(config, inputs)
        results[weight] = json.loads(inputs.folder.summary.read_text())
    assert results[1.0]["rm/safety/auroc"] == 1.0 and results[1.0]["rm/safety/balanced_accuracy"] == 1.0
    assert results[0.0]["rm/safety/auroc"] < 1.0


def test_figures_of_a_line_are_means_over_its_pairs(base: Path, tmp_path: Path):
    inputs = reward_inputs(tmp_path, base, tracking={"log_every": 2})
    reward.run(Config(pairs_per_step=5, other_share=0), inputs)
    rows = [row for row in MetricsRecord(inputs.folder.metrics).read() if "rm/helpfulness/loss" in row]
    assert len(rows) >= 2
    for row in rows:
        assert 0 <= row["rm/helpfulness/accuracy"] <= 1
        # Without labels and centring the loss is its ranking part: a step's mean, then the mean of two whole steps.
        assert row["rm/helpfulness/loss"] == pytest.approx(row["rm/helpfulness/ranking_loss"], abs=2e-3)
        assert row.get("rm/helpfulness/auxiliary_loss") is None


def test_the_rate_rises_for_five_steps_and_ends_at_a_tenth(base: Path, tmp_path: Path):
    inputs = reward_inputs(tmp_path, base)
    reward.run(Config(epochs=4, pairs_per_step=4, learning_rate=1e-3), inputs)
    rows = [row for row in MetricsRecord(inputs.folder.metrics).read() if "rm/helpfulness/loss" in row]
    rates = [row["optim/learning_rate"] for row in rows]
    assert rates[:5] == pytest.approx([0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 1e-3]) or rates[:6] == pytest.approx(
        [0, 0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 1e-3]
    )
    assert max(rates) == pytest.approx(1e-3) and 1e-4 <= rates[-1] < 1.2e-4


def test_without_test_pairs_it_says_so_and_publishes(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = data_of(tmp_path, helpfulness=toy_pairs(20), split=Split(test=0, validation=0.2, judge=0))
    artifact = reward.run(Config(pairs_per_step=8, other_share=0), reward_inputs(tmp_path, base, data=data))
    assert artifact.path.exists() and "no test pairs" in caplog.text


def test_an_untrained_model_fails_the_probe_and_says_so(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    texts = [(f"Question {n:o} of it?", f"yes the cat {n:o}") for n in range(60)]
    dialogs = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in texts]
    data = data_of(tmp_path / "data", helpfulness=toy_pairs(40), safety=toy_pairs(20, "the moon"), sft=dialogs)
    inputs = reward_inputs(
        tmp_path,
        base,
        which="judge",
        data=data.model_copy(update={"split": Split(test=0.3, validation=0.1, judge=0.4)}),
    )
    artifact = reward.run(Config(pairs_per_step=8, learning_rate=1e-7, contrast=Contrast(share=0.5)), inputs)
    figures = json.loads(inputs.folder.summary.read_text())
    assert figures["rm/judge/probe/is_fit"] == 0 and not artifact.manifest.details["probe"]["is_fit"]
    assert "rm/judge/probe/harmful/refusal_sorry" in figures
    for name in ("harmless/swapped", "harmless/unsure"):
        place = f"rm/judge/probe/{name}"
        assert figures[f"{place}_low"] <= figures[place] <= figures[f"{place}_high"]
    assert figures["rm/judge/eval_contrast_accuracy"] <= 1
    assert "NOT fit" in artifact.manifest.details["probe"]["verdict"] and "NOT fit" in caplog.text
    assert (inputs.folder.figures / "probe.png").stat().st_size > 0
    table = markdown({"judge": figures}, {"judge": artifact.manifest.details["probe"]["verdict"]})
    assert "I am not sure about that." in table and "NOT fit" in table


def test_a_loss_that_is_no_number_is_refused_in_words():
    with pytest.raises(DivergedError, match=r"at step 3 is nan.*reward\.learning_rate"):
        check_finite(float("nan"), "rm/safety: the training loss at step 3", section="reward")
    with pytest.raises(
        DivergedError, match=r"at step 0 is nan, before the first training step.*Download the model again"
    ):
        check_finite(float("nan"), "rm/safety: the loss at step 0", section="reward", is_start=True)


def test_a_sequence_attends_alike_whole_token_by_token_with_a_cache_and_padded(base: Path):
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    use_sequence_attention(model)
    ids = torch.tensor([[1, 5, 9, 17, 33, 8]])
    with torch.no_grad():
        expected = whole(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        cache, stepwise = None, []
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            stepwise.append(output.logits)
        torch.testing.assert_close(torch.cat(stepwise, dim=1), expected, rtol=0, atol=1e-5)
        padded = torch.tensor([[0, 0, 1, 5, 9, 17, 33, 8]])
        logits = model(
            padded, attention_mask=(padded != 0).long(), position_ids=torch.tensor([[0, 0, *range(6)]])
        ).logits
        torch.testing.assert_close(logits[:, 2:], expected, rtol=0, atol=1e-5)
