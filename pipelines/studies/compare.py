"""`llamachat compare RUN_A RUN_B`: what two runs were told otherwise, what came out, and their curves over each other.

Writes `compare.md`, `compare.json` and a picture a step; reads the small files of both runs and loads no model. A
difference is always that of the second run less the first.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llamachat.errors import UsageError
from llamachat.runs.atomic import write_json, write_text
from llamachat.runs.contents import StepContents, read_run
from llamachat.tracking.curves import draw_overlays
from pipelines.cli.exit_status import reported
from pipelines.studies.changes import Change, changes
from pipelines.studies.differences import Compared, compared_figures, first_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SharedStep:
    """A step of both runs."""

    name: str
    is_same: bool  # made the same way: then its figures say nothing new
    is_finished: tuple[bool, bool]
    figures: list[Compared]
    picture: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, side by side."""

    runs: tuple[Path, Path]
    labels: tuple[str, str]
    out: Path
    changes: list[Change]
    steps: list[SharedStep]
    only: tuple[list[str], list[str]]  # steps of one run alone

    def to_plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "runs": {"a": str(self.runs[0]), "b": str(self.runs[1])},
            "changes": [asdict(change) for change in self.changes],
            "steps": [asdict(step) for step in self.steps],
            "only": {"a": self.only[0], "b": self.only[1]},
        }


@reported
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder, such as runs/tiny.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other; differences are this one less RUN_A.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write; without it compare-A-B beside RUN_A.", metavar="DIR"),
    ] = None,
) -> None:
    """Two runs side by side: differences of configuration and of figures with intervals, curves overlaid."""
    found = compare_runs(run_a, run_b, out)
    from pipelines.studies.compare_text import plain, show_in_terminal

    if sys.stdout.isatty():
        show_in_terminal(found)
    else:
        print(plain(found), end="")
    log.info("%s: compare.md, compare.json and %d pictures", found.out, sum(bool(step.picture) for step in found.steps))


def compare_runs(run_a: Path, run_b: Path, out: Path | None = None) -> Comparison:
    """Compare, and write what was found into `out`."""
    if run_a.resolve() == run_b.resolve():
        raise UsageError(
            f"{run_b}: is {run_a} once more. A comparison needs two runs. Name another, or make one with other values"
            f" and run.dir=NEW run.parent={run_a}, which takes the unchanged steps by reference."
        )
    a, b = read_run(run_a), read_run(run_b)
    shared = [name for name in a if name in b]
    if not shared:
        raise UsageError(
            f"{run_a} and {run_b} have no step in common: {', '.join(a)} here, {', '.join(b)} there. Steps are compared"
            " under their names. Run the same step in both, or name two runs of like recipes."
        )
    labels = _labels(run_a, run_b)
    out = out or run_a.parent / f"compare-{'-'.join(label.replace('/', '-') for label in labels)}"
    found = Comparison(
        runs=(run_a, run_b),
        labels=labels,
        out=out,
        changes=changes(a, b),
        steps=[_shared_step(a, b, name, labels, out) for name in shared],
        only=([name for name in a if name not in b], [name for name in b if name not in a]),
    )
    from pipelines.studies.compare_text import markdown

    write_json(out / "compare.json", found.to_plain())
    write_text(out / "compare.md", markdown(found))
    return found


def _shared_step(
    a: Mapping[str, StepContents], b: Mapping[str, StepContents], name: str, labels: tuple[str, str], out: Path
) -> SharedStep:
    ours, theirs = a[name], b[name]
    is_finished = ours.is_finished, theirs.is_finished
    if all(is_finished) and ours.manifest.get("files") == theirs.manifest.get("files"):
        return SharedStep(name, is_same=True, is_finished=is_finished, figures=[], picture=None)
    figures = compared_figures(ours, theirs, scale_is_equal=first_policy(a, ours) == first_policy(b, theirs))
    picture = f"curves-{name.replace('/', '-')}.png"
    drawn = draw_overlays(
        [ours.folder.metrics, theirs.folder.metrics],
        out / picture,
        labels=labels,
        title=f"{name}: {' and '.join(labels)}",
    )
    return SharedStep(name, is_same=False, is_finished=is_finished, figures=figures, picture=picture if drawn else None)


def _labels(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The shortest ends of both paths that tell them apart."""
    parts_a, parts_b = (Path(os.path.abspath(run)).parts for run in (run_a, run_b))  # noqa: PTH100 - links stay links
    most = max(len(parts_a), len(parts_b))
    length = next(length for length in range(1, most + 1) if parts_a[-length:] != parts_b[-length:])
    return "/".join(parts_a[-length:]).lstrip("/"), "/".join(parts_b[-length:]).lstrip("/")
