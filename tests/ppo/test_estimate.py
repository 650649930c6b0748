"""What the planner says of PPO, against the weights of real banks; and which models `plan` finds beside the trunk."""

from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.config.gpus import parse_gpu
from llamachat.config.sections import Rollout, Tuning
from llamachat.memory.estimates import CPU_FLOPS, KNOWN_BASES, Shape, read_shape
from llamachat.memory.role_bytes import Beside, Lengths
from pipelines.planning.placing import Placing, place_roles
from pipelines.planning.plan import make_plan, plan_text
from pipelines.recipe.recipe import Recipe, load, resolve_steps
from ppo.config import Config
from ppo.estimate import Workload, estimate, memory_by_part, updating_bytes
from tests.llamachat.models.tiny_roles import FULL, QLORA, World, weight_bytes
from tests.recipes import SHAPE, preference_data, write_base, write_recipe
from tests.tiny_llama import LORA, base_section

HEAD = 65  # weights of a value head, with its bias
IN_BANK = ("trunk", "policy's own weights", "critic's own weights", "adapters and heads")
LLAMA_2 = "meta-llama/Llama-2-{}-hf"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_format: ChatFormat, tiny_sentencepiece: bytes) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece)


@pytest.mark.parametrize(
    ("tuning", "made_by", "critic"),
    [(LORA, FULL, "separate"), (LORA, LORA, "shared"), (QLORA, QLORA, "separate"), (FULL, FULL, "separate")],
)
def test_weights_gradients_and_optimizer_are_those_of_a_real_bank(
    tuning: Tuning, made_by: Tuning, critic: Any, world: World
) -> None:
    bank = world.bank(tuning, made_by, critic=critic)
    shape, width = read_shape(Path(world.base.model)), 2 if tuning is QLORA else 4
    assert shape is not None
    is_full = tuning is FULL
    work = Workload(
        shape=shape,
        base=world.base16 if tuning is QLORA else world.base,
        tuning=tuning,
        rollout=Rollout(),
        is_continued=made_by is not FULL,
        sharing=0 if is_full else 2,
        beside={name: Beside(shape, width=width) for name in ("helpfulness", "safety")} if is_full else {},
    )
    memory = memory_by_part(Config(critic=critic), work)
    held = sum(size for name, size in memory.items() if name in IN_BANK or "beside" in name)
    assert held == pytest.approx(weight_bytes(bank), rel=1e-3)
    trained = {role: sum(weight.numel() for weight in group) for role, group in bank.trainable().items()}
    state = 8 + (4 if width == 2 else 0)  # two moments, and masters where the weights are not fp32
    updating = updating_bytes(Config(critic=critic), work)
    assert updating["gradients"] == trained["policy"] * width
    assert updating["critic's gradients"] == (trained["critic"] - HEAD) * width + HEAD * 4
    assert memory["optimizer (fp32 masters and two moments)"] == trained["policy"] * state
    assert memory["critic's optimizer"] == (trained["critic"] - HEAD) * state + HEAD * 8


def test_steps_and_seconds_by_hand() -> None:
    shape = Shape(64, 128, 2, 4, 2, 420)
    base = base_section("x", max_tokens=4096)
    lengths = Lengths(prompt=300.0, answer=100.0)
    work = Workload(
        shape=shape, base=base, tuning=FULL, rollout=Rollout(max_new_tokens=200), sharing=2, lengths=lengths
    )
    config = Config(
        iterations=3,
        responses_per_iteration=8,
        responses_per_minibatch=4,
        epochs=2,
        validation_every=2,
        validation_prompts=6,
        test_prompts=5,
    )
    found = estimate(config, work)
    assert found.optimizer_steps == 3 * 2 * 2
    # 24 responses of 400 tokens are learnt from, 2 x 6 + 2 x 5 evaluated. A weight's products with each: 300 as the prompt is
    # read, 4 x 100 as it is answered, 400 by policy and reference each, and of the blocks' weights by two reward models and
    # the critic. Two epochs of training of policy and critic are three passes each.
    weights, blocks = shape.weights, shape.weights - shape.embedding_weights
    sampled = (24 + 22) * ((300 + 4 * 100 + 2 * 400) * weights + 2 * 400 * blocks) + 24 * 400 * blocks
    assert found.seconds == pytest.approx(2 * (sampled + 24 * 400 * 2 * 2 * 3 * weights) / CPU_FLOPS)
    assert "prompts of 300 tokens, answers of 100" in found.assumed
    shared = estimate(config.model_copy(update={"critic": "shared"}), work)
    assert shared.seconds < found.seconds and shared.peak_bytes < found.peak_bytes


def llama_2(size: str, *, gpu: str, **changes: Any) -> dict[str, int]:
    """NF4, two reward models, responses of 256 tokens to prompts of 512, checkpointing on."""
    shape = KNOWN_BASES[LLAMA_2.format(size)].shape
    work = Workload(
        shape=shape,
        base=base_section("x", dtype="bfloat16", max_tokens=768),
        tuning=Tuning(method="qlora", rank=16),
        gpu=parse_gpu(gpu),
        **({"is_continued": True, "sharing": 2, "rollout": Rollout(max_new_tokens=256, cache_gib=1.0)} | changes),
    )
    return memory_by_part(Config(gradient_checkpointing=True), work)


@pytest.mark.parametrize(("size", "gpu", "gib"), [("7b", "24GiB", 22), ("70b", "80GiB", 78)])
def test_two_reward_models_on_a_4_bit_base_fit_one_card(size: str, gpu: str, gib: int) -> None:
    memory = llama_2(size, gpu=gpu)
    assert sum(memory.values()) < gib * 2**30
    assert memory["rollout's copy of the projections"] == 0, "there is no room for it"


def test_where_there_is_room_the_decoder_has_a_copy() -> None:
    shape = KNOWN_BASES[LLAMA_2.format("7b")].shape
    assert llama_2("7b", gpu="80GiB")["rollout's copy of the projections"] == 2 * shape.linear_weights


def test_a_server_holds_its_own_weights_and_cache() -> None:
    served = llama_2("7b", gpu="80GiB", rollout=Rollout(engine="vllm", server="http://localhost:8000", cache_gib=1.0))
    own = llama_2("7b", gpu="80GiB")
    assert served["rollout's copy of the projections"] == 0 < own["rollout's copy of the projections"]
    assert "keys and values of the rollout" not in served


# --- what the recipe says of where the models lie


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = preference_data(tmp_path)
    return write_recipe(tmp_path, data=data, steps=["sft", "rm", "ppo"], tuning={"method": "lora", "rank": 4})


def placed(recipe: Recipe) -> Placing:
    shape = read_shape(Path(recipe.base.model))
    assert shape is not None
    return place_roles(recipe, resolve_steps(recipe)[-1], shape)


@pytest.mark.parametrize(
    ("changes", "is_continued", "sharing", "beside"),
    [
        ([], True, 3, {}),
        (["steps=[{sft: {tuning: {method: full}}}, rm, ppo]"], False, 3, {}),
        (["data.open=[]", "steps=[sft, rm/helpfulness, rm/judge, ppo]"], True, 2, {}),
        # Made from one policy, and PPO starts from another with the same base below: one trunk.
        (["steps=[sft, rm, {sft: {name: sft-2}}, ppo]"], True, 3, {}),
        # On the base, and the policy is all new weights: one other trunk for three adapters.
        (
            ["steps=[rm, {sft: {tuning: {method: full}}}, ppo]"],
            False,
            2,
            {"helpfulness": (True, False)},
        ),
        (
            ["steps=[sft, {rm/helpfulness: {tuning: {method: full}}}, rm/safety, ppo]"],
            True,
            1,
            {"helpfulness": (False, False)},
        ),
        (
            ["steps=[{sft: {tuning: {method: full}}}, {rm/safety: {tuning: {method: qlora}}}, ppo]"],
            False,
            0,
            {"safety": (True, True)},
        ),
        (["tuning.method=full"], False, 0, dict.fromkeys(("helpfulness", "safety", "judge"), (False, False))),
        (["scoring.combine=single"], True, 2, {}),  # the safety model is not read
    ],
)
def test_models_lie_where_a_bank_would_put_them(
    changes: list[str], is_continued: bool, sharing: int, beside: dict[str, tuple[bool, bool]], path: Path
) -> None:
    found = placed(load(path, changes))
    assert (found.is_continued, found.sharing) == (is_continued, sharing)
    assert {name: (model.has_adapter, model.is_4bit) for name, model in found.beside.items()} == beside


def test_the_plan_tells_what_a_named_model_on_another_trunk_costs(path: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other")
    recipe = load(path, [f"scoring.helpfulness={other}"])
    (planned,) = make_plan(recipe, "ppo")
    assert planned.estimate is not None
    size = planned.estimate.memory["helpfulness reward model beside the trunk"]
    shape = Shape(64, 128, 2, 4, 2, SHAPE["vocab_size"])
    assert size == 2 * (shape.headless().weights + 64)
    assert "helpfulness reward model beside the trunk 0.00" in plan_text(recipe, [planned])
    assert "safety reward model beside" not in plan_text(recipe, [planned])
