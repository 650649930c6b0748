"""The recipe that `init` writes, as YAML: every value with its reason beside it, loaded again before it gets its name."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llamachat.errors import UsageError
from llamachat.runs.atomic import write_text
from pipelines.planning.estimates import duration
from pipelines.planning.init_choices import (
    DIALOGS_FOR_GATT,
    PAIRS_FOR_A_JUDGE,
    Chosen,
    scores,
    split_shares,
    with_distill,
    with_gatt,
)
from pipelines.planning.init_fitting import Made, times
from pipelines.recipe.recipe import Recipe, load


def recipe_text(made: Made) -> str:
    """The recipe with its reasons."""
    lines = [f"# {line}" for line in _heading(made)]
    for name, section in made.sections.items():
        if isinstance(section, Chosen):
            lines += [f"{name}:{_remark(section.why)}", *(f"  - {_inline(item)}" for item in section.value)]
            continue
        lines.append(f"{name}:")
        for key, chosen in section.items():
            lines += _entry(key, chosen)
    return "\n".join(lines) + "\n"


def _heading(made: Made) -> list[str]:
    name, worst = made.worst
    where = str(made.card) if made.card else "two CPU cores"
    return [
        f"{made.asked.base} on {where}: written by `llamachat init`. Change what you like; `llamachat plan` says what it costs.",
        f"Memory: {worst.peak_bytes / 2**30:.1f} GiB at the peak ({name}). Time: about {duration(made.seconds)}. Both by estimate.",
        *(f"Left out: {line}" for line in left_out(made)),
    ]


def told(made: Made, out: Path) -> str:
    """What was chosen and why, and what to do next."""
    found, (name, worst) = made.asked.found, made.worst
    tuning = made.sections["tuning"]
    assert isinstance(tuning, dict)
    memory = f"about {worst.peak_bytes / 2**30:.1f} GiB at the peak ({name}), estimated"
    if made.card:
        memory += f"; a step should need at most {made.card.usable_bytes / 2**30:.1f} of {made.card}"
    limit = f", {made.asked.hours:g} h asked for" if made.asked.hours else ""
    rows = [
        *(_held(key, paths, made) for key, paths in found.files.items()),
        ("steps", ", ".join(step for step, _ in made.estimates)),
        *(("left out", line) for line in left_out(made)),
        ("method", f"{made.method.name}: {tuning['method'].why}"),
        (
            "longest",
            f"{made.method.max_tokens} tokens; {found.longer_than(made.method.max_tokens)} of {len(found.sizes.records)} dialogs and pairs are longer, by estimate",
        ),
        ("memory", memory),
        ("time", f"about {duration(made.seconds)}{limit}; estimated: {times(made)}"),
        *(("warning", line) for line in _earlier_run(Path(made.asked.run_dir))),
    ]
    lines = [f"{out}: a recipe for {made.asked.base} on {made.card or 'two CPU cores'}"]
    lines += [f"  {label:<12} {text}" for label, text in rows]
    next_commands = [f"  llamachat {command} --config {out}" for command in ("doctor", "plan", "all")]
    return "\n".join([*lines, "Next:", *next_commands])


def _held(key: str, paths: Sequence[str], made: Made) -> tuple[str, str]:
    found = made.asked.found
    text = f"{found.records[key]} records of {', '.join(paths)}"
    if key == "helpfulness":
        text += f", {found.rated} of them rated" if found.rated else ", none rated"
    return f"data.{key}", text


def _earlier_run(folder: Path) -> Iterator[str]:
    """That the folder of the run holds steps already, which are not of the recipe that is written now."""
    found = (*folder.glob("*/identity.json"), *folder.glob("*/*/identity.json"))
    begun = sorted(str(path.parent.relative_to(folder)) for path in found)
    if begun:
        yield (
            f"run.dir '{folder}' holds an earlier run ({', '.join(begun)}): a step that is not the same is refused there, unless"
            " with `--overwrite`, which throws the earlier one away. Name another folder with --run-dir"
        )


def left_out(made: Made) -> list[str]:
    """What the paper has and this recipe has not, and what would bring it."""
    found, lines = made.asked.found, []
    if not scores(found):
        lines.append("reward models, rejection sampling and PPO: there are no pairs (--preferences)")
        lines.append("the evaluation: it compares policies by a reward model")
    elif not found.has("safety"):
        lines.append("the safety model, its gate and context distillation: there are no safety pairs (--safety)")
    elif not with_distill(found):
        lines.append("context distillation: there are no prompts that ask for something unsafe (--adversarial)")
    if scores(found) and not split_shares(found)["judge"]:
        lines.append(f"the judge: it wants {PAIRS_FOR_A_JUDGE} pairs, so that a tenth teaches it something")
    if not with_gatt(found, made.effort):
        enough = found.records["sft"] >= DIALOGS_FOR_GATT
        why = "it would not end within the hours" if enough else f"it wants {DIALOGS_FOR_GATT} dialogs"
        lines.append(f"Ghost Attention: {why}")
    if not made.effort.again:
        lines.append("a second pass over the dialogs: it would not end within the hours")
    return lines


def write_recipe(path: Path, text: str) -> Recipe:
    """The recipe, loaded from beside its place and then renamed: what is there loads."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side = path.with_name(f".incoming-{os.getpid()}-{path.name}")
        try:
            side.write_text(text, encoding="utf-8")
            recipe = load(side)
        finally:
            side.unlink(missing_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UsageError(
            f"--out: '{path}' cannot be written ({error.strerror}). The recipe is one file. Name another place."
        ) from error
    return recipe


def _entry(key: str, chosen: Chosen) -> list[str]:
    if isinstance(chosen.value, list) and chosen.value and isinstance(chosen.value[0], dict):
        return [f"  {key}:{_remark(chosen.why)}", *(f"    - {_inline(item)}" for item in chosen.value)]
    return [f"  {key}: {_inline(chosen.value)}{_remark(chosen.why)}"]


def _remark(why: str) -> str:
    return f" # {why}" if why else ""


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
