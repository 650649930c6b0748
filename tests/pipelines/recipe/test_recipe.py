"""The recipe: its list of steps, what a step may override, what is refused, and every recipe of configs/."""

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamachat.config.loading import to_yaml
from llamachat.config.section import Section, all_keys
from llamachat.errors import ConfigError
from llamachat.runs.fingerprints import changed_values
from pipelines.recipe.recipe import RecipeSections, load, step_identity
from reward.config import OWNED as REWARD_OWNED
from reward.config import Config as RewardConfig
from sft.config import OWNED
from sft.config import Config as SftConfig
from tests.ppo.tiny_ppo import write_function, write_prompts
from tests.recipes import preference_data, write_recipe, write_yaml

REPOSITORY = Path(__file__).resolve().parents[3]


def report(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_every_recipe_of_the_repository_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    paths = sorted(Path("configs").glob("*.yaml"))
    assert {"configs/smoke.yaml", "configs/tiny.yaml"} <= {str(path) for path in paths} and len(paths) == 12
    for path in paths:
        # The base of these is fetched by a command, and need not be here.
        recipe = load(path, ["base.model=assets/base"] if path.stem.startswith("smollm2-") else [])
        assert recipe.steps
        assert recipe.run.dir == f"runs/{path.stem}"


def test_a_step_overrides_its_section_and_tuning(tmp_path: Path) -> None:
    entry = {"name": "sft-2", "epochs": 1, "trainer": {"neftune_noise_alpha": 5}, "tuning": {"method": "lora"}}
    path = write_recipe(
        tmp_path,
        steps=["sft", {"sft": entry}],
        sft={"epochs": 3, "learning_rate": 0.5, "trainer": {"torch_compile": False}},
        tuning={"rank": 8},
    )
    first, second = load(path, ["steps.1.sft.learning_rate=1e-4"]).steps
    assert isinstance(first.config, SftConfig) and isinstance(second.config, SftConfig)
    assert (first.name, first.config.epochs, first.tuning.method) == ("sft", 3, "full")
    assert (second.name, second.config.epochs, second.config.learning_rate) == ("sft-2", 1, 1e-4)
    assert second.config.trainer == {"torch_compile": False, "neftune_noise_alpha": 5}
    assert (second.tuning.method, second.tuning.rank) == ("lora", 8)


def test_a_step_samples_in_its_own_way_and_that_is_part_of_what_it_is(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        data=preference_data(tmp_path) | {"prompts": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", 8))}]},
        steps=["sft", {"rs": {"prompts": 4, "rollout": {"temperature": 0.7}}}, "ppo"],
        rollout={"max_new_tokens": 9},
    )
    recipe = load(path)
    _, rs, ppo = recipe.steps
    assert (rs.rollout.temperature, rs.rollout.max_new_tokens) == (0.7, 9)
    assert (ppo.rollout.temperature, ppo.rollout.max_new_tokens) == (1.0, 9)
    temperatures = [step_identity(recipe, step, {})["rollout"]["temperature"] for step in (rs, ppo)]
    assert temperatures == [0.7, 1.0]
    over = [step.rollout.temperature for step in load(path, ["rollout.temperature=0.5"]).steps[1:]]
    assert over == [0.5, 0.5]


def test_a_step_scores_in_its_own_way_and_other_steps_stay_what_they_are(tmp_path: Path) -> None:
    function = write_function(tmp_path / "rewards.py")
    data = {"sft": [], "prompts": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", 8))}]}
    own = {"ppo": {"scoring": {"combine": function}}}

    def scored(*steps: Any, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
        path = write_recipe(tmp_path, data=data, steps=list(steps), scoring={"shaping": "whiten"})
        recipe = load(path, overrides)
        return [step_identity(recipe, step, {}) for step in recipe.steps]

    (rs, ppo), (rs_beside, ppo_of_its_own) = scored("rs", "ppo"), scored("rs", own)
    assert rs_beside == rs
    assert [key for key, *_ in changed_values(ppo, ppo_of_its_own)] == ["scoring.combine"]
    digest = hashlib.sha256((tmp_path / "rewards.py").read_bytes()).hexdigest()
    assert ppo_of_its_own["scoring"] == ppo["scoring"] | {"combine": f"{digest}:score"}
    # The command line goes over the file, also over what the file says for one step alone.
    over = scored("rs", own, overrides=["scoring.combine=single"])
    assert [each["scoring"]["combine"] for each in over] == ["single", "single"]


def names(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    return [step.name for step in load(path, overrides).steps]


def test_rm_stands_for_the_models_that_the_data_allow(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=["rm"])
    assert names(path) == ["rm/helpfulness", "rm/safety", "rm/judge"]
    assert names(path, ["data.split.judge=0"]) == ["rm/helpfulness", "rm/safety"]
    assert names(path, ["data.safety=[]"]) == ["rm/helpfulness", "rm/judge"]
    assert names(path, ["data.helpfulness=[]"]) == ["rm/safety", "rm/judge"]
    assert names(path, ["steps=[{rm: {only: [safety, helpfulness]}}]"]) == ["rm/helpfulness", "rm/safety"]
    assert names(path, ["steps=[rm/safety, {rm: {only: [safety], name: rm-2}}]"]) == ["rm/safety", "rm-2/safety"]
    assert "data.split.judge: 0, but the step 'rm/judge' learns" in report(
        path, ["steps=[rm/judge]", "data.split.judge=0"]
    )
    twice = report(path, ["steps=[rm, {rm/judge: {epochs: 2}}]"])
    assert (
        "steps.1.rm/judge.name: the step 0 already has the name 'rm/judge'. Name this one: {rm/judge: {name: rm-2}}."
        in twice
    )


def test_each_model_has_its_own_values(tmp_path: Path) -> None:
    steps = [
        "rm/helpfulness",
        {"rm/safety": {"epochs": 2, "tuning": {"rank": 4}}},
        {"rm": {"only": ["judge"], "epochs": 5}},
    ]
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=steps, reward={"learning_rate": 0.5})
    loaded = load(path).steps
    configs = [step.config for step in loaded]
    assert [config.epochs for config in configs if isinstance(config, RewardConfig)] == [1, 2, 5]
    assert [config.learning_rate for config in configs if isinstance(config, RewardConfig)] == [0.5] * 3
    assert [step.tuning.rank for step in loaded] == [64, 4, 64]


STEPS_WITH_VALUES = [
    {"sft": {"epochs": 5, "learning_rate": 0.5, "tuning": {"method": "full", "rank": 8}}},
    {"rm/safety": {"epochs": 2, "center_rewards_coefficient": 0.5, "trainer": {"torch_compile": False}}},
]


def test_the_command_line_goes_over_the_steps_own_values(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=STEPS_WITH_VALUES)
    overrides = [
        "tuning.method=qlora",
        "reward={epochs: 3, center_rewards_coefficient: null}",
        "sft.learning_rate=0.25",
    ]
    sft, safety = load(path, overrides).steps
    assert isinstance(sft.config, SftConfig) and isinstance(safety.config, RewardConfig)
    assert (sft.tuning.method, safety.tuning.method, sft.tuning.rank) == ("qlora", "qlora", 8)
    assert (sft.config.learning_rate, sft.config.epochs, safety.config.epochs) == (0.25, 5, 3)
    assert safety.config.center_rewards_coefficient is None and safety.config.trainer == {"torch_compile": False}
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(load(path, overrides).sections))
    assert load(resolved).steps == (sft, safety)


def test_a_step_named_on_the_command_line_goes_over_its_section_there(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=STEPS_WITH_VALUES)
    for overrides in (
        ["sft.epochs=7", "steps.0.sft.epochs=6"],
        ["steps=[{sft: {epochs: 6}}]", "sft.epochs=7"],
    ):
        config = load(path, overrides).steps[0].config
        assert isinstance(config, SftConfig) and config.epochs == 6, overrides


def test_a_file_does_not_go_over_the_steps_of_the_file_that_it_extends(tmp_path: Path) -> None:
    write_recipe(tmp_path, data=preference_data(tmp_path), steps=STEPS_WITH_VALUES)
    child = write_yaml(tmp_path / "child.yaml", {"extends": "recipe.yaml", "sft": {"epochs": 9}})
    config = load(child).steps[0].config
    assert isinstance(config, SftConfig) and config.epochs == 5


REFUSED_STEPS: list[tuple[Any, str]] = [
    ([], "steps: found an empty list"),
    ("sft", "steps: found the text 'sft', but a list is required."),
    (["smt"], "steps.0.smt: unknown step. Did you mean 'sft'?"),
    (
        ["qqq"],
        "steps.0.qqq: unknown step. Known here: sft, rm, rs, gatt, distill, dpo, ppo, eval, report, rm/helpfulness,",
    ),
    (["rm/saftey"], "steps.0.rm/saftey: unknown step. Did you mean 'rm/safety'?"),
    (["sft/mix"], "steps.0.sft/mix: unknown step. Did you mean"),
    ([3], "steps.0: found the number 3, but a step, or a mapping of one step to its values, is required"),
    ([{"sft": {}, "rm": {}}], "steps.0: an entry is one step, but this one has rm, sft."),
    ([{}], "steps.0: an entry is one step, but this one has none."),
    ([{"sft": 3}], "steps.0.sft: found the number 3, but a mapping of keys is required."),
    (["sft", "sft"], "steps.1.sft.name: the step 0 already has the name 'sft'. Name this one: {sft: {name: sft-2}}."),
    ([{"sft": {"name": "A b"}}], "steps.0.sft.name: 'A b' cannot be the name of a step's folder."),
    ([{"sft": {"name": "wandb"}}], "steps.0.sft.name: 'wandb' cannot be the name of a step's folder."),
    ([{"sft": {"name": 3}}], "steps.0.sft.name: found the number 3, but text is required."),
    ([{"sft": {"name": "ppo"}}], "steps.0.sft.name: 'ppo' is another command"),
    ([{"sft": {"epoch": 1}}], "steps.0.sft.epoch: unknown key. Did you mean 'epochs'?"),
    ([{"sft": {"epochs": -1}}], "steps.0.sft.epochs: found the number -1, but a number above 0 is required"),
    ([{"sft": {"trainer": {"sed": 1}}}], "steps.0.sft.trainer.sed: TRL's SFTConfig has no argument of this name."),
    ([{"sft": {"tuning": {"rnk": 1}}}], "steps.0.sft.tuning.rnk: unknown key. Did you mean 'rank'?"),
    ([{"sft": {"tuning": "lora"}}], "steps.0.sft.tuning: found the text 'lora', but a mapping of keys is required."),
    ([{"rs": {"rollout": {"topp": 1}}}], "steps.0.rs.rollout.topp: unknown key. Did you mean 'top_p'?"),
    ([{"rs": {"rollout": {"engine": "vllm"}}}], "steps.0.rs.rollout: engine is vllm, but there is no server."),
    ([{"rs": {"sft": {"epoch": 1}}}], "steps.0.rs.sft.epoch: unknown key. Did you mean 'epochs'?"),
    ([{"sft": {"rollout": {"top_p": 0.9}}}], "steps.0.sft.rollout: 'sft' does not learn from sampled answers."),
    ([{"rs": {"scoring": {"combin": "single"}}}], "steps.0.rs.scoring.combin: unknown key. Did you mean 'combine'?"),
    (
        [{"rs": {"scoring": {"combine": "gone.py:score"}}}],
        "steps.0.rs.scoring.combine: the file of the reward function",
    ),
    ([{"sft": {"scoring": {"combine": "single"}}}], "steps.0.sft.scoring: 'sft' scores no answers."),
    (
        ["rm"],
        "steps.0: 'rm' has nothing to learn from. Add records under data.helpfulness or data.safety, or take rm",
    ),
    (
        ["rm/safety"],
        "data.safety: empty, but the step 'rm/safety' learns from it. Add records there, or take rm/safety",
    ),
    ([{"rm": {"only": ["judge"]}}], "data.helpfulness: empty, but the step 'rm/judge' learns from it."),
    ([{"rm": {"only": "safety"}}], "steps.0.rm.only: found the text 'safety', but a list is required."),
    ([{"rm": {"only": []}}], "steps.0.rm.only: found an empty list"),
    (
        [{"rm": {"only": ["safe"]}}],
        "steps.0.rm.only.0: found the text 'safe', but 'helpfulness', 'safety' or 'judge' is",
    ),
    ([{"rm/safety": {"only": ["safety"]}}], "steps.0.rm/safety.only: 'rm/safety' is a single step, so nothing"),
    ([{"sft": {"only": ["x"]}}], "steps.0.sft.only: 'sft' is a single step"),
]


@pytest.mark.parametrize(("steps", "expected"), REFUSED_STEPS)
def test_a_bad_step_is_reported_at_its_place(tmp_path: Path, steps: Any, expected: str) -> None:
    path = write_recipe(tmp_path, steps=steps)
    assert f"{path}: {expected}" in report(path)


def test_the_problems_of_all_steps_and_sections_are_reported_together(tmp_path: Path) -> None:
    steps = [
        "smt",
        {"sft": {"epoch": 1}},
        {"rm": {"only": ["safe"]}},
        {"rs": {"rollout": {"engine": "vllm"}}},
        "rm/judge",
    ]
    text = report(write_recipe(tmp_path, steps=steps, run={"dir": "run", "sed": 1}))
    places = (
        "run.sed",
        "steps.0.smt",
        "steps.1.sft.epoch",
        "steps.2.rm.only.0",
        "steps.3.rs.rollout",
        "data.helpfulness",
    )
    assert [place for place in places if f": {place}: " not in text] == []


def test_a_fault_of_a_section_is_reported_once_and_not_at_each_step(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, sft={"epochs": 0}, steps=["sft", {"sft": {"name": "sft-2", "learning_rate": 0.5}}])
    assert report(path).count("epochs") == 1


def test_runs_that_cannot_be(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "old").mkdir()
    cases = {
        f"run.parent={tmp_path}/odl": f"run.parent: the parent run '{tmp_path}/odl' does not exist. Did you mean",
        f"run.dir={path}": f"run.dir: '{path}' is a file, but a run is a folder.",
        "data.sft=[]": "data.sft: empty, but the step 'sft' learns from it.",
        "data.sft.0.format=alpca": "data.sft.0.format: unknown format 'alpca'. Did you mean 'alpaca'?",
        "data.sft.0.format=qqqq": "unknown format 'qqqq'. Known: auto, native, ",
    }
    for override, expected in cases.items():
        assert expected in report(path, [override]), override
    same = [f"run.dir={tmp_path}/old", f"run.parent={tmp_path}/old/../old"]
    assert "run.parent: this is run.dir itself" in report(path, same)
    assert load(path, ["data.sft.0.format=hh-rlhf"]).data.sft[0].format == "hh-rlhf"


def test_every_key_of_the_recipe_has_a_description() -> None:
    def undescribed(section: type[Section]) -> list[str]:
        below = [field.annotation for field in section.model_fields.values()]
        own = [f"{section.__name__}.{name}" for name, field in section.model_fields.items() if not field.description]
        sections = [each for each in below if isinstance(each, type) and issubclass(each, Section)]
        return [*own, *(key for each in sections for key in undescribed(each))]

    assert undescribed(RecipeSections) == []


def test_the_keys_that_own_trainer_arguments_exist() -> None:
    assert {key for key in (*OWNED.values(), *REWARD_OWNED.values()) if key is not None} <= set(
        all_keys(RecipeSections)
    )


def test_every_argument_that_sft_gives_to_trl_is_refused_in_its_trainer_key(tmp_path: Path) -> None:
    """Given twice, an argument would be a TypeError in the middle of a run."""
    tree = ast.parse((REPOSITORY / "llamachat" / "training" / "trainer.py").read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "trainer_arguments")
    (values,) = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
    arguments = [key.value for key in values.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    assert len(arguments) > 10
    text = report(write_recipe(tmp_path, sft={"trainer": dict.fromkeys(arguments, 1)}))
    assert [name for name in arguments if f"sft.trainer.{name}: " not in text] == []


def test_tiny_yaml_extends_nothing_and_smoke_extends_it() -> None:
    configs = REPOSITORY / "configs"
    assert "extends" not in yaml.safe_load((configs / "tiny.yaml").read_text())
    assert yaml.safe_load((configs / "smoke.yaml").read_text())["extends"] == "tiny.yaml"


def test_a_base_that_was_not_fetched_names_the_command_that_does(tmp_path: Path) -> None:
    text = report(Path("configs/smollm2-smoke.yaml"), [f"base.model={tmp_path}/smollm2-135m"])
    assert "llamachat base smollm2-135m" in text
