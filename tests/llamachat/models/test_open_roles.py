"""Which weights a bank of roles shares, which lie beside, what is in 4 bits, and what the critic begins as."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from llamachat.config.sections import RopeScaling, Tuning
from llamachat.errors import ArtifactError
from llamachat.memory.estimates import Setup, Shape, read_shape
from llamachat.memory.role_bytes import Beside, Seating, role_bank_bytes
from llamachat.models.loading import load_policy
from llamachat.models.reward_model import load_reward_model
from llamachat.models.roles import RewardRole, RoleBank
from llamachat.models.sequence_attention import use_sequence_attention
from tests.fakes import train_sentencepiece
from tests.llamachat.models.tiny_roles import EXACT, FULL, QLORA, ROWS, World, make_reward_model, weight_bytes
from tests.tiny_llama import LORA

BATCH = {"input_ids": torch.tensor([ROWS[2]])}
LAST = torch.tensor([7])


def shape(world: World) -> Shape:
    base_shape = read_shape(Path(world.base.model))
    assert base_shape is not None
    return base_shape


def value_of(bank: RoleBank) -> float:
    with torch.no_grad():
        return bank.values(BATCH, LAST).item()


def score_of(bank: RoleBank, role: Any = "helpfulness") -> float:
    return bank.scores(role, [ROWS[2]]).item()


def alone(artifact: Any) -> list[float]:
    model = load_reward_model(artifact.path)
    use_sequence_attention(model.model)  # as the bank attends on a CPU: in 16 bits another order of sums shows
    return model.score_ids(ROWS).tolist()


def trained_step(bank: RoleBank) -> None:
    """What is trained moves by its gradient."""
    weights = [weight for group in bank.trainable().values() for weight in group]
    (bank.values(BATCH, LAST).sum() + bank.hidden("policy", BATCH).sum()).backward()
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None
            weight.sub_(weight.grad, alpha=0.01)
            weight.grad = None


# --- one copy of the weights


@pytest.mark.parametrize(
    ("tuning", "policy", "critic", "trunks", "headless", "adapters"),
    [
        (LORA, FULL, "separate", 1, 0, 4),
        (LORA, FULL, "shared", 1, 0, 3),
        (LORA, LORA, "separate", 1, 0, 5),
        (LORA, LORA, "shared", 1, 0, 4),
        (FULL, FULL, "separate", 2, 3, 0),
        (FULL, FULL, "shared", 2, 2, 0),
    ],
)
def test_weights_that_can_be_shared_are_there_once(
    tuning: Tuning, policy: Tuning, critic: Any, trunks: int, headless: int, adapters: int, world: World
):
    sizes = shape(world)
    numbers = trunks * sizes.weights + headless * (sizes.weights - 420 * 64) + adapters * sizes.adapter_weights(4)
    numbers += 2 * 64 + 65  # two score heads, the critic's with bias
    assert weight_bytes(world.bank(tuning, policy, critic=critic)) == 4 * numbers
    beside = {} if adapters else {name: Beside(sizes, width=4) for name in ("helpfulness", "safety")}
    seating = Seating(policy is not FULL, 2 if adapters else 0, beside)
    assert sum(role_bank_bytes(Setup(sizes, world.base, tuning), seating, critic=critic).values()) == 4 * numbers


@pytest.mark.parametrize(("policy", "adapters"), [(FULL, 4), (QLORA, 5)])
def test_a_4_bit_base_is_there_once(policy: Tuning, adapters: int, world: World):
    bank = world.bank(QLORA, policy)
    sizes = shape(world)
    quantised = {
        layer.weight.data_ptr(): layer.weight.numel()
        for role in bank.roles
        for layer in bank._slots[role].trunk.modules()
        if isinstance(layer, Linear4bit)
    }
    assert sum(quantised.values()) == sizes.linear_weights / 2 and len(quantised) == 2 * 7
    wanted = sizes.trunk_bytes(2, is_4bit=True) + 2 * (adapters * sizes.adapter_weights(4) + 2 * 64) + 4 * 65
    planned = role_bank_bytes(Setup(sizes, world.base16, QLORA), Seating(policy is QLORA, 2, {}), critic="separate")
    assert weight_bytes(bank) == pytest.approx(wanted, rel=1e-3) == sum(planned.values())


# --- beside it


def test_reward_models_on_one_other_trunk_share_it(world: World, caplog: pytest.LogCaptureFixture):
    roles: tuple[RewardRole, ...] = ("helpfulness", "safety")
    models = {role: world.reward_model(role, LORA, FULL, policy_seed=7) for role in roles}
    with caplog.at_level(logging.DEBUG):
        bank = world.bank(LORA, FULL, reward_models=models)
    sizes = shape(world)
    headless = sizes.weights - 420 * 64
    numbers = sizes.weights + headless + 4 * sizes.adapter_weights(4) + 2 * 64 + 65
    assert weight_bytes(bank) == 4 * numbers
    assert "has its own base, which is loaded separately: 0.00 GiB" in caplog.text
    assert "safety: safety-lora-on-full-7/rm/safety is an adapter on weights that are loaded already" in caplog.text
    frozen = bank.frozen_digest()
    for _ in range(2):
        for role in roles:
            torch.testing.assert_close(bank.scores(role, ROWS).tolist(), alone(models[role]), **EXACT)
        trained_step(bank)
    assert bank.frozen_digest() == frozen and abs(value_of(bank) - score_of(bank)) > 1e-3


def test_a_reward_model_with_other_positions_is_on_other_weights(world: World):
    stretched = world.base.model_copy(update={"rope_scaling": RopeScaling(type="linear", factor=2.0)})
    artifact = make_reward_model(
        world.folder / "runs" / "stretched", stretched, LORA, policy=world.policy(FULL), seed=2
    )
    bank = world.bank(LORA, FULL, reward_models={"safety": artifact})
    torch.testing.assert_close(bank.scores("safety", ROWS).tolist(), alone(artifact), **EXACT)
    wanted = alone(world.reward_model("helpfulness", LORA, FULL))
    assert abs(bank.scores("safety", ROWS)[2].item() - wanted[2]) > 1e-3


def test_the_critic_is_an_adapter_on_a_fully_tuned_reward_model(world: World):
    models = {"helpfulness": world.reward_model("helpfulness", FULL, FULL)}
    bank = world.bank(LORA, FULL, reward_models=models)
    wanted = alone(models["helpfulness"])
    assert value_of(bank) == pytest.approx(wanted[2], abs=1e-5)
    assert len(bank.trainable()["critic"]) == 2 * 2 * 7 + 2
    frozen = bank.frozen_digest()
    trained_step(bank)
    assert bank.frozen_digest() == frozen and value_of(bank) != pytest.approx(wanted[2], abs=1e-3)
    torch.testing.assert_close(bank.scores("helpfulness", ROWS).tolist(), wanted, **EXACT)


def test_a_4_bit_reward_model_lies_beside_a_16_bit_policy(world: World):
    models = {"helpfulness": world.reward_model("helpfulness", QLORA, QLORA)}
    bank = world.bank(LORA, FULL, reward_models=models, base=world.base16)
    assert bank.scores("helpfulness", ROWS).tolist() == pytest.approx(alone(models["helpfulness"]), abs=1e-2)
    assert value_of(bank) == pytest.approx(score_of(bank), abs=1e-2)
    full = world.bank(FULL, FULL, reward_models=models)
    # 4-bit weights cannot all be trained: the critic begins as the policy.
    assert value_of(full) == 0.0 and full.critic_begins_as is None
    assert torch.equal(full.hidden("critic", BATCH), full.hidden("reference", BATCH))


def test_a_model_with_another_vocabulary_is_reported_and_gives_no_critic(world: World, tmp_path: Path):
    artifact = world.reward_model("helpfulness", FULL, FULL)
    plain = shutil.copytree(artifact.path, tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json"))
    bank = world.bank(LORA, FULL, reward_models={"helpfulness": str(plain)})
    assert bank.reads_policy_ids("helpfulness")
    assert bank.scores("helpfulness", ROWS).tolist() == pytest.approx(alone(artifact), abs=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (plain / name).unlink()
    (plain / "tokenizer.model").write_bytes(
        train_sentencepiece(["other words entirely", "and no digits"], vocab_size=300)
    )
    bank = world.bank(LORA, FULL, reward_models={"helpfulness": str(plain)})
    assert not bank.reads_policy_ids("helpfulness")
    assert value_of(bank) == 0.0 and bank.critic_begins_as is None
    both = {"helpfulness": str(plain), "safety": world.reward_model("safety", LORA, FULL)}
    bank = world.bank(LORA, FULL, reward_models=both)
    assert value_of(bank) == pytest.approx(score_of(bank, "safety"), abs=1e-5) and bank.critic_begins_as == "safety"


def test_a_shared_critic_begins_with_values_of_0(world: World, caplog: pytest.LogCaptureFixture):
    """A reward model's head says nothing on the policy's states."""
    for tuning, policy in ((LORA, FULL), (FULL, FULL)):
        with caplog.at_level(logging.INFO):
            bank = world.bank(tuning, policy, critic="shared")
        assert value_of(bank) == 0.0 and bank.critic_begins_as is None
    assert "critic (shared): initialised from the policy, with values of 0" in caplog.text
    assert world.bank(LORA, FULL).critic_begins_as == "helpfulness"


def test_a_policy_is_no_reward_model(world: World):
    with pytest.raises(ArtifactError, match="reward_model"):
        world.bank(LORA, FULL, reward_models={"safety": world.policy(FULL).path})


# --- what there may be


def test_without_reward_models_the_critic_begins_as_the_policy_with_values_of_0(world: World):
    for tuning, policy in ((LORA, FULL), (LORA, LORA), (FULL, FULL)):
        bank = world.bank(tuning, policy, reward_models={})
        assert bank.roles == ("policy", "reference", "critic")
        assert value_of(bank) == 0.0
        assert torch.equal(bank.hidden("critic", BATCH), bank.hidden("policy", BATCH))


def test_the_judge_gives_no_critic_and_the_safety_model_does(world: World):
    judge = world.reward_model("judge", LORA, FULL)
    bank = world.bank(LORA, FULL, reward_models={"judge": judge})
    assert value_of(bank) == 0.0 and score_of(bank, "judge") == pytest.approx(alone(judge)[2], abs=1e-5)
    safety = world.reward_model("safety", LORA, FULL)
    bank = world.bank(LORA, FULL, reward_models={"judge": judge, "safety": safety})
    assert value_of(bank) == pytest.approx(alone(safety)[2], abs=1e-5)


def test_opening_a_bank_draws_nothing_from_torch_and_follows_from_the_seed(world: World):
    state = torch.get_rng_state()
    banks = [world.bank(LORA, FULL, reward_models={}, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (bank.state_dict() for bank in banks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first if name.startswith("policy."))


def test_without_a_policy_the_base_is_the_reference(world: World):
    bank = world.bank(LORA, FULL, policy=None, reward_models={})
    assert bank.base == world.base.model
    assert torch.equal(bank.hidden("policy", BATCH), bank.hidden("reference", BATCH))


# --- 4 bits


@pytest.mark.parametrize("policy", [FULL, QLORA])
def test_roles_on_a_4_bit_trunk_are_what_they_are_alone(policy: Tuning, world: World):
    bank = world.bank(QLORA, policy)
    for role in ("helpfulness", "safety"):
        assert bank.scores(role, ROWS).tolist() == alone(world.reward_model(role, QLORA, policy))
    assert value_of(bank) == pytest.approx(score_of(bank), abs=1e-5)
    if policy is QLORA:
        model = load_policy(world.policy(QLORA).path).model
        use_sequence_attention(model)
        with torch.no_grad():
            assert torch.equal(bank.lm_head("policy")(bank.hidden("policy", BATCH)), model(**BATCH).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_a_4_bit_trunk_are_the_same_after_scoring(checkpointing: bool, world: World):
    bank = world.bank(QLORA, QLORA, checkpointing=checkpointing)
    weights = [weight for group in bank.trainable().values() for weight in group]

    def gradients() -> list[Any]:
        for weight in weights:
            weight.grad = None
        loss = bank.values(BATCH, LAST).square().sum() + bank.hidden("policy", BATCH).float().square().mean()
        bank.scores("safety", ROWS)
        loss.backward()
        return [weight.grad for weight in weights]

    frozen, before = bank.frozen_digest(), gradients()
    assert all(bool(gradient.any()) for gradient in before)
    with torch.no_grad():
        model: Any = bank.policy_model()
        model.get_base_model().generate(BATCH["input_ids"], max_new_tokens=3)
    for role in bank.roles:
        with torch.no_grad():
            bank.hidden(role, BATCH)
    assert all(torch.equal(one, other) for one, other in zip(gradients(), before, strict=True))
    trained_step(bank)
    assert bank.frozen_digest() == frozen


def test_a_16_bit_adapter_is_no_match_for_a_4_bit_trunk(world: World):
    models = {"helpfulness": world.reward_model("helpfulness", LORA, FULL)}
    bank = world.bank(QLORA, FULL, reward_models=models)
    assert bank.scores("helpfulness", ROWS).tolist() == pytest.approx(alone(models["helpfulness"]), abs=1e-5)
