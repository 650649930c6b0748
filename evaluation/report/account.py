"""What was run: training curves, time and memory, data, versions, seed, commit."""

import re
from pathlib import Path
from typing import Any

from evaluation.report.drawing import training_curve
from evaluation.report.facts import Facts
from evaluation.report.page import ABSENT, Block, Gallery, Picture, Section, Table, Text, number, row
from llamachat.runs.reader import RunStep
from llamachat.tracking.curves import Series, panels_of, read_series

_LEFT_OUT_OF_CURVES = ("progress", "trained tokens", "training time", "time", "memory", "")
_SHORT_COMMIT = 12


def curves(facts: Facts, figures: Path) -> Section | None:
    """The record of each step, a small picture a panel, under the step's name."""
    blocks: list[Block] = []
    for step in facts.steps:
        panels = panels_of(read_series(step.folder.metrics)) if step.folder.metrics.is_file() else {}
        pictures = []
        for title, group in panels.items():
            is_curve = any(len(one.values) > 1 for one in group)
            if title.rpartition(": ")[2] in _LEFT_OUT_OF_CURVES or not is_curve:
                continue
            name = re.sub(r"[^a-z0-9]+", "_", f"{step.name} {title}".lower()).strip("_")
            told = [_course(one) for one in group]
            path = training_curve(figures / "curves" / f"{name}.png", group)
            pictures.append(Picture(path, f"{step.name}, {title}: {'; '.join(told)}.", title))
        if pictures:
            blocks.append(Gallery(f"{step.name}: {len(pictures)} curves", pictures))
    return Section("Training curves", "curves", blocks) if blocks else None


def costs(facts: Facts) -> Section | None:
    """Time and peak memory by step; where no cost was written down, the time of training alone."""
    if not facts.steps:
        return None
    rows, is_partial, total = [], False, 0.0
    for step in facts.steps:
        seconds, is_whole = _seconds(step)
        is_partial |= not is_whole and seconds is not None
        total += seconds or 0.0
        cost = step.cost
        peak = cost.peak_gib if cost else step.summary.get("memory/peak_gib")
        starts = cost.starts if cost else None
        rows.append(
            row(
                step.name,
                ABSENT if seconds is None else f"{_duration(seconds)}{'' if is_whole else ' (training alone)'}",
                ABSENT if peak is None else f"{number(peak, digits=1)} GiB",
                ABSENT if starts is None else f"{starts:.0f}",
            )
        )
    rows.append(row("all", _duration(total), "", ""))
    partial = (
        "Where only the training's time was written down, sampling and loading come on top. " if is_partial else ""
    )
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
    """Base, data, versions, seeds and commits: what one needs to run this again."""
    blocks: list[Block] = [_steps(facts), _data(facts)]
    dropped = _dropped(facts)
    blocks.append(dropped or Text("No step left a record out."))
    versions = _versions(facts)
    return Section("What was run", "account", [*blocks, *([versions] if versions else [])])


def _steps(facts: Facts) -> Table:
    rows = []
    for step in facts.steps:
        manifest = step.published
        commit = (
            f"{manifest.git_commit[:_SHORT_COMMIT]}{', edited' if manifest.git_is_edited else ''}"
            if manifest.git_commit
            else "unknown"
        )
        read = ", ".join(f"{role}: {name}" for role, name in manifest.inputs.items()) or ABSENT
        rows.append(
            row(
                step.name,
                manifest.kind.replace("_", " ") + (f": {step.ending.in_words}" if step.ending else ""),
                str(manifest.seed),
                commit,
                manifest.created[:16].replace("T", " "),
                read,
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


def _dropped(facts: Facts) -> Table | None:
    rows = [
        row(step.name, reason, str(count))
        for step in facts.steps
        for reason, count in step.published.dropped_records.items()
    ]
    return Table("Records left out or shortened", ["step", "why", "records"], rows, name="dropped") if rows else None


def _versions(facts: Facts) -> Table | None:
    """Each library once, with every version that a step ran with."""
    found: dict[str, dict[str, None]] = {}
    for step in facts.steps:
        for library, version in step.published.versions.items():
            found.setdefault(library, {})[version] = None
    if not found:
        return None
    return Table(
        "Versions", ["library", "version"], [row(name, ", ".join(versions)) for name, versions in found.items()]
    )


def _seconds(step: RunStep) -> tuple[float | None, bool]:
    """Seconds of the step, and whether all of it is counted."""
    cost = step.cost
    if cost is not None:
        return cost.seconds, True
    parts = [step.summary[name] for name in ("time/train_s", "time/eval_s") if name in step.summary]
    return (sum(parts), False) if parts else (None, False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _course(series: Series) -> str:
    first, last = series.values[0], series.values[-1]
    if len(series.values) == 1:
        return f"{series.name} is {_short(first)}"
    return f"{series.name} goes from {_short(first)} to {_short(last)}"


def _short(value: float) -> str:
    return f"{value:.3g}"
