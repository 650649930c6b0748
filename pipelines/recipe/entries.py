"""The entries of a recipe's list of steps: what each stands for, what is wrong with it, and what goes over it.

An entry is a command (`sft`), one model of a command (`rm/safety`), or either with values: `{rm/safety: {epochs: 2}}`.
A command with several models stands for those that the recipe's data allow, or for those named by `only`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamachat.config.loading import COMMAND_LINE, Layers, merged
from llamachat.config.section import ConfigProblem, Key, Section, describe, dotted, nearest, section_problems
from llamachat.config.sections import Data, Rollout, Split, Tuning
from pipelines.recipe.stages import STAGES, Product, Stage

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TAKEN_NAMES = ("wandb", "lineage.json", "study.json", "study.md", "study.png")
_ABSENT = object()  # a value of the command line may be null
_SECTIONS = ("tuning", "rollout")  # of the whole recipe, which an entry may go over
_OF_THE_ENTRY = ("name", "only", *_SECTIONS)  # all else is of the stage's section


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the list, its form found right."""

    head: str  # as written: sft, rm, rm/safety
    stage: Stage
    values: Mapping[str, Any]

    @property
    def name(self) -> Any:
        """The folder of its step, or of its steps."""
        return self.values.get("name", self.stage.command)

    @property
    def named(self) -> tuple[str, ...]:
        """The models that it names; none where the data decide."""
        _, _, which = self.head.partition("/")
        return (which,) if which else tuple(self.values.get("only") or ())

    @property
    def own(self) -> dict[str, Any]:
        """Its values over the stage's section."""
        return {key: value for key, value in self.values.items() if key not in _OF_THE_ENTRY}

    @property
    def tuning(self) -> Any:
        """Its values over `tuning`."""
        return self.values.get("tuning", {})

    @property
    def rollout(self) -> Any:
        """Its values over `rollout`."""
        return self.values.get("rollout", {})

    def products(self, data: Mapping[str, Any]) -> list[Product]:
        """What it makes of these data, given as plain values."""
        if self.named:
            return [product for product in self.stage.products if product.makes.which in self.named]
        if not self.stage.models:
            return list(self.stage.products)
        return [product for product in self.stage.products if not any(_lacks(product, data))]

    def step_name(self, product: Product) -> str:
        """The step's name, which is its folder in the run."""
        return f"{self.name}/{product.makes.which}" if product.makes.which else self.name


def read_entry(entry: Any) -> Entry:
    """The meaning of an entry without problems."""
    head, values = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    return Entry(head, STAGES[head.partition("/")[0]], values or {})


def command_line_first(layers: Layers) -> None:
    """Take out of the steps of a file each value whose section has another one from the command line.

    Whoever writes `tuning.method=qlora` means every step; `steps.1.sft.epochs=1` still says one step's value.
    """
    steps = layers.values.get("steps")
    for index, item in enumerate(steps if isinstance(steps, list) else ()):
        if not isinstance(item, dict) or _entry_problem(item):
            continue
        entry, values = read_entry(item), next(iter(item.values()))
        for key, value in list(values.items()) if isinstance(values, dict) else ():
            if key not in ("name", "only"):
                section: Key = (key,) if key in _SECTIONS else (entry.stage.section, key)
                _yield_to_command_line(layers, values, (key, value), section, ("steps", index, entry.head, key))


def _yield_to_command_line(
    layers: Layers, holder: dict[str, Any], item: tuple[str, Any], section: Key, place: Key
) -> None:
    key, value = item
    given = _at(layers.values, section)
    if isinstance(value, dict) and isinstance(given, dict):
        for name, below in list(value.items()):
            _yield_to_command_line(layers, value, (name, below), (*section, name), (*place, name))
    elif given is not _ABSENT and layers.source(section) == COMMAND_LINE and layers.source(place) != COMMAND_LINE:
        del holder[key]


def _at(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part, _ABSENT) if isinstance(values, dict) else _ABSENT
    return values


def step_problems(layers: Layers, root: type[Section]) -> Iterator[ConfigProblem]:
    """Everything wrong with the list, and with what its stages tune with, each at its place; `root` is the whole recipe's
    schema."""
    for stage in STAGES.values():
        if stage.tunes:
            yield from _tuning_problems(layers, stage, root)
    steps = layers.values.get("steps", ["sft"])
    if not isinstance(steps, list):
        return  # the types say so already
    if not steps:
        yield ConfigProblem(
            layers.source(("steps",)), "steps", f"empty, so nothing would run. Known: {', '.join(STAGES)}."
        )
    data = layers.values.get("data")
    seen: dict[str, int] = {}
    for index, item in enumerate(steps):
        at: Key = ("steps", index)
        problem = _entry_problem(item)
        if problem:
            yield ConfigProblem(layers.source(at), dotted(at), problem)
            continue
        entry = read_entry(item)
        below: Key = (*at, entry.head)
        only_problem = _only_problem(entry)
        if only_problem:
            yield ConfigProblem(layers.source((*below, "only")), dotted((*below, "only")), only_problem)
            continue
        products = entry.products(data if isinstance(data, Mapping) else {})
        names = [entry.step_name(product) for product in products]
        name_problem = _name_problem(entry, names, seen)
        if name_problem:
            yield ConfigProblem(layers.source((*below, "name")), dotted((*below, "name")), name_problem)
        else:
            seen |= dict.fromkeys(names, index)
        yield from _override_problems(layers, entry, below, root)
        for key, text in _data_problems(entry, products, data, at):
            yield ConfigProblem(layers.source(key), dotted(key), text)


def _entry_problem(item: object) -> str | None:
    """What is wrong with the form of one entry of the list, if anything."""
    if isinstance(item, Mapping) and len(item) == 1:
        head, values = next(iter(item.items()))
        if values is not None and not isinstance(values, Mapping):
            return f"found {describe(values)} under '{head}', but a mapping is required: {{{head}: {{name: ...}}}}."
    elif isinstance(item, str):
        head = item
    else:
        return f"found {describe(item)}, but a command, or one command with its values, is required: {{sft: {{...}}}}."
    command, slash, which = head.partition("/")
    if command in STAGES and (not slash or which in STAGES[command].models):
        return None
    known = [*STAGES, *(f"{stage.command}/{model}" for stage in STAGES.values() for model in stage.models)]
    near = nearest(head, known)
    advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known)}."
    return f"there is no step '{head}'. {advice}"


def _only_problem(entry: Entry) -> str | None:
    """What is wrong with the models that the entry chooses, if anything."""
    if "only" not in entry.values:
        return None
    only, models = entry.values["only"], entry.stage.models
    if not models or "/" in entry.head:
        return f"'{entry.head}' is one step, of which nothing can be chosen. Remove it."
    example = f"{{{entry.head}: {{only: [{models[0]}]}}}}"
    if not isinstance(only, list) or not only:
        return f"found {describe(only)}, but a list of models is required: {example}."
    unknown = [model for model in only if model not in models]
    if unknown:
        return (
            f"found {describe(unknown[0])}, but the models of '{entry.head}' are {', '.join(models)}. Write {example}."
        )
    return None


def _name_problem(entry: Entry, names: list[str], seen: Mapping[str, int]) -> str | None:
    name, command = entry.name, entry.stage.command
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN_NAMES:
        found = "a name that the run folder needs" if name in _TAKEN_NAMES else describe(name)
        return f"found {found}, but the name of the step's folder is required: small letters, digits, '.', '-', '_'."
    if name != command and name in STAGES:
        return f"'{name}' is another command, and the step's folder would look like its work. Name it '{command}-2'."
    taken = next((full for full in names if full in seen), None)
    if taken is not None:
        heads = {full.partition("/")[0] for full in seen}
        free = next(f"{command}-{n}" for n in range(2, len(seen) + 3) if f"{command}-{n}" not in heads)
        return (
            f"the step {seen[taken]} has the name '{taken}' already. Name this one: {{{entry.head}: {{name: {free}}}}}."
        )
    return None


def _override_problems(layers: Layers, entry: Entry, at: Key, root: type[Section]) -> Iterator[ConfigProblem]:
    """Problems that a step's own values bring; those of the sections they go over are told there."""
    for schema, section, given, place in (
        (entry.stage.config, entry.stage.section, entry.own, at),
        (Tuning, "tuning", entry.tuning, (*at, "tuning")),
        (Rollout, "rollout", entry.rollout, (*at, "rollout")),
    ):
        if section == "rollout" and "rollout" in entry.values and "rollout" not in entry.stage.shared:
            yield ConfigProblem(
                layers.source(place), dotted(place), f"'{entry.head}' learns from no answers of its own. Remove it."
            )
            continue
        if not isinstance(given, Mapping):
            example = "method: lora" if section == "tuning" else "temperature: 0.7"
            text = f"found {describe(given)}, but a mapping is required: {{{example}}}."
            yield ConfigProblem(layers.source(place), dotted(place), text)
            continue
        below = layers.values.get(section)
        below = below if isinstance(below, Mapping) else {}
        before = section_problems(schema, below, source=layers.source, at=place, root=root)
        for problem in section_problems(schema, merged(below, given), source=layers.source, at=place, root=root):
            if problem not in before:
                yield problem
    if entry.stage.tunes:
        yield from _tuning_problems(layers, entry.stage, root, entry.own.get("sft"), (*at, "sft"))


def _tuning_problems(
    layers: Layers, stage: Stage, root: type[Section], given: object = None, at: Key = ()
) -> Iterator[ConfigProblem]:
    """Problems of the values that the stage's section puts over the section sft, or else of a step's `given` ones."""
    own: Key = (stage.section, "sft")
    below, over = _at(layers.values, ("sft",)), _at(layers.values, own)
    if at:
        below, over = merged(_mapping(below), _mapping(over)), given
    known, found = (
        section_problems(STAGES["sft"].config, values, source=layers.source, at=at or own, root=root)
        for values in (_mapping(below), merged(_mapping(below), _mapping(over)))
    )
    yield from (problem for problem in found if problem not in known)


def _mapping(values: object) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {}


def _data_problems(entry: Entry, products: list[Product], data: object, at: Key) -> Iterator[tuple[Key, str]]:
    """What the chosen models learn from and the recipe does not hold."""
    if not isinstance(data, Mapping):
        return  # the types say so already
    way_out = f"or take {entry.head} out of 'steps'"
    for product in products:
        name = entry.step_name(product)
        for key in _lacks(product, data):
            if key[1] == "split":
                yield key, f"0, but the step '{name}' learns from that share alone. Set it to 0.2 or so, {way_out}."
            else:
                yield key, f"empty, but the step '{name}' learns from it. Give records there, {way_out}."
    if not products:
        keys = dict.fromkeys(f"data.{key}" for product in entry.stage.products for key in product.needs)
        yield at, f"'{entry.head}' finds nothing to learn from. Give records under {' or '.join(keys)}, {way_out}."


def _lacks(product: Product, data: Mapping[str, Any]) -> Iterator[Key]:
    """Keys without which nothing of this kind can be made; a required key that is missing is told by the types."""
    if product.needs and not any(
        data.get(key) or (key not in data and Data.model_fields[key].is_required()) for key in product.needs
    ):
        yield "data", product.needs[0]
    if product.share:
        split = data.get("split")
        split = split if isinstance(split, Mapping) else {}
        if not split.get(product.share, getattr(Split(), product.share)):
            yield "data", "split", product.share
