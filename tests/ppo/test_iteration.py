"""One iteration of PPO on toy roles: what must hold before the first step, and what may not change a loss or a weight."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llamachat.answers.packed import PackedRow, TokenSequence, packed_rows, response_mask, sequence_of
from llamachat.answers.responses import Response, sample
from llamachat.answers.scorer import Scored, Scorer
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Rollout, Scoring, Tuning
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import DeviceMemoryError, DivergedError, RolloutError
from llamachat.models.roles import RoleBank
from llamachat.rollout import open_engine
from llamachat.rollout.engine import Sampling
from llamachat.scoring.combining import combiner
from llamachat.scoring.standardising import Constants, Scale
from ppo.config import Config
from ppo.experience import (
    Experience,
    ModelOutputs,
    check_engine_gap,
    engine_gaps,
    iteration_figures,
    make_experience,
    minibatch_of,
    model_outputs,
    split_minibatches,
)
from ppo.train import whiten_critic
from ppo.update import Updater, make_optimizers
from tests.llamachat.models.tiny_roles import FULL, World
from tests.ppo.tiny_ppo import config_of

LORA = Tuning(method="lora", rank=4, alpha=8)
CPU = torch.device("cpu")
GATE = Scoring()
RLOO = config_of(advantages="rloo", responses_per_prompt=3, responses_per_iteration=12, responses_per_minibatch=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece)


@dataclass(frozen=True)
class Iteration:
    """Everything up to the update."""

    bank: RoleBank
    responses: list[Response]
    outputs: ModelOutputs
    scored: Scored
    experience: Experience


def questions(chat_format: ChatFormat, count: int) -> list[EncodedPrompt]:
    encoded = []
    for number in range(count):
        messages = (Message("user", "What is " + "the cat " * (number % 3) + f"{number:o}?"),)
        encoded.append(
            EncodedPrompt(messages, tuple(chat_format.encode_prompt(messages)), number % 2 == 0, f"q{number}")
        )
    return encoded


def answers(bank: RoleBank, count: int) -> list[Response]:
    """Answers of the policy, every other one ended by hand: a toy policy seldom stops."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=9, seed=1)
    engine = open_engine(bank.policy_model(), bank.chat_format, Rollout())
    sampled = sample(engine, bank.chat_format, questions(bank.chat_format, count), sampling)
    stop = bank.chat_format.stop_ids[0]
    return [
        replace(
            one,
            ids=(*one.ids[: 3 + index % 4], stop),
            logprobs=(*one.logprobs[: 3 + index % 4], 0.0),
            is_finished=True,
        )
        if index % 2
        else one
        for index, one in enumerate(sampled)
    ]


def iteration(
    bank: RoleBank,
    *,
    count: int = 12,
    row_tokens: int = 64,
    scoring: Scoring = GATE,
    config: Config | None = None,
) -> Iteration:
    responses = answers(bank, count)
    sequences = [sequence_of(response) for response in responses]
    minibatches = split_minibatches(sequences, responses_per_minibatch=count // 2, row_tokens=row_tokens, device=CPU)
    rows = [row for minibatch in minibatches for row in minibatch.rows]
    outputs = model_outputs(bank, sequences, rows, temperature=1.0, with_values=bank.has_critic)
    scored = Scorer(bank, combiner(scoring)).score(responses, with_judge=True)
    experience = make_experience(
        responses,
        sequences,
        minibatches,
        outputs,
        scored,
        config=config or config_of(),
        scoring=scoring,
        kl_coef=0.01,
        limit=9,
        start_tokens=9.0,
    )
    return Iteration(bank, responses, outputs, scored, experience)


def updater(bank: RoleBank, config: Config | None = None, *, row_tokens: int = 64) -> Updater:
    config = config or config_of()
    return Updater(bank, make_optimizers(bank, config), config, temperature=1.0, row_tokens=row_tokens, step="ppo")


def gradients(bank: RoleBank, experience: Experience, trainer: Updater | None = None) -> dict[str, Tensor]:
    """Of the first minibatch, by role and place."""
    trainer = trainer or updater(bank)
    trainer.gradients(experience, experience.minibatches[0], trains_policy=True)
    by_name = {}
    for role, weights in bank.trainable().items():
        for place, weight in enumerate(weights):
            if weight.grad is not None:
                by_name[f"{role}.{place}"] = weight.grad.clone()
            weight.grad = None
    return by_name


def disturb_policy(bank: RoleBank) -> None:
    """A policy that has moved away from the reference."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weights in bank.trainable().values():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-4)


def test_a_packed_row_says_where_each_token_is_predicted_and_where_it_belongs() -> None:
    sequences = [TokenSequence((1, 5), (7, 8, 2)), TokenSequence((1,), (9, 2))]
    (row,) = packed_rows(sequences, [0, 1], row_tokens=100, device=CPU)
    # The longer one stands first: 1 5 7 8 2 | 1 9 2 | pads.
    assert row.input_ids_1T[0, :9].tolist() == [1, 5, 7, 8, 2, 1, 9, 2, 0] and row.input_ids_1T.shape == (1, 64)
    assert row.position_ids_1T[0, :10].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert row.places_N.tolist() == [1, 2, 3, 5, 6]
    assert row.tokens_N.tolist() == [7, 8, 2, 9, 2]
    values_BR = torch.zeros(2, 3)
    row.put(values_BR, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert values_BR.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert row.taken(values_BR).tolist() == [[1, 2, 3, 4, 5]]
    assert response_mask(sequences, CPU).tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(("tuning", "policy_tuning"), [(LORA, FULL), (LORA, LORA), (FULL, FULL)])
def test_at_step_0_ratio_is_1_and_kl_is_0(world: World, tuning: Tuning, policy_tuning: Tuning) -> None:
    one = iteration(world.bank(tuning, policy_tuning))
    assert one.outputs.kl_BR.abs().max() < 1e-5
    figures = iteration_figures(one.responses, one.outputs, one.scored, one.experience, kl_coef=0.01)
    assert abs(figures["ppo/kl_to_reference"]) < 1e-4 and abs(figures["ppo/kl_k3"]) < 1e-4
    # In other rows than those that were measured: the first step's ratio is 1 whatever the packing.
    experience = recut(one.experience, row_tokens=16)
    first = updater(one.bank).gradients(experience, experience.minibatches[0], trains_policy=True)
    assert abs(first["ppo/approx_kl"]) < 1e-8 and first["ppo/clip_fraction"] == 0.0
    taken_BR = one.experience.advantages_BR[: len(one.responses) // 2]
    mask_BR = one.experience.response_mask_BR[: len(one.responses) // 2]
    assert first["ppo/policy_loss"] == pytest.approx(-float(taken_BR[mask_BR].mean()), abs=1e-5)


def recut(experience: Experience, *, row_tokens: int) -> Experience:
    """The same minibatches in rows of another length."""
    return replace(
        experience,
        minibatches=tuple(
            minibatch_of(experience.sequences, minibatch.indices, row_tokens=row_tokens, device=CPU)
            for minibatch in experience.minibatches
        ),
    )


def test_advantages_are_whitened_over_the_iteration(world: World) -> None:
    experience = iteration(world.bank(LORA, FULL)).experience
    values = experience.advantages_BR[experience.response_mask_BR].double().numpy()
    assert abs(np.mean(values)) < 1e-5 and np.std(values) == pytest.approx(1.0, abs=1e-3)
    assert not experience.advantages_BR[~experience.response_mask_BR].any()


def test_log_probabilities_are_those_of_each_sequence_by_itself(world: World) -> None:
    bank = world.bank(LORA, FULL)
    disturb_policy(bank)
    one = iteration(bank)
    for index, response in enumerate(one.responses):
        ids = torch.tensor([sequence_of(response).ids])
        with torch.no_grad():
            logits = bank.policy_model()(input_ids=ids).logits[0].float()
        first = len(response.prompt.ids)
        expected = torch.stack(
            [logits[place - 1].log_softmax(-1)[ids[0, place]] for place in range(first, ids.shape[1])]
        )
        torch.testing.assert_close(one.outputs.logprobs_BR[index, : len(response.ids)], expected, atol=1e-5, rtol=1e-5)
    assert one.outputs.kl_BR.abs().max() > 0.01, "the policy had moved"


def test_rewards_are_the_whitened_scores_less_beta_times_kl(world: World) -> None:
    bank = world.bank(LORA, FULL)
    disturb_policy(bank)
    one = iteration(bank)
    combined = []
    for index, response in enumerate(one.responses):
        safety, helpfulness = (
            float(scores_B[index])
            for scores_B in (one.scored.scores.safety_B, one.scored.scores.helpfulness_B)
            if scores_B is not None
        )
        is_gated = response.prompt.is_safety or 1 / (1 + np.exp(-safety)) < 0.15
        combined.append(safety if is_gated else helpfulness)
    finished = np.array([response.is_finished for response in one.responses])
    assert finished.any() and not finished.all()
    whole = np.array(combined)[finished]
    for index, response in enumerate(one.responses):
        shaped = (combined[index] - whole.mean()) / whole.std() if finished[index] else -1.0
        length = len(response.ids)
        gap = (one.outputs.logprobs_BR - one.outputs.ref_logprobs_BR)[index, :length].numpy()
        expected = -0.01 * gap
        expected[-1] += shaped
        rewards = one.experience.rewards_BR[index].numpy()
        np.testing.assert_allclose(rewards[:length], expected, atol=1e-4)
        assert not rewards[length:].any()


def test_the_gaps_to_the_engine_by_hand(world: World) -> None:
    bank = world.bank(LORA, FULL)
    result = iteration(bank, count=2)
    (first, second), own_BR = result.responses, result.outputs.logprobs_BR.tolist()
    responses = [
        replace(first, logprobs=tuple(own + 0.5 for own, _ in zip(own_BR[0], first.ids, strict=False))),
        replace(
            second, logprobs=tuple(own - 3.0 * (place == 1) for place, own in enumerate(own_BR[1][: len(second.ids)]))
        ),
    ]
    figures = engine_gaps(responses, result.outputs)
    tokens = len(first.ids) + len(second.ids)
    assert figures["ppo/engine_gap"] == pytest.approx((0.5 * len(first.ids) + 3.0) / tokens, abs=1e-5)
    assert figures["ppo/engine_gap_max"] == pytest.approx(3.0, abs=1e-5)
    check_engine_gap({"ppo/engine_gap": 0.1, "ppo/engine_gap_max": 7.9}, "ppo")
    for largest in (8.1, float("nan")):
        with pytest.raises(RolloutError, match="ppo: the engine's log-probability of a sampled token"):
            check_engine_gap({"ppo/engine_gap": 0.1, "ppo/engine_gap_max": largest}, "ppo")


def test_the_critic_is_whitened_with_the_constants_of_the_model_that_it_began_as(world: World) -> None:
    scales = Constants(helpfulness=Scale(5.0, 2.0), safety=Scale(-1.0, 4.0), combined=Scale(9.0, 9.0))
    models = {role: world.reward_model(role, LORA, FULL) for role in ("helpfulness", "safety")}
    row = [1, 5, 9, 2]
    batch = {"input_ids": torch.tensor([row])}
    cases: list[tuple[tuple[str, ...], str, float | None, float]] = [
        (("helpfulness", "safety"), "separate", 5.0, 2.0),
        (("safety",), "separate", -1.0, 4.0),
        (("helpfulness", "safety"), "shared", None, 1.0),  # begins with values of 0, where whitened returns centre
        ((), "separate", None, 1.0),
    ]
    for roles, critic, mean, deviation in cases:
        bank = world.bank(LORA, FULL, critic=critic, reward_models={role: models[role] for role in roles})
        expected = 0.0
        if mean is not None:
            role: Any = roles[0]
            expected = (float(bank.scores(role, [row])[0]) - mean) / deviation
        whiten_critic(bank, scales)
        assert float(bank.values(batch, torch.tensor([3])).detach()[0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_no_gradient_hangs_on_the_size_of_a_microbatch(world: World, critic: str) -> None:
    bank = world.bank(LORA, FULL, critic=critic)
    disturb_policy(bank)
    experience = moved(iteration(bank).experience)
    whole = gradients(bank, recut(experience, row_tokens=4096))
    parts = recut(experience, row_tokens=16)
    assert len(parts.minibatches[0].rows) == 6, "a row each"
    assert_same(whole, gradients(bank, parts))


def moved(experience: Experience) -> Experience:
    """As if the policy had stood elsewhere: ratios that are not 1, some of them clipped."""
    generator = torch.Generator().manual_seed(1)
    noise_BR = torch.randn(experience.old_logprobs_BR.shape, generator=generator) * 0.3
    return replace(experience, old_logprobs_BR=experience.old_logprobs_BR + noise_BR)


def test_no_gradient_hangs_on_the_order_of_responses_or_on_padding(world: World) -> None:
    bank = world.bank(LORA, FULL)
    experience = moved(iteration(bank).experience)
    order = [3, 0, 5, 1, 4, 2]
    wide = {
        name: torch.nn.functional.pad(getattr(experience, name)[order], (0, 7), value=float("nan"))
        for name in ("old_logprobs_BR", "old_values_BR", "advantages_BR", "returns_BR")
    }
    sequences = tuple(experience.sequences[index] for index in order)
    (minibatch,) = split_minibatches(sequences, responses_per_minibatch=6, row_tokens=64, device=CPU)
    shuffled = replace(experience, sequences=sequences, minibatches=(minibatch,), **wide)
    assert_same(gradients(bank, experience), gradients(bank, shuffled))


def test_an_update_moves_what_is_trained_and_nothing_else(world: World) -> None:
    bank = world.bank(LORA, LORA)
    one = iteration(bank)
    before = {name: weight.clone() for name, weight in bank.state_dict().items()}
    frozen = bank.frozen_digest()
    figures = updater(bank).update(one.experience, trains_policy=True)
    after = bank.state_dict()
    for role in ("policy.", "critic."):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(role))
    assert bank.frozen_digest() == frozen
    assert {"ppo/policy_loss", "ppo/value_loss", "optim/grad_norm", "optim/critic_grad_norm"} <= figures.keys()


@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_without_a_critic_an_answer_is_compared_with_the_others_to_its_prompt(world: World, tuning: Tuning) -> None:
    bank = world.bank(tuning, FULL, critic="none")
    assert bank.trainable().keys() == {"policy"} and "critic" not in bank.roles
    one = iteration(bank, config=RLOO)
    experience, mask_BR = one.experience, one.outputs.response_mask_BR
    rewards_B = experience.rewards_BR.sum(dim=1)
    for first in range(0, 12, 3):
        for index in range(first, first + 3):
            others = [float(rewards_B[other]) for other in range(first, first + 3) if other != index]
            credit = experience.advantages_BR[index]
            torch.testing.assert_close(
                credit[mask_BR[index]], (rewards_B[index] - sum(others) / 2).expand(int(mask_BR[index].sum()))
            )
            assert not credit[~mask_BR[index]].any()
    before = {name: weight.clone() for name, weight in bank.state_dict().items()}
    figures = updater(bank, RLOO).update(experience, trains_policy=True)
    figures |= iteration_figures(one.responses, one.outputs, one.scored, experience, kl_coef=0.01)
    assert any(not torch.equal(before[name], weight) for name, weight in bank.state_dict().items())
    assert "optim/grad_norm" in figures
    assert not figures.keys() & {"optim/critic_grad_norm", "ppo/value_loss", "ppo/explained_variance"}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_critic_warms_up_alone(world: World, critic: str) -> None:
    bank = world.bank(LORA, FULL, critic=critic)
    one = iteration(bank)
    before = {name: weight.clone() for name, weight in bank.state_dict().items()}
    figures = updater(bank).update(one.experience, trains_policy=False)
    after = bank.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("policy."))
    assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith("critic."))
    assert "ppo/policy_loss" not in figures


def test_policy_and_critic_are_clipped_apart(world: World) -> None:
    """A value error a thousand times larger does not change the policy's step."""
    steps = []
    for scale in (1.0, 1000.0):
        bank = world.bank(LORA, FULL)
        experience = iteration(bank).experience
        assert experience.returns_BR is not None
        updater(bank).update(replace(experience, returns_BR=experience.returns_BR * scale), trains_policy=True)
        steps.append({name: w.clone() for name, w in bank.state_dict().items() if name.startswith("policy.")})
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_the_judge_is_logged_and_decides_nothing(world: World) -> None:
    models = {role: world.reward_model(role, LORA, FULL) for role in ("helpfulness", "safety", "judge")}
    bank, without = world.bank(LORA, FULL, reward_models=models), world.bank(LORA, FULL)
    judged, plain = iteration(bank), iteration(without)
    assert judged.scored.judge_B is not None and plain.scored.judge_B is None
    torch.testing.assert_close(judged.experience.rewards_BR, plain.experience.rewards_BR)


def fails_over(tokens: int, patch: pytest.MonkeyPatch) -> None:
    """Memory for rows of at most `tokens`."""
    row_of = Updater._row

    def row_that_fits(self: Updater, experience: Experience, row: PackedRow, **how: Any) -> dict[str, float]:
        if row.input_ids_1T.shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return row_of(self, experience, row, **how)

    patch.setattr(Updater, "_row", row_that_fits)


def test_rows_that_do_not_fit_are_halved_and_the_step_stays(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bank = world.bank(LORA, FULL)
    experience = recut(iteration(bank).experience, row_tokens=4096)
    expected = gradients(bank, experience)
    fails_over(64, monkeypatch)
    trainer = updater(bank, row_tokens=256)
    assert_same(expected, gradients(bank, experience, trainer))
    assert trainer.row_tokens == 64 and "ppo.tokens_per_microbatch=64" in caplog.text


def test_one_response_that_does_not_fit_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = world.bank(LORA, FULL)
    experience = iteration(bank).experience
    fails_over(8, monkeypatch)
    with pytest.raises(
        DeviceMemoryError, match=r"has too little memory for a single response .* ppo.gradient_checkpointing"
    ):
        updater(bank).gradients(experience, experience.minibatches[0], trains_policy=True)


def test_a_loss_that_is_no_number_takes_no_step(world: World) -> None:
    bank = world.bank(LORA, FULL)
    experience = iteration(bank).experience
    before = {name: weight.clone() for name, weight in bank.state_dict().items()}
    broken = replace(experience, advantages_BR=experience.advantages_BR * float("nan"))
    with pytest.raises(DivergedError, match=r"ppo/policy_loss is nan\. No step was taken.*ppo\.learning_rate"):
        updater(bank).update(broken, trains_policy=True)
    assert all(torch.equal(before[name], weight) for name, weight in bank.state_dict().items())
