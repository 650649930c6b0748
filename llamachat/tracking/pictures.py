"""Pictures as PNG: a grid of panels, their common style, and the file, which appears whole under its name."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat import distributed
from llamachat.runs.atomic import INCOMING, storage_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d1601f", "#2b8a3e", "#8a3ea8", "#b8860b", "#0f8b8d", "#a61e4d", "#5c5f66")
_DPI = 110


def panel_grid(
    count: int,
    *,
    panel: tuple[float, float],
    columns: int | None = None,
    title: str | None = None,
    title_inches: float = 0.0,
    share_x: bool = False,
    share_y: bool = False,
) -> "tuple[Figure, list[Any]]":
    """A figure with `count` axes, each `panel` (width, height) inches, in rows of `columns` (default: one row)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns or count, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows + title_inches), layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    places = list(figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y).flatten())
    for place in places[count:]:
        place.set_axis_off()
    return figure, places[:count]


def style_panel(
    place: Any,
    title: str = "",
    *,
    x: str = "",
    y: str = "",
    title_points: float = 10,
    points: float = 8,
    tick_points: float | None = None,
    has_grid: bool = True,
    has_legend: bool = False,
) -> None:
    """Style a panel, and set its title and axis labels where they are given; ticks have `points` by default."""
    if title:
        place.set_title(title, fontsize=title_points, loc="left")
    if x:
        place.set_xlabel(x, fontsize=points)
    if y:
        place.set_ylabel(y, fontsize=points)
    place.tick_params(labelsize=points if tick_points is None else tick_points)
    if has_grid:
        place.grid(visible=True, alpha=0.25, linewidth=0.6)
    place.spines[["top", "right"]].set_visible(False)
    if has_legend:
        place.legend(fontsize=points - 0.5, frameon=False)


def save_png(figure: "Figure", png_path: Path) -> None:
    """Write a picture beside its place and rename it: a reader sees all of it or the one before."""
    if not distributed.is_first():
        return
    with storage_errors(png_path):
        png_path.parent.mkdir(parents=True, exist_ok=True)
        side = png_path.with_name(f"{INCOMING}{png_path.name}")
        figure.savefig(side, dpi=_DPI, format="png")
        side.replace(png_path)
