"""The reference of a recipe's keys, generated from the schema: `docs/configuration.md` for readers,
`configs/recipe.schema.json` for editors. `python -m pipelines.recipe.reference` writes both; a test compares the
committed files with its output.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.recipe.recipe import RecipeSections, StepEntry
from pipelines.recipe.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGE, SCHEMA = ROOT / "docs" / "configuration.md", ROOT / "configs" / "recipe.schema.json"
LONGEST_DEFAULT = 110  # characters; a longer default is replaced by its number of values

Schema = Mapping[str, Any]

_INTRODUCTION = """\
# Configuration

One YAML file is one recipe. Every key is listed below: meaning, unit, default, and the source of the default. Generated
from the schema by `python -m pipelines.recipe.reference`; do not edit.

    extends: tiny.yaml                     # start from another recipe (path relative to this file)
    run: {dir: runs/mine}                  # a section with one key
    steps: [sft, {rm: {epochs: 2}}, ppo]   # the steps to run, in order; rm with its own epochs

On the command line `ppo.kl_coef=0.1` overrides a value, `data.sft.0.limit=500` a value of the first source, and
`llamachat sft --dry-run` prints every key with its value. How steps, sections, files and the command line
override one another: [runs.md](runs.md#steps-and-their-values).

An editor with YAML support completes and checks keys against `configs/recipe.schema.json`. For VS Code with the extension
redhat.vscode-yaml add to `.vscode/settings.json`:

    {"yaml.schemas": {"configs/recipe.schema.json": ["configs/*.yaml", "my/*.yaml"]}}

or start a recipe with `# yaml-language-server: $schema=PATH/configs/recipe.schema.json`.

In the tables, *paper* means that the default is stated in the Llama 2 paper (arXiv:2307.09288), *ours* that it is not. A
key marked *operational* changes speed, memory or records but not the result: it is not part of a step's
[fingerprint](runs.md#fingerprint-is-it-the-same-work). Presets in `configs/` explain the values that they set.
"""


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe's file. Nothing is required, since a file may extend another one."""
    schema = RecipeSections.model_json_schema()
    definitions = schema["$defs"]
    for part in (schema, definitions["Base"], definitions["Data"]):
        part.pop("required", None)
    for field in schema["properties"].values():
        if "$ref" in field:
            field.pop("default", None)
    definitions["StepEntry"] = _step_schema(schema)
    extends = {"description": "The recipe that this one starts from (path relative to this file).", "type": "string"}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of llamachat"}


def _step_schema(schema: Schema) -> dict[str, Any]:
    """An entry of `steps`: a step, or a mapping of one step to overrides of its section, tuning, rollout and
    scoring."""
    entries = {}
    for head, field in StepEntry.form.model_fields.items():
        section = schema["properties"][STAGES[head.partition("/")[0]].section]["$ref"]
        known = _definition(schema, section)["properties"]
        own = {
            "name": {"type": "string", "description": "Folder of the step in the run."},
            "only": {"type": "array", "items": {"enum": list(STAGES[head.partition("/")[0]].models)}},
            "tuning": {"$ref": "#/$defs/Tuning"},
            "rollout": {"$ref": "#/$defs/Rollout"},
            "scoring": {"$ref": "#/$defs/Scoring"},
        }
        keys = getattr(field.annotation, "model_fields", ())
        properties = {key: {"$ref": f"{section}/properties/{key}"} if key in known else own[key] for key in keys}
        entries[head] = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    one = {"type": "object", "properties": entries, "additionalProperties": False, "minProperties": 1}
    return {"anyOf": [{"enum": list(entries)}, {**one, "maxProperties": 1}]}


def _definition(schema: Schema, reference: str) -> dict[str, Any]:
    return schema["$defs"][reference.rpartition("/")[2]]


def page() -> str:
    """The reference as Markdown, with a table for each section."""
    schema = RecipeSections.model_json_schema()
    texts = [_INTRODUCTION]
    for name, field in schema["properties"].items():
        section = _definition(schema, field["$ref"]) if "$ref" in field else field
        text = f"## {name}\n\n{field.get('description', section['description'])}\n"
        if "$ref" in field:
            text += _table(_rows(schema, section))
        else:
            heads = ", ".join(f"`{head}`" for head in StepEntry.form.model_fields)
            text += f"\nSteps: {heads}. Default: `{json.dumps(field['default'])}`.\n"
        texts.append(text)
        if name == "data":
            rows = _table(_rows(schema, schema["$defs"]["DataSource"]))
            texts.append(f"### A source of data\n\nAn entry of each list of `data`.\n{rows}")
    return "\n".join(texts)


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| key | value | default | meaning | default from |", "|---|---|---|---|---|"]
    return "\n" + "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _rows(schema: Schema, section: Schema, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Key, allowed values, default, meaning, source of the default; keys of nested sections are dotted."""
    for name, field in section["properties"].items():
        below = [part["$ref"] for part in (field, *field.get("anyOf", ())) if "$ref" in part]
        meaning = field.get("description") or _definition(schema, below[0])["description"]
        origin = f"{_origin(meaning)}{', operational' if field.get('operational') else ''}"
        if below:
            default = "`null`" if field.get("default", {}) is None else ""
            nullable = "keys below, or null" if "anyOf" in field else "keys below"
            yield f"`{prefix}{name}`", nullable, default, meaning, origin
            yield from _rows(schema, _definition(schema, below[0]), f"{prefix}{name}.")
        else:
            default = "required" if name in section.get("required", ()) else _default(field)
            yield f"`{prefix}{name}`", _values(field), default, meaning, origin


def _origin(meaning: str) -> str:
    if re.search(r"\b[Oo]urs\b|Not in the paper", meaning):
        return "ours"
    if re.search(r"\bPaper\b|Llama 2|, the paper's\)|\(the paper's\)", meaning):
        return "paper"
    return "Rafailov et al. 2023" if "Rafailov" in meaning else "ours"


def _default(field: Schema) -> str:
    if "default" not in field:  # set by a factory
        return "all" if "items" in field else "`{}`"
    value = field["default"]
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else f"{len(value)} values"


_NAMES = {"string": "text", "boolean": "true or false", "null": "null", "object": "mapping"}


def _values(field: Schema) -> str:
    """The allowed values of a key, as text."""
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind in ("number", "integer"):
        bounds = [
            f"{sign} {field[key]:.12g}"
            for key, sign in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if key in field
        ]
        return " ".join([kind, " and ".join(bounds)]).strip()
    if kind == "array":
        items = field.get("items", {})
        return "list of sources" if "$ref" in items else f"list of: {_values(items)}"
    return _NAMES.get(str(kind), "any")


def write() -> None:
    """Write the page and the schema."""
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(recipe_schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
