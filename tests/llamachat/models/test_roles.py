"""A bank of roles at work: the oracles are the same artifacts loaded alone, plain autograd, and the weights."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llamachat.config.sections import Tuning
from llamachat.models.loading import load_policy
from llamachat.models.reward_model import load_reward_model
from llamachat.models.roles import RoleBank
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.training.master_weights import adamw
from tests.llamachat.models.tiny_roles import EXACT, FULL, ROWS, World
from tests.tiny_llama import LORA

PACKED = {
    "input_ids": torch.tensor([[token for row in ROWS for token in row]]),
    "position_ids": torch.tensor([[place for row in ROWS for place in range(len(row))]]),
}
ENDS = torch.tensor([4, 7, 15])


def logits(bank: RoleBank, role: Any, batch: dict[str, Tensor] = PACKED) -> Tensor:
    with torch.no_grad():
        return bank.lm_head(role)(bank.hidden(role, batch))


def alone(model: nn.Module) -> Tensor:
    """The logits of each row by itself."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS], dim=1)


def spread(bank: RoleBank, seed: int = 9) -> None:
    """Trained weights as they are after some steps, head and all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in bank.trainable().values():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.02)


def loss_of(bank: RoleBank) -> Tensor:
    """Of policy and critic, as an update has it; the critic runs between the policy's pass and its backward."""
    policy = bank.lm_head("policy")(bank.hidden("policy", PACKED)).float().logsumexp(-1).mean()
    values = bank.values(PACKED, ENDS)
    bank.scores("safety", ROWS)
    return policy + values.square().mean()


def gradients(bank: RoleBank, loss: Callable[[RoleBank], Tensor] = loss_of) -> dict[str, list[Tensor | None]]:
    trained = bank.trainable()
    for weights in trained.values():
        for weight in weights:
            weight.grad = None
    loss(bank).backward()
    return {role: [weight.grad for weight in weights] for role, weights in trained.items()}


def same(one: dict[str, list[Tensor | None]], other: dict[str, list[Tensor | None]]) -> bool:
    pairs = [(a, b) for role in one for a, b in zip(one[role], other[role], strict=True)]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


METHODS = pytest.mark.parametrize(("tuning", "policy"), [(LORA, FULL), (LORA, LORA), (FULL, FULL)])


# --- every role is what it is alone


@METHODS
def test_policy_reference_and_critic_begin_as_the_models_loaded_alone(tuning: Tuning, policy: Tuning, world: World):
    bank = world.bank(tuning, policy)
    wanted = alone(load_policy(world.policy(policy).path).model)
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits(bank, "policy"), wanted, **EXACT)
    assert torch.equal(logits(bank, "policy"), logits(bank, "reference"))
    scores = bank.scores("helpfulness", ROWS)
    torch.testing.assert_close(bank.values(PACKED, ENDS).detach(), scores, **EXACT)
    bank.scale_critic(mean=0.5, std=4.0)
    torch.testing.assert_close(bank.values(PACKED, ENDS).detach(), (scores - 0.5) / 4.0, **EXACT)


@METHODS
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_scores_are_those_of_the_reward_models_loaded_alone(tuning: Tuning, policy: Tuning, critic: str, world: World):
    bank = world.bank(tuning, policy, critic=critic)
    spread(bank)
    for role in ("helpfulness", "safety"):
        model = load_reward_model(world.reward_model(role, tuning, policy).path)
        wanted = torch.cat([model.score_ids([row]) for row in ROWS])
        assert wanted.abs().min() > 1e-3
        torch.testing.assert_close(bank.scores(role, ROWS), wanted, **EXACT)
        torch.testing.assert_close(bank.scores(role, ROWS, row_tokens=1), wanted, **EXACT)


def test_a_full_policy_has_a_critic_from_an_adapter_merged_into_weights_of_its_own(world: World):
    models = {"helpfulness": world.reward_model("helpfulness", LORA, FULL)}
    bank = world.bank(FULL, FULL, reward_models=models)
    torch.testing.assert_close(bank.values(PACKED, ENDS).detach(), bank.scores("helpfulness", ROWS), **EXACT)
    assert len(bank.trainable()["critic"]) == 2 * 9 + 2 + 2


def test_a_shared_critic_reads_the_states_of_the_policy(world: World):
    bank = world.bank(LORA, LORA, critic="shared")
    spread(bank)
    hidden = bank.hidden("policy", PACKED)
    assert torch.equal(bank.hidden("critic", PACKED), hidden)
    weight, bias = bank.trainable()["critic"]
    wanted = (hidden[0, ENDS] * weight[0]).sum(dim=1) + bias
    torch.testing.assert_close(bank.values(PACKED, ENDS), wanted, **EXACT)
    torch.testing.assert_close(bank.values_of(hidden[0, ENDS]), wanted, **EXACT)


def test_padded_rows_and_chosen_positions_give_the_states_of_packed_rows(world: World):
    bank = world.bank(LORA, LORA)
    longest = max(map(len, ROWS))
    padded = {"input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in ROWS])}
    for role in bank.roles:
        packed, states = bank.hidden(role, PACKED)[0], bank.hidden(role, padded)
        taken = torch.cat([states[index, : len(row)] for index, row in enumerate(ROWS)])
        torch.testing.assert_close(taken, packed, **EXACT)
        torch.testing.assert_close(bank.states(role, PACKED, ENDS), packed[ENDS], **EXACT)


# --- switching


def storm(bank: RoleBank, seed: int) -> None:
    """All ways to run a role, in any order, some failing half-way, some where nothing is recorded."""
    random = Random(seed)
    for _ in range(60):
        role = random.choice(bank.roles)
        with torch.set_grad_enabled(random.random() < 0.5):
            match random.randrange(4):
                case 0:
                    bank.hidden(role, PACKED)
                case 1:
                    bank.values(PACKED, ENDS)
                case 2:
                    bank.scores(random.choice(("helpfulness", "safety")), ROWS)
                case _:
                    with pytest.raises(IndexError):
                        bank.hidden(role, {"input_ids": torch.tensor([[100_000]])})


@METHODS
def test_a_storm_of_switches_changes_nothing(tuning: Tuning, policy: Tuning, world: World):
    bank = world.bank(tuning, policy)
    spread(bank)
    frozen = bank.frozen_digest()
    weights = {name: weight.clone() for name, weight in bank.state_dict().items()}
    before = {role: bank.hidden(role, PACKED).detach() for role in bank.roles}
    storm(bank, 1)
    bank.trainable()
    assert bank.frozen_digest() == frozen
    assert all(torch.equal(weight, weights[name]) for name, weight in bank.state_dict().items())
    assert not any(module.training for module in bank.policy_model().modules())
    assert all(torch.equal(bank.hidden(role, PACKED).detach(), before[role]) for role in bank.roles)
    assert len({float(states.sum()) for states in before.values()}) == len(before)


@METHODS
def test_the_model_that_answers_is_the_policy_whatever_has_run(tuning: Tuning, policy: Tuning, world: World):
    bank = world.bank(tuning, policy)
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8, seed=0)

    def answers(model: Any) -> list[tuple[int, ...]]:
        engine = HuggingFaceEngine(model, (2,), 0)
        return [group[0].token_ids for group in engine.generate(ROWS, samples_per_prompt=1, sampling=greedy)]

    at_first = answers(load_policy(world.policy(policy).path).model)
    storm(bank, 2)
    assert answers(bank.policy_model()) == at_first
    spread(bank)
    storm(bank, 3)
    bank.save_policy(world.folder / f"moved-{tuning.method}-{policy.method}")
    assert answers(bank.policy_model()) != at_first
    torch.testing.assert_close(alone(bank.policy_model()), logits(bank, "policy"), **EXACT)


def test_a_weight_made_trainable_from_outside_is_detected(world: World):
    bank = world.bank(LORA, LORA)
    model: Any = bank.policy_model()
    model.set_adapter("default")  # PEFT's own switch
    with pytest.raises(AssertionError, match=r"requires_grad of .*critic.* has been changed"):
        bank.trainable()


# --- gradients


@METHODS
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_gradients_reach_exactly_what_is_trained(tuning: Tuning, policy: Tuning, critic: str, world: World):
    bank = world.bank(tuning, policy, critic=critic)
    spread(bank)
    by_role = gradients(bank)
    assert all(gradient is not None and bool(gradient.any()) for role in by_role for gradient in by_role[role])
    trained = {id(weight) for weights in bank.trainable().values() for weight in weights}
    modules = [bank.policy_model(), *(bank.reward_model(role).model for role in ("helpfulness", "safety"))]
    modules += [bank.lm_head("reference")]
    others = [weight for module in modules for weight in module.parameters() if id(weight) not in trained]
    assert others and all(weight.grad is None and not weight.requires_grad for weight in others)
    assert not bank.hidden("reference", PACKED).requires_grad and not bank.hidden("safety", PACKED).requires_grad
    alone_critic = gradients(bank, lambda bank: bank.values(PACKED, ENDS).sum())
    assert all((gradient is not None) == (critic == "shared") for gradient in alone_critic["policy"][:-1])


@METHODS
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_checkpointing_changes_no_gradient_though_other_roles_run_in_between(
    tuning: Tuning, policy: Tuning, critic: str, world: World
):
    plain = world.bank(tuning, policy, critic=critic)
    checkpointed = world.bank(tuning, policy, critic=critic, checkpointing=True)
    for bank in (plain, checkpointed):
        spread(bank)
    runs: list[int] = []
    for number, bank in enumerate((plain, checkpointed)):
        model: Any = bank.policy_model()
        # Before, since what is computed again stops at the last tensor that is wanted.
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    wanted = gradients(plain)
    assert same(gradients(checkpointed), wanted)
    assert runs.count(1) > runs.count(0)  # it was computed again
    storm(checkpointed, 4)
    assert same(gradients(checkpointed), wanted)


def test_a_step_moves_only_what_is_trained(world: World):
    bank = world.bank(LORA, LORA)
    frozen, before = bank.frozen_digest(), {name: weight.clone() for name, weight in bank.state_dict().items()}
    reference = logits(bank, "reference")
    trained = bank.trainable()
    step = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-5}
    optimizer = adamw([*trained["policy"], *trained["critic"]], **step)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(bank).backward()
        optimizer.step()
    assert bank.frozen_digest() == frozen and torch.equal(logits(bank, "reference"), reference)
    assert not any(torch.equal(weight, before[name]) for name, weight in bank.state_dict().items())
    with torch.no_grad():
        next(iter(bank.reward_model("safety").model.score.parameters()))[0, 0] += 1
    assert bank.frozen_digest() != frozen


# --- checkpoints and the published policy


@METHODS
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_state_brings_back_what_was_trained(tuning: Tuning, policy: Tuning, critic: str, world: World):
    bank, other = (world.bank(tuning, policy, critic=critic) for _ in range(2))
    spread(bank)
    addresses = [weight.data_ptr() for weights in other.trainable().values() for weight in weights]
    other.load_state_dict({name: weight.clone() for name, weight in bank.state_dict().items()})
    assert addresses == [weight.data_ptr() for weights in other.trainable().values() for weight in weights]
    assert torch.equal(logits(other, "policy"), logits(bank, "policy"))
    assert torch.equal(other.values(PACKED, ENDS), bank.values(PACKED, ENDS))


def test_what_is_published_is_the_policy_alone(world: World, tmp_path: Path):
    bank = world.bank(LORA, LORA)
    spread(bank)
    bank.save_policy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(world.base.model, dtype=torch.float32)
    torch.testing.assert_close(alone(PeftModel.from_pretrained(base, str(tmp_path))), logits(bank, "policy"), **EXACT)
    details = bank.policy_details(max_tokens=96, system="Be kind.")
    policy_details = dict(world.policy(LORA).manifest.details)
    assert details == policy_details | {"system": "Be kind."}
