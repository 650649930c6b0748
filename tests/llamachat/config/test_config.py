"""Configuration: what loads, what is refused and in which words, which keys are part of a step's identity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from llamachat.config.loading import load_recipe, parse_value, to_yaml
from llamachat.config.optimizer import TrainerArguments, owned_arguments
from llamachat.config.section import Section, identity, operational
from llamachat.config.sections import Base, Data, Rollout, Run, Tracking, Tuning, near_path
from llamachat.errors import ConfigError
from tests.recipes import recipe_values, write_base, write_yaml


class Stage(Section):
    learning_rate: float = Field(default=2e-5, gt=0, description="Peak rate.")
    epochs: int = Field(default=2, ge=1, le=9, description="Passes over the data.")
    rows_per_microbatch: int = operational(8, multiple_of=2, description="Rows in a forward pass.")
    trainer: Annotated[dict[str, Any], TrainerArguments("SFTConfig", owned_arguments("sft") | {"optim": None})] = Field(
        default={}, description="Further arguments."
    )


class Root(Section):
    run: Run = Field(description="The run.")
    base: Base = Field(description="The base.")
    tuning: Tuning = Field(default=Tuning(), description="Tuning.")
    data: Data = Field(description="The data.")
    sft: Stage = Field(default=Stage(), description="The stage.")
    rollout: Rollout = Field(default=Rollout(), description="Sampling.")
    tracking: Tracking = Field(default=Tracking(), description="Tracking.")


def load(path: Path, overrides: Sequence[str] = ()) -> Root:
    return load_recipe(Root, path, overrides)


def report(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "r.yaml", recipe_values(tmp_path))


# -- what loads


def test_yaml_values_read_as_people_mean_them() -> None:
    cases = {
        "2e-4": 2e-4,
        "1e5": 1e5,
        ".5": 0.5,
        "-3": -3,
        "1_000": 1000,
        "010": 10,
        "off": "off",
        "no": "no",
        "true": True,
        "null": None,
        "": None,
        "1:30": "1:30",
        "2024-01-01": "2024-01-01",
        "[1, a]": [1, "a"],
        "{a: 2e-4}": {"a": 2e-4},
        "1e": "1e",
        "1.5.2": "1.5.2",
    }
    assert {text: parse_value(text) for text in cases} == cases


def test_the_resolved_recipe_loads_to_the_same(recipe: Path, tmp_path: Path) -> None:
    overrides = ["tracking.mode=off", "sft.learning_rate=2e-4", "tuning.targets=[q_proj]", "base.system='no: [tags]'"]
    loaded = load(recipe, overrides)
    (tmp_path / "again.yaml").write_text(to_yaml(loaded))
    assert load(tmp_path / "again.yaml") == loaded
    assert loaded.tracking.mode == "off" and loaded.tuning.targets == ("q_proj",)


def test_extends_merges_mappings_replaces_lists_and_the_nearest_file_wins(recipe: Path, tmp_path: Path) -> None:
    write_yaml(
        recipe, {**recipe_values(tmp_path), "sft": {"epochs": 3, "learning_rate": 0.5, "rows_per_microbatch": 4}}
    )
    write_yaml(tmp_path / "b" / "b.yaml", {"extends": "../r.yaml", "sft": {"epochs": 4, "learning_rate": 0.25}})
    values = {"extends": "b/b.yaml", "sft": {"epochs": 5}, "tuning": {"targets": ["q_proj"]}}
    loaded = load(write_yaml(tmp_path / "c.yaml", values))
    assert (loaded.sft.epochs, loaded.sft.learning_rate, loaded.sft.rows_per_microbatch) == (5, 0.25, 4)
    assert loaded.tuning.targets == ("q_proj",) and len(loaded.data.sft) == 1


def test_files_that_extend_each_other_in_a_circle_are_named(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "b")):
        write_yaml(tmp_path / f"{name}.yaml", {"extends": f"{parent}.yaml"})
    circle = f"{tmp_path}/b.yaml -> {tmp_path}/c.yaml -> {tmp_path}/b.yaml"
    assert f"{tmp_path}/c.yaml: extends: these files extend each other in a circle: {circle}." in report(
        tmp_path / "a.yaml"
    )


def test_overrides_reach_list_items_and_new_keys(recipe: Path) -> None:
    assert load(recipe, ["sft.learning_rate=1"]).sft.learning_rate == 1.0
    loaded = load(recipe, ["data.sft.0.limit=5", "data.split.test=0.1", "base.rope_scaling={type: linear, factor: 2}"])
    assert loaded.data.sft[0].limit == 5 and loaded.data.split.test == 0.1
    assert loaded.base.rope_scaling is not None and loaded.base.rope_scaling.factor == 2.0
    assert "data.sft" in report(recipe, [f"data.sft.{'9' * 5000}.limit=5"]), "more digits than Python converts"


def test_a_hub_name_is_no_missing_file(recipe: Path) -> None:
    names = ["base.model=TinyLlama/TinyLlama-1.1B", "data.sft.0.path=OpenAssistant/oasst2/default:train[:90%]"]
    loaded = load(recipe, names)
    assert loaded.base.model == "TinyLlama/TinyLlama-1.1B"
    assert loaded.data.sft[0].path == "OpenAssistant/oasst2/default:train[:90%]"
    assert "the data file 'a/b/c.jsonl:train' does not exist" in report(recipe, ["data.sft.0.path=a/b/c.jsonl:train"])


# -- what is refused


def test_unknown_key_wrong_type_and_missing_file_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "dialogs.jsonl").write_text("")
    values = {
        "run": {"dir": "runs/x"},
        "base": {"model": str(write_base(tmp_path / "base"))},
        "sft": {"learning_rte": 1},
        "data": {"sft": [{"path": str(tmp_path / "dialog.jsonl")}]},
    }
    path = write_yaml(tmp_path / "r.yaml", values)
    text = report(path, ["sft.epochs=two"])
    assert text.startswith("The configuration has 3 problems:")
    assert f"{path}: sft.learning_rte: unknown key. Did you mean 'learning_rate'?" in text
    assert (
        "command line: sft.epochs: found the text 'two', but a whole number is required. Passes over the data." in text
    )
    assert f"{path}: data.sft.0.path: the data file '{tmp_path}/dialog.jsonl' does not exist." in text
    assert f"Did you mean '{tmp_path}/dialogs.jsonl'?" in text


REFUSED = [
    ("sft.epochs=0", "sft.epochs: found the number 0, but a number of at least 1 is required"),
    ("sft.epochs=10", "sft.epochs: found the number 10, but a number of at most 9 is required"),
    ("sft.epochs=1.5", "sft.epochs: found the number 1.5, but a whole number is required"),
    ("sft.epochs=true", "sft.epochs: found true, but a whole number is required"),
    ("sft.learning_rate=0", "sft.learning_rate: found the number 0, but a number above 0 is required"),
    ("sft.learning_rate='1'", "sft.learning_rate: found the text '1', but a number is required"),
    ("sft.learning_rate=", "sft.learning_rate: found nothing (null), but a number is required"),
    ("sft.learning_rate=1e999", "sft.learning_rate: found the number inf, but a finite number is required"),
    ("sft.rows_per_microbatch=3", "found the number 3, but a multiple of 2 is required"),
    ("sft=3", "sft: found the number 3, but a mapping of keys is required"),
    ("data.sft=x", "data.sft: found the text 'x', but a list is required"),
    ("data.sft.0.weight=[]", "data.sft.0.weight: found an empty list, but a number is required"),
    ("data.sft.0.columns=[a]", "data.sft.0.columns: found a list of length 1, but a mapping is required"),
    ("data.split.judge=0.95", "data.split: test, validation and judge add up to 1.02"),
    ("base.dtype=bfloat17", "found the text 'bfloat17', but 'bfloat16', 'float16' or 'float32' is required. Did you"),
    ("base.rope_scaling={factor: 2}", "base.rope_scaling.type: missing, but required."),
    ("base.rope_scaling={type: linear, factor: 1}", "base.rope_scaling.factor: found the number 1, but a number above"),
    ("tuning.method=qlor", "found the text 'qlor', but 'full', 'lora' or 'qlora' is required. Did you mean 'qlora'"),
    ("run.gpu=rtx-9090", "run.gpu: 'rtx-9090' is not a known card."),
    ("run.gpu=0GiB", "run.gpu: '0GiB' is not a known card."),
    ("tracking.tensorboard=1", "tracking.tensorboard: found the number 1, but true or false is required"),
    ("tracking.project=''", "tracking.project: found the text '', but text of at least 1 characters is required"),
    ("rollout.cache_gib=aut", "found the text 'aut', but a number or 'auto' is required. Did you mean 'auto'?"),
    ("rollout.engine=vllm", "rollout: engine is vllm, but there is no server."),
    ("rollout.server=http://localhost:8000", "rollout: server is http://localhost:8000, but engine is auto,"),
    ("rollout.server_gib=20", "rollout: server_gib is 20, but engine is auto, which uses no server."),
    ("rollout={engine: vllm, server: 'localhost:8000'}", "server is 'localhost:8000', but must be http://host:port"),
    ("rollout={engine: vllm, server: 'http://host:8000/v1'}", "server is 'http://host:8000/v1', but must be"),
    ("sft.rank=3", "sft.rank: unknown key. Did you mean 'tuning.rank'?"),
    ("sft.zzz=3", "sft.zzz: unknown key. Known here: learning_rate, epochs, rows_per_microbatch, trainer."),
    ("data.sft.0.wieght=3", "data.sft.0.wieght: unknown key. Did you mean 'weight'?"),
    (
        "data.sft.3.limit=3",
        "command line: data.sft.3.limit: 'data.sft' is a list with indices 0 to 0; '3' is not an index of it.",
    ),
    ("base.model.x=3", "command line: base.model.x: 'base.model' is the text"),
    ("sft.epochs", "command line: 'sft.epochs' is not an override. Write section.key=value"),
    ("sft..epochs=3", "command line: 'sft..epochs=3' is not an override."),
    ("sft.epochs=[1", "command line: sft.epochs: the value is not valid YAML:"),
    ("extends=other.yaml", "command line: extends: a file says what it extends."),
    (
        "sft.trainer.max_steps=3",
        "sft.trainer.max_steps: this argument of TRL is set by a key of the recipe. Set 'sft.epochs' instead.",
    ),
    ("sft.trainer.seed=3", "Set 'run.seed' instead."),
    ("sft.trainer.optim=sgd", "sft.trainer.optim: llamachat sets this argument of TRL itself."),
    ("sft.trainer.neftune_noise=3", "has no argument of this name. Did you mean 'neftune_noise_alpha'?"),
    ("sft.trainer.sed=3", "has no argument of this name. Did you mean 'run.seed'?"),
    ("sft.trainer.zzz=3", "has no argument of this name. The names are those of the installed TRL."),
]


@pytest.mark.parametrize(("override", "expected"), REFUSED)
def test_a_bad_value_is_reported_with_what_is_required(recipe: Path, override: str, expected: str) -> None:
    assert expected in report(recipe, [override])


def test_required_keys_have_no_default(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "r.yaml", {"data": {}})
    text = report(path)
    for key in ("run.dir", "base.model", "data.sft"):
        assert f"{path}: {key}: missing, but required." in text
    assert "pass data.sft=VALUE on the command line" in text
    assert text.startswith("The configuration has 3 problems:")


def test_missing_paths_are_reported_with_the_nearest_ones(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_text("")
    cases = {
        "base.model=bse": "the model folder 'bse' does not exist. Did you mean 'base'?",
        "base.model=./elsewhere/else/model": "does not exist. Write the path of an existing one",
        "base.model=assets/base": "run the command there, or write the full path.",
        "base.model=empty": "the folder 'empty' has no config.json",
        "base.model=base/config.json": "'base/config.json' is a file, but a model is a folder",
        "base.policy=emty": "the policy folder 'emty' does not exist. Did you mean 'empty'?",
        "data.sft.0.path=dat/chat.jsonl": "the data file 'dat/chat.jsonl' does not exist. Did you mean 'data/chats.jsonl'?",
        "data.sft.0.path=data/chat": "the data file 'data/chat' does not exist.",
        "data.sft.0.path=data": "'data' is a folder, but records are read from a file.",
        f"data.sft.0.path={'x' * 300}.jsonl": "data.sft.0.path: it cannot be opened (File name too long)",
    }
    for override, expected in cases.items():
        assert expected in report(recipe, [override]), override
    (tmp_path / "datas").write_text("")  # a file of a similar name is named, and nothing in it is looked for
    assert near_path(str(tmp_path / "datass" / "chats.jsonl")) == str(tmp_path / "datas")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    cases: dict[bytes, str] = {
        b"run: [1\nbase: 2": f"{path}: invalid YAML: expected ',' or ']', but got ':' in line 2",
        b"- run": f"{path}: the file contains a list, but a recipe is a mapping",
        b"text": f"{path}: the file contains a single value",
        b"run: \xff": f"{path}: the recipe '{path}' cannot be read: it is not UTF-8 text.",
        b"? [a, b]\n: 1": f"{path}: invalid YAML: found unhashable key",
        b"run: {dir: a, seed: 1, dir: b}": f"{path}: run.dir: written twice, in lines 1 and 1.",
        b"data: {sft: [{path: a,\n path: b}]}": f"{path}: data.sft.0.path: written twice, in lines 1 and 2.",
    }
    for content, expected in cases.items():
        path.write_bytes(content)
        assert expected in report(path), content


def test_a_missing_recipe_or_parent_names_the_nearest(recipe: Path, tmp_path: Path) -> None:
    assert f"does not exist. Did you mean '{recipe}'?" in report(tmp_path / "rr.yaml")
    assert "does not exist. Recipes are in configs/." in report(tmp_path / "quite_another_name.yml")
    assert "cannot be read: Is a directory" in report(tmp_path)
    lost = write_yaml(tmp_path / "d.yaml", {"extends": "rr.yaml"})
    assert f"{lost}: extends: the recipe '{tmp_path}/rr.yaml' does not exist. Did you mean '{recipe}'?" in report(lost)
    assert "extends: found a list of length 1, but 'extends' must be the path of a recipe" in report(
        write_yaml(tmp_path / "e.yaml", {"extends": ["r.yaml"]})
    )


def test_a_problem_names_the_file_that_the_value_came_from(recipe: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path)
    write_yaml(recipe, {**values, "sft": {"epochs": 0, "learning_rate": 0}})
    child = write_yaml(tmp_path / "child.yaml", {"extends": "r.yaml", "sft": {"learning_rate": -1}})
    text = report(child, ["run.seed=-1"])
    assert f"{recipe}: sft.epochs:" in text
    assert f"{child}: sft.learning_rate:" in text
    assert "command line: run.seed:" in text


# -- identity


def test_identity_leaves_out_operational_keys_at_any_depth(recipe: Path) -> None:
    keys = identity(load(recipe))
    assert keys["run"] == {"seed": 0} and keys["tracking"] == {}
    assert keys["sft"] == {"learning_rate": 2e-5, "epochs": 2, "trainer": {}}
    assert keys["rollout"] == {"temperature": 1.0, "top_p": 1.0, "top_k": None, "max_new_tokens": 512}
    assert "allow_unproved_tokenizer" not in keys["base"] and keys["base"]["rope_scaling"] is None
    assert keys["data"]["sft"][0]["weight"] == 1.0 and keys["data"]["split"]["test"] == 0.05


# -- paths


def test_the_home_folder_is_read_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = recipe_values(tmp_path, run={"dir": "~/runs/x"}, base={"model": "~/base"})
    values["data"]["sft"] = [{"path": "~/dialogs.jsonl"}]
    write_yaml(tmp_path / "home.yaml", values)
    loaded = load(write_yaml(tmp_path / "child" / "r.yaml", {"extends": "~/home.yaml"}))
    assert loaded.run.dir == f"{tmp_path}/runs/x" and loaded.base.model == f"{tmp_path}/base"
    assert loaded.data.sft[0].path == f"{tmp_path}/dialogs.jsonl" and "~" not in to_yaml(loaded)
    problem = report(tmp_path / "home.yaml", ["data.sft.0.path=~/dialog.jsonl"])
    assert f"does not exist. Did you mean '{tmp_path}/dialogs.jsonl'?" in problem


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nobody-of-this-name/x", "no home folder is known for '~nobody-of-this-name'"),
        ('"a\\0b"', "U+0000, which is not a valid character"),
        ("runs/\udcff", "U+DCFF"),
    ],
)
def test_a_path_that_no_folder_can_have_is_refused(recipe: Path, path: str, words: str) -> None:
    problem = report(recipe, [f"run.dir={path}"])
    assert "command line: run.dir: " in problem and words in problem
