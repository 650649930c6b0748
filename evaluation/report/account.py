"""How a run was made: training curves, time and memory, data, versions, seed, commit, deviations from the paper."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.report.drawing import ppo_overview, training_curve
from evaluation.report.facts import Facts
from evaluation.report.page import ABSENT, Block, Gallery, Picture, Section, Table, Text, number, row
from llamachat.memory.estimates import shape_of
from llamachat.tables import duration, plural
from llamachat.tracking.curves import Series, panels_of, read_series

_LEFT_OUT_OF_CURVES = ("progress", "trained tokens", "training time", "time", "memory", "")
_SHORT_COMMIT = 12


def curves(facts: Facts, figures: Path) -> Section | None:
    """Training curves of each step, one small plot per panel, under the step's name."""
    blocks: list[Block] = []
    for step in facts.steps:
        series = read_series(step.folder.metrics) if step.folder.metrics.is_file() else []
        panels = panels_of(series)
        blocks += _overview(step.name, series, figures)
        pictures = []
        for title, group in panels.items():
            is_curve = any(len(one.values) > 1 for one in group)
            if title.rpartition(": ")[2] in _LEFT_OUT_OF_CURVES or not is_curve:
                continue
            name = re.sub(r"[^a-z0-9]+", "_", f"{step.name} {title}".lower()).strip("_")
            descriptions = []
            for one in group:
                first, last = f"{one.values[0]:.3g}", f"{one.values[-1]:.3g}"
                descriptions.append(
                    f"{one.name} is {first}" if len(one.values) == 1 else f"{one.name} goes from {first} to {last}"
                )
            path = figures / "curves" / f"{name}.png"
            training_curve(path, group)
            pictures.append(Picture(path, f"{step.name}, {title}: {'; '.join(descriptions)}.", title))
        if pictures:
            blocks.append(Gallery(f"{step.name}: {plural(len(pictures), 'curve')}", pictures))
    return Section("Training curves", "curves", blocks) if blocks else None


# Title -> metric and label of each of its lines.
_OVERVIEW = {
    "reward models, training prompts": {"ppo/reward/helpfulness": "helpfulness", "ppo/reward/safety": "safety"},
    "KL to the policy before PPO": {"ppo/kl_to_reference": "training", "ppo/heldout/kl_to_reference": "held-out"},
    "judge, held-out prompts": {"ppo/heldout/judge": "judge"},
    "length of answers": {"ppo/response_tokens": "training", "ppo/heldout/response_tokens": "held-out"},
}


def _overview(step: str, series: Sequence[Series], figures: Path) -> list[Block]:
    """Reward, KL, judge and length of a PPO step in one plot, as far as they were logged."""
    by_name = {one.name: one for one in series if len(one.steps) > 1}
    panels = {
        title: lines
        for title, labels in _OVERVIEW.items()
        if (lines := [(label, by_name[name]) for name, label in labels.items() if name in by_name])
    }
    if not panels:
        return []
    path = figures / f"overview_{step}.png"
    ppo_overview(path, panels)
    ends = (
        f"{title}, {label}: from {one.values[0]:.3g} to {one.values[-1]:.3g}"
        for title, lines in panels.items()
        for label, one in lines
    )
    caption = f"{step}: what to look at first. Points are iterations, lines their running mean; dots are evaluations."
    return [Picture(path, f"Curves of {step}. {'; '.join(ends)}.", caption, is_wide=True)]


def costs(facts: Facts) -> Section | None:
    """Time and peak memory by step; only training time if no costs were logged."""
    if not facts.steps:
        return None
    rows, is_partial, total = [], False, 0.0
    for step in facts.steps:
        cost = step.cost
        parts = [step.summary[name] for name in ("time/train_s", "time/eval_s") if name in step.summary]
        seconds = cost.seconds if cost else sum(parts) if parts else None
        is_partial |= cost is None and seconds is not None
        total += seconds or 0.0
        peak = cost.peak_gib if cost else step.summary.get("memory/peak_gib")
        rows.append(
            row(
                step.name,
                ABSENT if seconds is None else f"{duration(seconds)}{'' if cost else ' (training alone)'}",
                ABSENT if peak is None else f"{number(peak, digits=1)} GiB",
                f"{cost.starts}" if cost else ABSENT,
            )
        )
    rows.append(row("all", duration(total), "", ""))
    partial = "Where only the training's time was recorded, add sampling and loading. " if is_partial else ""
    table = Table(
        "Time and memory",
        ["step", "time", "peak memory", "starts"],
        rows,
        note=f"{partial}Peak memory is that of the GPU where there is one, else of the process. More than one start means "
        "that the step was stopped and went on. A step taken over from another run counts what it took there.",
        name="costs",
    )
    return Section("Time and memory", "costs", [table])


def account(facts: Facts) -> Section:
    """Base, data, versions, seeds and commits: everything needed to reproduce the run."""
    dropped = [
        row(step.name, reason, str(count))
        for step in facts.steps
        for reason, count in step.published.dropped_records.items()
    ]
    blocks: list[Block] = [
        _steps(facts),
        _data(facts),
        Table("Records left out or shortened", ["step", "why", "records"], dropped, name="dropped")
        if dropped
        else Text("No step left a record out."),
    ]
    versions: dict[str, dict[str, None]] = {}  # each library with every version used by a step
    for step in facts.steps:
        for library, version in step.published.versions.items():
            versions.setdefault(library, {})[version] = None
    if versions:
        rows = [row(name, ", ".join(own)) for name, own in versions.items()]
        blocks.append(Table("Versions", ["library", "version"], rows))
    return Section("What was run", "account", blocks)


def _steps(facts: Facts) -> Table:
    rows = []
    for step in facts.steps:
        manifest, ending = step.published, step.ending
        edited = ", edited" if manifest.git_is_edited else ""
        rows.append(
            row(
                step.name,
                manifest.kind.replace("_", " ") + (f": {ending.words(with_unit=True)}" if ending else ""),
                str(manifest.seed),
                f"{manifest.git_commit[:_SHORT_COMMIT]}{edited}" if manifest.git_commit else "unknown",
                manifest.created[:16].replace("T", " "),
                ", ".join(f"{role}: {name}" for role, name in manifest.inputs.items()) or ABSENT,
            )
        )
    return Table(
        "Steps", ["step", "makes", "seed", "git commit", "published, UTC", "read"], rows, name="account",
        note="'edited' means that the code was not as the commit has it.",
    )  # fmt: skip


def _data(facts: Facts) -> Table:
    data = facts.inputs.recipe.get("data") or {}
    rows = []
    for key, sources in data.items():
        if not isinstance(sources, (list, tuple)) or not sources:
            continue
        rows.append(row(key, "; ".join(_source(source) for source in sources)))
    split = data.get("split") or {}
    shares = ", ".join(f"{name} {100 * share:g}%" for name, share in split.items())
    return Table(
        "Data", ["for", "sources"], rows,
        note=f"Kept from training, by a hash of the first user turn: {shares or 'nothing'}.",
    )  # fmt: skip


def _source(source: Any) -> str:
    if not isinstance(source, dict):
        return str(source)
    weight, limit = source.get("weight", 1.0), source.get("limit")
    more = [*([f"weight {weight:g}"] if weight != 1.0 else []), *([f"first {limit}"] if limit else [])]
    return f"{source.get('path')} ({', '.join(more)})" if more else str(source.get("path"))


# A value stated in the paper: command, our section and key, description, the paper's value or values, unit.
_VALUES: tuple[tuple[str, str, str, str, tuple[float, ...], str], ...] = (
    ("sft", "sft", "epochs", "epochs", (2,), ""),
    ("sft", "sft", "learning_rate", "learning rate", (2e-5,), ""),
    ("sft", "sft", "examples_per_step", "batch", (64,), "dialogs"),
    ("sft", "base", "max_tokens", "longest sequence", (4096,), "tokens"),
    ("rm", "reward", "epochs", "epochs", (1,), ""),
    ("rm", "reward", "learning_rate", "learning rate", (1e-5, 5e-6), ""),
    ("rm", "reward", "pairs_per_step", "batch", (512,), "pairs"),
    ("ppo", "ppo", "responses_per_iteration", "answers an iteration", (512,), ""),
    ("ppo", "ppo", "responses_per_minibatch", "mini-batch", (64,), "answers"),
    ("ppo", "ppo", "learning_rate", "learning rate", (1e-6,), ""),
    ("ppo", "ppo", "kl_coef", "KL coefficient beta", (0.01, 0.005), ""),
    ("ppo", "ppo", "clip_range", "clip range", (0.2,), ""),
)
_MOST_ITERATIONS = (200, 400)


def deviations(facts: Facts) -> Section:
    """Table of deviations (what, the paper's, ours): the base and the data, then the steps in order."""
    rows = [*_of_the_whole(facts), *_of_values(facts), *_of_commands(facts)]
    table = Table(
        "Where this run differs",
        ["what", "paper", "this run"],
        [row(*texts) for texts in rows],
        note="Only what the paper states is compared. What it leaves open (the number of samples of rejection sampling, the "
        "critic of PPO, the auxiliary loss, ...) is ours, and docs/paper_map.md lists it.",
        name="deviations",
    )
    return Section("Deviations from the paper", "deviations", [table])


def _of_the_whole(facts: Facts) -> list[tuple[str, str, str]]:
    recipe = facts.inputs.recipe
    base = facts.base
    shape = shape_of(base)
    size = f", {_count(shape.weights)} parameters" if shape else ""
    tuning = recipe.get("tuning") or {}
    rows = [("base", "Llama 2, 7 to 70 billion parameters, 2 trillion tokens", f"{base}{size}")]
    method = tuning.get("method", "full")
    if method != "full":
        quantised = ", the base in 4 bits" if method == "qlora" else ""
        rows.append(("tuning", "all weights", f"{method}: adapters of rank {tuning.get('rank')}{quantised}"))
    rows.append(("tuning data", "27,540 annotations written for it", _num_sources(_sources(recipe, "sft"))))
    if facts.reward_models:
        pairs = [*_sources(recipe, "helpfulness"), *_sources(recipe, "safety")]
        rows.append(
            ("preferences", "1.4 million pairs, weekly, of the latest model's answers", f"{_num_sources(pairs)}, once")
        )
    names = ", ".join(step.name for step in facts.policies) or "no policy"
    rows.append(
        ("rounds", "five of RLHF, with new preferences before each; PPO after the fourth", f"one pass: {names}")
    )
    if facts.evaluation is not None:
        rows.append(
            ("judgement", "people, and GPT-4", "reward models, where there is one a judge that selects nothing")
        )
    return rows


def _of_values(facts: Facts) -> list[tuple[str, str, str]]:
    rows = []
    for command, section, key, what, stated, unit in _VALUES:
        for step in facts.by_command(command):
            ours, end = step.value(section, key), step.ending
            cut = end.words() if end is not None and end.key == key else None
            if ours is not None and (cut or ours not in stated):
                texts = [f"{one:g} {unit}".strip() for one in (stated[0], ours)]
                rows.append((f"{step.name}: {what}", texts[0], cut or texts[1]))
    return rows


def _of_commands(facts: Facts) -> list[tuple[str, str, str]]:
    rows = []
    for step in facts.by_command("ppo"):
        planned, end = step.value("ppo", "iterations"), step.ending
        iterations = planned if end is None or end.done is None else end.done
        low, high = _MOST_ITERATIONS
        if iterations is not None and not low <= iterations <= high:
            actual = f"{planned}" if end is None else end.words()
            rows.append((f"{step.name}: iterations", f"{low} to {high}", actual))
    rows += [
        (step.name, "no such step", "DPO on the pairs that reward models learn") for step in facts.by_command("dpo")
    ]
    for step in facts.by_command("rs"):
        if step.value("rejection_sampling", "start") == "current":
            rows.append((f"{step.name}: tuned", "the base model again", "the present policy"))
    for step in facts.by_command("gatt"):
        rows.append(
            (f"{step.name}: measured", "recall of a figure or hobby, by people", "instructions checked by rule")
        )
        if step.value("gatt", "values") == "lists":
            rows.append((f"{step.name}: hobbies and figures", "lists that the model wrote itself", "lists in files"))
    return rows


def _sources(recipe: Mapping[str, Any], key: str) -> list[Any]:
    return list((recipe.get("data") or {}).get(key) or ())


def _num_sources(sources: Sequence[Any]) -> str:
    return plural(len(sources), "source")


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"
