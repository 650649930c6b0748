"""`llamachat compare RUN_A RUN_B`: the configuration keys that differ, the resulting figures, and overlaid curves.

Writes `compare.md`, `compare.json` and one picture per step; reads the small files of both runs and loads no model.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

from llamachat.errors import UsageError
from llamachat.runs.atomic import write_json, write_text
from llamachat.runs.outputs import check_output
from llamachat.runs.reader import Measure, RunStep, read_run
from llamachat.tables import markdown_table, plural, text_table
from llamachat.tracking.curves import draw_overlays
from llamachat.tracking.metrics import find_metric
from pipelines.studies.differences import KINDS, Change, Compared, changes, compared_figures, first_policy

_WIDTH = 110
_LONGEST = 48  # characters of a value on the screen; the file has the whole value
# Variables in a metric's name that split a figure into parts; the screen shows only the total.
_DETAILS = ("<rating>", "<kind>", "<source>", "<temperature>", "<family>")


@dataclass(frozen=True, slots=True)
class SharedStep:
    """A step that both runs have."""

    name: str
    is_same: bool  # with the same identity: then its figures add nothing
    is_finished: tuple[bool, bool]
    figures: list[Compared]
    picture: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two runs."""

    runs: tuple[Path, Path]
    labels: tuple[str, str]
    out: Path
    changes: list[Change]
    steps: list[SharedStep]
    only: tuple[list[str], list[str]]  # steps that only one run has


def compare_runs(run_a: Path, run_b: Path, out: Path | None = None, *, overwrite: bool = False) -> Comparison:
    """Compare two runs, and write the comparison into `out`."""
    if run_a.resolve() == run_b.resolve():
        raise UsageError(
            f"{run_b} is the same run as {run_a}. A comparison needs two runs. Name another, or make one with other values"
            f" and run.dir=NEW {quote(f'run.parent={run_a}')}, which reuses the unchanged steps by reference."
        )
    a, b = read_run(run_a), read_run(run_b)
    shared = [name for name in a if name in b]
    if not shared:
        raise UsageError(
            f"{run_a} and {run_b} have no step in common: {', '.join(a)} in the first, {', '.join(b)} in the second. Steps are"
            " compared by name. Run the same step in both, or name two runs of similar recipes."
        )
    labels = _labels(run_a, run_b)
    out = out or run_a.parent / f"compare-{'-'.join(label.replace('/', '-') for label in labels)}"
    check_output(out, [run_a, run_b], overwrite=overwrite, marker="compare.json")
    comparison = Comparison(
        runs=(run_a, run_b),
        labels=labels,
        out=out,
        changes=changes(a, b),
        steps=[_shared_step(a, b, name, labels, out) for name in shared],
        only=([name for name in a if name not in b], [name for name in b if name not in a]),
    )
    plain = {
        "runs": {"a": str(run_a), "b": str(run_b)},
        "changes": [asdict(change) for change in comparison.changes],
        "steps": [asdict(step) for step in comparison.steps],
        "only": dict(zip("ab", comparison.only, strict=True)),
    }
    write_json(out / "compare.json", plain)
    write_text(out / "compare.md", markdown(comparison))
    return comparison


def _shared_step(
    a: Mapping[str, RunStep], b: Mapping[str, RunStep], name: str, labels: tuple[str, str], out: Path
) -> SharedStep:
    ours, theirs = a[name], b[name]
    is_finished = ours.is_finished, theirs.is_finished
    if ours.manifest and theirs.manifest and ours.manifest.files == theirs.manifest.files:
        return SharedStep(name, is_same=True, is_finished=is_finished, figures=[], picture=None)
    figures = compared_figures(ours, theirs, scale_is_equal=first_policy(a, ours) == first_policy(b, theirs))
    picture = f"curves-{name.replace('/', '-')}.png"
    records = [ours.folder.metrics, theirs.folder.metrics]
    drawn = draw_overlays(records, out / picture, labels=labels, title=f"{name}: {' and '.join(labels)}")
    return SharedStep(name, is_same=False, is_finished=is_finished, figures=figures, picture=picture if drawn else None)


def _labels(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The shortest suffixes of both paths that differ."""
    parts_a, parts_b = (Path(os.path.abspath(run)).parts for run in (run_a, run_b))  # noqa: PTH100 - links stay links
    most = max(len(parts_a), len(parts_b))
    length = next(length for length in range(1, most + 1) if parts_a[-length:] != parts_b[-length:])
    return "/".join(parts_a[-length:]).lstrip("/"), "/".join(parts_b[-length:]).lstrip("/")


_Table = tuple[list[tuple[str, ...]], str]  # the rows, head first, and the alignment of the columns
_Block = str | _Table


def markdown(comparison: Comparison) -> str:
    """The text of compare.md, with all details."""
    parts = [f"# {comparison.labels[0]} (A) and {comparison.labels[1]} (B)", ""]
    for heading, blocks in _sections(comparison, is_whole=True):
        parts += [f"## {heading}", ""]
        for block in blocks:
            parts += [block, ""] if isinstance(block, str) else [*markdown_table(block[0], align=block[1]), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def terminal_text(comparison: Comparison) -> str:
    """The same without the details, as text in columns."""
    lines = []
    for heading, blocks in _sections(comparison, is_whole=False):
        lines += [heading]
        for block in blocks:
            if isinstance(block, str):
                lines += [f"  {line}" for line in textwrap.wrap(block, _WIDTH)]
            else:
                lines += text_table(block[0], align=block[1], indent="  ")
        lines.append("")
    return "\n".join(lines)


def _sections(comparison: Comparison, *, is_whole: bool) -> Iterator[tuple[str, list[_Block]]]:
    a, b = comparison.runs
    yield "Runs", [f"A: {a}", f"B: {b}", "Differences are B minus A."]
    yield "Configuration", _configuration(comparison, is_whole)
    for name, steps in zip("AB", comparison.only, strict=True):
        if steps:
            yield f"Only in {name}", [", ".join(steps)]
    same = [step.name for step in comparison.steps if step.is_same]
    if same:
        yield "The same in both", [f"{', '.join(same)}: every file of the artifact is identical."]
    for step in comparison.steps:
        if not step.is_same:
            yield step.name, _step(step, is_whole)
    yield "How to read the intervals", [_reading(comparison)]


def _configuration(comparison: Comparison, is_whole: bool) -> list[_Block]:
    if not comparison.changes:
        return ["The steps that both runs have do not differ."]
    everywhere = [step.name for step in comparison.steps]
    blocks: list[_Block] = []
    for kind, meaning in KINDS.items():
        rows = [
            (
                f"`{change.key}`" if is_whole else change.key,
                _value(change.a, is_whole),
                _value(change.b, is_whole),
                "all" if list(change.steps) == everywhere and len(everywhere) > 1 else ", ".join(change.steps),
            )
            for change in comparison.changes
            if change.kind == kind
        ]
        if rows:
            blocks += [f"{meaning[0].upper()}{meaning[1:]}:", ([("key", "A", "B", "steps"), *rows], "<")]
    return blocks


def _value(text: str, is_whole: bool) -> str:
    if is_whole:
        return text.replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _step(step: SharedStep, is_whole: bool) -> list[_Block]:
    blocks: list[_Block] = [
        f"Not finished in {name}." for name, is_finished in zip("AB", step.is_finished, strict=True) if not is_finished
    ]
    rows_of = {one.name: find_metric(one.name) for one in step.figures}
    details = {name for name, row in rows_of.items() if row is not None and any(part in row.name for part in _DETAILS)}
    shown = [one for one in step.figures if is_whole or one.name not in details]
    remarks = list(dict.fromkeys(one.remark for one in shown if one.remark))
    if shown:
        rows = [_row(one, is_whole, f" ({remarks.index(one.remark) + 1})" if one.remark else "") for one in shown]
        blocks.append(([("figure", "A", "B", "B - A (95% interval)"), *rows], "<>"))
    else:
        blocks.append("The runs have no final figure in common.")
    blocks += [f"({number}) {remark}" for number, remark in enumerate(remarks, start=1)]
    if len(shown) < len(step.figures):
        blocks.append(
            f"{plural(len(step.figures) - len(shown), 'more figure')} (by rating, file or temperature) in compare.md."
        )
    if step.picture:
        blocks.append(f"![curves of {step.name}]({step.picture})" if is_whole else f"curves: {step.picture}")
    return blocks


def _row(one: Compared, is_whole: bool, mark: str) -> tuple[str, ...]:
    if not is_whole:  # does not fit into 100 columns
        return one.name + mark, _number(one.a.value), _number(one.b.value), _gap(one)
    unit = f", {one.unit}" if one.unit not in ("", "1") else ""
    return f"`{one.name}`{unit}{mark}", _side(one.a), _side(one.b), _gap(one)


def _side(side: Measure) -> str:
    text = _number(side.value)
    return f"{text} ({_number(side.interval[0])} to {_number(side.interval[1])})" if side.interval else text


def _gap(one: Compared) -> str:
    if one.difference is None:
        return "-"
    text = _number(one.difference, sign="+")
    if one.low is None or one.high is None:
        return text
    paired = ", paired" if one.how == "paired" else ""
    mark = " *" if one.leaves_out_zero else ""
    return f"{text} ({_number(one.low, sign='+')} to {_number(one.high, sign='+')}{paired}){mark}"


def _number(value: float, *, sign: str = "") -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000 or (abs(value) > 1 and value == round(value)):
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.1e}" if abs(value) < 0.0005 else f"{value:{sign}.3f}"


def _reading(comparison: Comparison) -> str:
    intervals = [one for step in comparison.steps for one in step.figures if one.low is not None]
    if not intervals:
        return "Neither run has data for an interval; with one seed each, small differences mean little."
    apart = sum(one.leaves_out_zero for one in intervals)
    return (
        f"{apart} of {plural(len(intervals), 'interval')} exclude 0 (*); about {max(1, round(len(intervals) / 20))} would do so by"
        " chance. Paired intervals compare answers to the same prompts; the others combine both runs' intervals as if they"
        " were independent, which is too wide if the prompts were the same. All cover the choice of test prompts, not"
        " the seed: two runs of one recipe with different seeds differ too, and only more seeds show by how much."
    )
