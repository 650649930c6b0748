"""What a recipe's steps cost: where its models would lie, how much data there is, and what finished steps have measured."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from llamachat.memory.estimates import CPU_FLOPS, Shape, read_shape, shape_of
from pipelines.planning.estimates import (
    HUB_TOKENS,
    MOST_BYTES,
    DataSize,
    bytes_per_token,
    estimate_step,
    measure_data,
    seat_roles,
)
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import Recipe, Step, load
from tests.recipes import SHAPE, preference_data, write_base, write_dialogs, write_recipe

# -- where the models lie


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = preference_data(tmp_path)
    return write_recipe(tmp_path, data=data, steps=["sft", "rm", "ppo"], tuning={"method": "lora", "rank": 4})


@pytest.mark.parametrize(
    ("changes", "is_continued", "sharing", "beside"),
    [
        ([], True, 3, {}),
        (["steps=[{sft: {tuning: {method: full}}}, rm, ppo]"], False, 3, {}),
        (["data.open=[]", "steps=[sft, rm/helpfulness, rm/judge, ppo]"], True, 2, {}),
        # Made from one policy, and PPO starts from another with the same base below: one trunk.
        (["steps=[sft, rm, {sft: {name: sft-2}}, ppo]"], True, 3, {}),
        # On the base, and the policy is all new weights: one other trunk for three adapters.
        (["steps=[rm, {sft: {tuning: {method: full}}}, ppo]"], False, 2, {"helpfulness": (True, False)}),
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
    recipe = load(path, changes)
    shape, steps = read_shape(Path(recipe.base.model)), recipe.steps
    assert shape is not None
    seating = seat_roles(recipe, steps[-1], shape)
    assert (seating.is_continued, seating.sharing) == (is_continued, sharing)
    assert {name: (model.has_adapter, model.is_4bit) for name, model in seating.beside.items()} == beside


def test_the_plan_says_what_a_named_model_on_another_trunk_costs(path: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other")
    recipe = load(path, [f"scoring.helpfulness={other}"])
    (planned,) = make_plan(recipe, "ppo")
    assert planned.estimate is not None
    size = planned.estimate.memory["helpfulness reward model next to the trunk"]
    shape = Shape(64, 128, 2, 4, 2, SHAPE["vocab_size"])
    assert size == 2 * (shape.headless().weights + 64)
    text = plan_text(recipe, [planned])
    assert "helpfulness reward model next to the trunk" in text and "safety reward model next" not in text


# -- how much data there is


def test_data_are_counted_where_they_are_and_bounded_where_they_are_not(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = write_dialogs(tmp_path / "a.jsonl", 30)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 40] * 25}), tmp_path / "b.parquet")
    recipe = load(write_recipe(tmp_path, data={"sft": [{"path": str(lines)}, {"path": str(tmp_path / "b.parquet")}]}))
    one, two = recipe.data.sft
    assert measure_data([one]) == DataSize(30, lines.stat().st_size / 30 / bytes_per_token(32_000))
    size = measure_data([one.model_copy(update={"weight": 2.0}), two.model_copy(update={"limit": 5})])
    assert size is not None and size.records == 65
    hub = one.model_copy(update={"path": "owner/name:train"})
    assert measure_data([one, hub]) is None
    size = measure_data([hub.model_copy(update={"limit": 10})])
    assert size is not None and (size.records, size.tokens_per_record) == (10, pytest.approx(HUB_TOKENS))


def test_tokens_are_those_of_the_tokenizer_and_prompts_go_without_their_answers(tmp_path: Path) -> None:
    # Bytes a token of the bundled data with three tokenizers, counted with each.
    for pieces, counted in ((4096, 3.6), (32_000, 4.6), (49_152, 4.9)):
        assert bytes_per_token(pieces) == pytest.approx(counted, rel=0.03)
    question, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello. " * 50}
    records = [
        {"prompt": [question], "chosen": [answer], "rejected": [answer]},
        {"messages": [question, answer]},
        {"prompt": [question], "is_safety": False},
        {"messages": [question]},
    ]
    sizes = []
    for number, record in enumerate(records):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(f"{json.dumps(record)}\n")
        recipe = load(write_recipe(tmp_path, data={"sft": [{"path": str(file)}]}))
        size = measure_data(recipe.data.sft, prompts_only=True)
        assert size is not None and size.records == 1
        sizes.append(size.tokens_per_record * bytes_per_token(32_000))
    assert sizes == [pytest.approx(1.25 * len(json.dumps([question])))] * 4


def test_pairs_are_left_out_by_the_longer_of_their_dialogs(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Hi?"}
    answers = [{"role": "assistant", "content": "x" * 10 * number} for number in range(100)]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(f"{json.dumps({'prompt': [question], 'chosen': one, 'rejected': answers[0]})}\n" for one in answers)
    )
    recipe = load(write_recipe(tmp_path, data={"sft": [{"path": str(file)}]}))
    size = measure_data(recipe.data.sft)
    assert size is not None and size.up_to(math.inf) == size
    own = len(json.dumps([question])) + len(json.dumps(answers[0]))
    kept = size.up_to((own + 10 * 49.5) / bytes_per_token(32_000))
    assert kept.records == 50, "two pairs are counted together"
    lines = file.read_text().splitlines(keepends=True)[:50]
    assert kept.tokens_per_record == pytest.approx(sum(map(len, lines)) / 50 / bytes_per_token(32_000))
    # Of lengths of which only the mean is known, exp(-1) are above it.
    unknown = measure_data([recipe.data.sft[0].model_copy(update={"path": "owner/name:train", "limit": 1000})])
    assert unknown is not None and unknown.up_to(HUB_TOKENS).records / 1000 == pytest.approx(1 - math.exp(-1), abs=0.03)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "[" * 100_000, "{", "3", '{"messages": null}', ""])
def test_a_line_that_is_no_record_counts_by_its_bytes(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    recipe = load(write_recipe(tmp_path, data={"sft": [{"path": str(tmp_path / "a.jsonl")}]}))
    size = measure_data(recipe.data.sft, prompts_only=True)
    assert size is not None and size.records == 1 and 0 < size.tokens_per_record <= len(line) + 2
    assert bytes_per_token(2) == 1.0


# Pairs, the tokens of their rows, of the held-out pairs, and of the test pairs with the probe, counted: first on a CPU,
# then on a GPU. The plan may be off by this much.
OFF = 0.15
COUNTED = {
    "tiny": {
        "helpfulness": (11_161, (699_317, 1_357_975), (28_754, 47_104), (494_809, 1_025_276)),
        "safety": (6_535, (1_045_743, 1_464_509), (46_301, 73_199), (550_260, 1_198_053)),
        "judge": (6_240, (559_214, 937_920), (67_044, 102_145), (550_260, 1_198_053)),
    },
    "tiny-long": {
        "helpfulness": (32_180, (2_443_656, 4_419_029), (80_407, 106_862), (494_809, 1_025_276)),
        "safety": (6_580, (1_247_834, 1_699_974), (60_004, 88_602), (550_260, 1_198_053)),
        "judge": (15_820, (1_257_308, 2_224_699), (108_505, 151_024), (550_260, 1_198_053)),
    },
}


@pytest.mark.parametrize("gpu", [None, "rtx-4090"])
@pytest.mark.parametrize("name", COUNTED)
def test_the_pairs_of_the_bundled_recipes_are_estimated(name: str, gpu: str | None) -> None:
    recipe = load(f"configs/{name}.yaml", [f"run.gpu={gpu}"] if gpu else [])
    shape = shape_of(recipe.base.model)
    assert shape is not None
    flops = 165e12 * 0.4 if gpu else CPU_FLOPS
    for which, (pairs, *tokens) in COUNTED[name].items():
        step = recipe.step(f"rm/{which}")
        estimate = estimate_step(recipe, step)
        assert estimate is not None and estimate.optimizer_steps is not None
        trained, held_out, tested = (both[gpu is not None] for both in tokens)
        per_pair = float(re.findall(r"([0-9]+) tokens per pair", estimate.assumed)[0])
        assert per_pair == pytest.approx(trained / pairs, rel=OFF)
        config: Any = step.config
        assert estimate.optimizer_steps == pytest.approx(pairs * config.epochs / config.pairs_per_step, rel=OFF)
        passes = 1 + math.ceil(estimate.optimizer_steps / recipe.sections.tracking.eval_every)
        weights = 6 * trained * config.epochs + 2 * (passes * held_out + tested)
        assert estimate.seconds == pytest.approx(weights * shape.block_weights / flops, rel=OFF)


def test_the_plan_names_data_that_no_step_could_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    recipe = load(path, [f"data.sft=[{{path: {tmp_path / 'cut.parquet'}}}]"])
    (line,) = [line for line in plan_text(recipe, make_plan(recipe, "sft")).splitlines() if "cut.parquet" in line]
    assert line.strip().startswith("warning:")


def test_a_large_file_is_judged_by_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_BYTES == 64 * 2**20
    monkeypatch.setattr("pipelines.planning.estimates.MOST_BYTES", 1000)
    recipe = load(write_recipe(tmp_path, data={"sft": [{"path": str(write_dialogs(tmp_path / "a.jsonl", 5000))}]}))
    size = measure_data(recipe.data.sft)
    assert size is not None and size.records == pytest.approx(5000, rel=0.1)  # its later lines are longer
    limited = measure_data([recipe.data.sft[0].model_copy(update={"limit": 70})])
    assert limited is not None and limited.records == 70


# -- what finished steps have measured


def step_of(recipe: Recipe, name: str) -> Step:
    return next(step for step in recipe.steps if step.name == name)


def test_answers_are_as_long_as_an_earlier_policy_gave_them(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=["sft", "rm", "rs", "ppo"])
    recipe = load(path)
    before = {name: estimate_step(recipe, step_of(recipe, name)) for name in ("rs", "ppo")}
    assert all(estimate and "0.4 of the longest" in estimate.assumed for estimate in before.values())
    for name, figures in {"sft": {"sft/answer_tokens": 30.0}, "rs": {"rs/test/final/response_tokens": 7.0}}.items():
        folder = Path(recipe.run.dir) / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(figures))
    child = load(path, [f"run.dir={tmp_path / 'b'}", f"run.parent={recipe.run.dir}"])
    for one in (recipe, child):
        rs, ppo = (estimate_step(one, step_of(one, name)) for name in ("rs", "ppo"))
        assert rs is not None and "answers of 30 (as of 'sft')" in rs.assumed
        assert ppo is not None and "answers of 7 (as of 'rs')" in ppo.assumed
        assert before["ppo"] is not None and ppo.seconds < before["ppo"].seconds
