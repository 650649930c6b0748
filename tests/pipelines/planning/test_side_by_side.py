"""How many steps run at once, on which machine; and what `plan` says of it."""

from pathlib import Path
from typing import Any

import pytest

from llamachat.memory.estimates import Estimate
from pipelines.execution.jobs import Group
from pipelines.planning import hardware, side_by_side
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import Recipe, load

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, 64 GiB, no card, no launcher; each step takes 5 GiB and 100 s."""
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    set_machine(monkeypatch)


def set_machine(
    monkeypatch: pytest.MonkeyPatch, *, cores: int = 8, memory: float = 64, cards: tuple[str, ...] = ()
) -> None:
    monkeypatch.setattr(side_by_side, "usable_cores", lambda: cores)
    monkeypatch.setattr(side_by_side, "installed_bytes", lambda: round(memory * GIB))
    monkeypatch.setattr(side_by_side, "visible_cards", lambda: list(cards))
    monkeypatch.setattr(
        side_by_side, "estimate_step", lambda recipe, step: Estimate(seconds=100, memory={"all": 5 * GIB})
    )


def tiny(*overrides: str, tmp_path: Path) -> Recipe:
    return load("configs/tiny.yaml", [f"run.dir={tmp_path}/run", *overrides])


def models(recipe: Recipe) -> Group:
    """The group of the three reward models; they are alone each where nothing runs side by side."""
    groups = side_by_side.side_by_side(recipe, recipe.steps)
    return next(group for group in groups if group.steps[0].name == "rm/helpfulness")


@pytest.mark.parametrize(
    ("place", "environment", "overrides", "jobs", "threads"),
    [
        ({"cores": 2}, {}, (), 3, 1),
        ({"cores": 2}, {"OMP_NUM_THREADS": "1"}, (), 2, 1),
        ({"cores": 2}, {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LLAMACHAT_PROCESSES": "2"}, (), 3, 1),
        ({"cores": 8}, {}, (), 3, 2),
        ({"cores": 1}, {}, (), 1, None),
        ({"cores": 8}, {"OMP_NUM_THREADS": "4"}, (), 2, 4),
        ({"cores": 8}, {}, ("run.jobs=2",), 2, 4),
        ({"cores": 1}, {}, ("run.jobs=3",), 3, 1),
        ({"cores": 8}, {}, ("run.jobs=1",), 1, None),
        # Each step takes 5 GiB, and steps may take three quarters of the memory.
        ({"memory": 20}, {}, (), 3, 2),
        ({"memory": 19}, {}, (), 2, 4),
        ({"memory": 13}, {}, (), 1, None),
        ({}, {"WORLD_SIZE": "2"}, (), 1, None),
        ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, ("run.jobs=3",), 1, None),
        ({"cards": ("0",)}, {}, (), 1, None),
        ({"cards": ("0", "3")}, {}, (), 2, 4),
        ({"cards": ("0",)}, {}, ("run.jobs=2",), 2, 4),
    ],
)
def test_as_many_at_once_as_the_machine_allows(
    place: dict[str, Any],
    environment: dict[str, str],
    overrides: tuple[str, ...],
    jobs: int,
    threads: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_machine(monkeypatch, **place)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    group = models(tiny(*overrides, tmp_path=tmp_path))
    assert (group.jobs, group.threads) == (jobs, threads)
    assert group.cards == (place.get("cards", ()) if jobs > 1 else ())


def test_where_processes_share_cores_they_take_turns_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"rm/helpfulness": 50.0, "rm/safety": 90.0, "rm/judge": 70.0}
    recipe = tiny(tmp_path=tmp_path)
    for cores, at_once, shares in ((2, 2, (50.0, 90.0, 70.0)), (8, 0, ())):
        set_machine(monkeypatch, cores=cores)
        monkeypatch.setattr(
            side_by_side,
            "estimate_step",
            lambda recipe, step: Estimate(seconds=seconds.get(step.name, 1.0), memory={"all": 5 * GIB}),
        )
        assert (models(recipe).at_once, models(recipe).seconds) == (at_once, shares)
    set_machine(monkeypatch, cards=("0", "1"))
    assert (models(recipe).at_once, models(recipe).seconds) == (0, ())


@pytest.mark.parametrize(
    ("place", "environment", "overrides", "count"),
    [
        ({"cores": 2}, {}, (), 2),
        ({"cores": 8}, {}, (), 4),
        ({"cores": 8, "memory": 1}, {}, (), 4),  # a narrow base needs no estimate
        ({"cores": 1}, {}, (), 1),
        ({"cores": 8}, {}, ("run.processes=3",), 3),
        ({"cores": 8}, {}, ("run.processes=1",), 1),
        ({"cores": 8}, {"OMP_NUM_THREADS": "2"}, (), 1),
        ({"cores": 8}, {"OMP_NUM_THREADS": "2"}, ("run.processes=3",), 3),
        ({"cores": 8}, {"WORLD_SIZE": "2"}, ("run.processes=3",), 1),
        ({"cores": 8}, {"ACCELERATE_MIXED_PRECISION": "no"}, ("run.processes=3",), 1),
        ({"cores": 8}, {"WORLD_SIZE": "2", "LLAMACHAT_PROCESSES": "2"}, (), 1),
        ({"cards": ("0",)}, {}, ("run.processes=3",), 1),
        ({"cores": 8}, {}, ("steps=[rm/safety, rm/helpfulness]",), 1),  # side by side; nothing runs alone
    ],
)
def test_as_many_processes_divide_a_step_that_runs_alone(
    place: dict[str, Any],
    environment: dict[str, str],
    overrides: tuple[str, ...],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_machine(monkeypatch, **place)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = tiny(*overrides, tmp_path=tmp_path)
    assert side_by_side.processes(recipe, side_by_side.side_by_side(recipe, recipe.steps)) == count


def test_a_wide_base_is_divided_as_far_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wide").mkdir()
    config = Path("assets/base/config.json").read_text().replace('"hidden_size": 256', '"hidden_size": 1024')
    (tmp_path / "wide" / "config.json").write_text(config)
    recipe = tiny(f"base.model={tmp_path}/wide", "steps=[sft, rs]", tmp_path=tmp_path)
    for memory, count in ((64, 4), (20, 3), (10, 1)):  # steps of 5 GiB, in three quarters of it
        set_machine(monkeypatch, memory=memory)
        assert side_by_side.processes(recipe, side_by_side.side_by_side(recipe, recipe.steps)) == count


def test_steps_of_unknown_size_and_steps_on_one_server_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "estimate_step", lambda recipe, step: None)
    assert models(tiny(tmp_path=tmp_path)).jobs == 1
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    set_machine(monkeypatch)
    steps = ["sft", "rm/safety", {"gatt": {"ranks_by_reward": False}}]
    served = {"engine": "vllm", "server": "http://localhost:8000"}
    recipe = tiny(f"steps={steps}", f"rollout={served}", tmp_path=tmp_path)
    assert [group.jobs for group in side_by_side.side_by_side(recipe, recipe.steps)] == [1, 1, 1]


def test_without_anything_side_by_side_the_order_is_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("steps=[rm/helpfulness, gatt, rm/safety]", "gatt.ranks_by_reward=false", tmp_path=tmp_path)
    set_machine(monkeypatch, cores=1)
    groups = side_by_side.side_by_side(recipe, recipe.steps)
    assert [[step.name for step in group.steps] for group in groups] == [["rm/helpfulness"], ["gatt"], ["rm/safety"]]


def test_wall_time_by_hand(tmp_path: Path) -> None:
    recipe = tiny(tmp_path=tmp_path)
    group = Group(tuple(recipe.steps[1:4]), 2, 1)
    seconds = {"sft": 10.0, "rm/helpfulness": 50.0, "rm/safety": 20.0, "rm/judge": 40.0}
    # The judge begins when the safety model has ended: 20 + 40.
    assert side_by_side.wall_seconds(recipe, [Group(recipe.steps[:1]), group], seconds) == 10 + 60
    # A wide model on half of the cores takes twice as long; on a card of its own it does not.
    (tmp_path / "wide").mkdir()
    config = Path("assets/base/config.json").read_text().replace('"hidden_size": 256', '"hidden_size": 1024')
    (tmp_path / "wide" / "config.json").write_text(config)
    wide = tiny(f"base.model={tmp_path}/wide", tmp_path=tmp_path)
    assert side_by_side.wall_seconds(wide, [group], seconds) == 120
    assert side_by_side.wall_seconds(wide, [Group(group.steps, 2, 1, ("0", "1"))], seconds) == 60


def test_the_plan_says_what_runs_side_by_side_and_how_long_the_whole_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, cores=2)
    recipe = tiny(tmp_path=tmp_path)
    text = plan_text(recipe, make_plan(recipe))
    assert "  side by side: rm/helpfulness, rm/safety, rm/judge, 3 at once with 1 thread each (run.jobs=auto)\n" in text
    assert "  so the whole run takes about " in text
    text = plan_text(recipe, make_plan(recipe), hours=0.001)
    assert "OVER 0.001 h" in text
    alone = tiny("run.jobs=1", tmp_path=tmp_path)
    assert "side by side" not in plan_text(alone, make_plan(alone))
    # Times on planned cards are those of all cards together: the cores of this machine do not count.
    carded = tiny("run.gpu=2x rtx-3090", tmp_path=tmp_path)
    text = plan_text(carded, make_plan(carded), hours=1)
    assert "side by side" not in text and "the whole run" not in text and text.count("TFLOP/s") == 1


def test_the_cards_that_a_command_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert hardware.visible_cards() == ["2", "5"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert hardware.visible_cards() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(hardware, "_output", lambda command: "A, 81559, 80000, 550.1\nB, 81559, 80000, 550.1\n")
    assert hardware.visible_cards() == ["0", "1"]
