"""The reference of keys: the committed page and schema are those of the code, and the schema accepts what a recipe may be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llamachat.config.loading import parse_mapping
from llamachat.config.section import all_keys
from pipelines.recipe.recipe import RecipeSections
from pipelines.recipe.reference import PAGE, SCHEMA, page, recipe_schema

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_page_and_schema_are_those_of_the_code() -> None:
    remedy = "run `python -m pipelines.recipe.reference`"
    assert PAGE.read_text(encoding="utf-8") == page(), remedy
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == recipe_schema(), remedy


def test_the_page_has_every_key_once_with_a_default_and_its_origin() -> None:
    rows, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\w+)$|### A source", line):
            section = heading[1] or "a source"
        elif row := re.match(r"\| `([\w.]+)` \| (.+) \| (.*) \| (.+) \| (.+) \|$", line):
            rows.append((f"{section}.{row[1]}", row[2], row[3], row[5]))
    keys = [key for key, *_ in rows]
    assert len(keys) == len(set(keys))
    assert {key for key in all_keys(RecipeSections) if "." in key} <= set(keys)
    table = {key: rest for key, *rest in rows}
    assert table["sft.learning_rate"] == ["number > 0", "`2e-05`", "paper"]
    assert table["ppo.gae_lambda"] == ["number >= 0 and <= 1", "`0.95`", "ours"]
    assert table["dpo.beta"] == ["number > 0", "`0.1`", "Rafailov et al. 2023"]
    assert table["tracking.save_every"] == ["integer >= 1", "`50`", "ours, operational"]
    assert table["run.dir"] == ["text", "required", "ours, operational"]
    assert [key for key, value, default, _ in rows if not default and not value.startswith("keys below")] == []


def faults(recipe: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: extra `test`")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return [error.json_path for error in validator.iter_errors(recipe)]


def test_the_schema_accepts_every_bundled_recipe() -> None:
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(recipes) > 10
    assert {path.name: faults(parse_mapping(path.read_text(), path.name)[0]) for path in recipes} == {
        path.name: [] for path in recipes
    }


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ({"sft": {"epoch": 1}}, "$.sft"),
        ({"ppo": {"clip_range": 1.5}}, "$.ppo.clip_range"),
        ({"tuning": {"method": "lore"}}, "$.tuning.method"),
        ({"data": {"sft": [{"format": "native"}]}}, "$.data.sft[0]"),
        ({"steps": ["sfd"]}, "$.steps[0]"),
        ({"steps": [{"sft": {"kl_coef": 1}}]}, "$.steps[0]"),
        ({"steps": [{"rm/safety": {"only": ["judge"]}}]}, "$.steps[0]"),
        ({"steps": [{"sft": {}, "rm": {}}]}, "$.steps[0]"),
        ({"trainig": {}}, "$"),
    ],
)
def test_the_schema_refuses_what_a_recipe_may_not_be(recipe: dict[str, Any], place: str) -> None:
    assert faults(recipe) == [place]
