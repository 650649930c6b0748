"""The figures of the check: measured values and their bounds."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llamachat.errors import first_line


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of the check, informative if it has no bounds. `error` is the reason if it could not be measured."""

    name: str
    value: float = math.nan
    unit: str = ""
    least: float | None = None
    most: float | None = None
    error: str = ""

    @property
    def is_bounded(self) -> bool:
        return self.least is not None or self.most is not None or bool(self.error)

    @property
    def is_right(self) -> bool:
        """Whether the number is within its bounds; NaN is not."""
        if not self.is_bounded:
            return True
        at_least = self.least is None or self.value >= self.least
        return at_least and (self.most is None or self.value <= self.most) and not self.error


def figures_of(name: str, section: Callable[[], Iterable[Figure]]) -> Iterator[Figure]:
    """The figures of a section, or one with the error if it fails."""
    try:
        yield from section()
    except Exception as error:  # continue with the other sections
        yield Figure(name, error=f"{type(error).__name__}: {first_line(error)}"[:300])


def line(figure: Figure) -> str:
    """A row of the table."""
    verdict = ("ok" if figure.is_right else "MISMATCH") if figure.is_bounded else ""
    if figure.error:
        return f"{verdict:<10}{figure.name}: {figure.error}"
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", figure.least), ("at most", figure.most))
        if bound is not None
    ]
    return f"{verdict:<10}{figure.name:<72}{figure.value:>12.5g} {figure.unit:<12}{', '.join(bounds)}".rstrip()


def write(path: Path, facts: Mapping[str, str], figures: Sequence[Figure]) -> None:
    """Write everything as JSON, with null for NaN."""
    rows = [asdict(figure) | {"is_right": figure.is_right} for figure in figures]
    for row in rows:
        row["value"] = row["value"] if math.isfinite(row["value"]) else None
    content = {"facts": dict(facts), "figures": rows, "is_right": all(figure.is_right for figure in figures)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
