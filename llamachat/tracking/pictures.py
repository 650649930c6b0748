"""Pictures as PNG: a grid of panels, their common style, and the file, which is replaced atomically."""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from llamachat import distributed
from llamachat.errors import LlamachatError, first_line
from llamachat.runs.atomic import incoming_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
P = ParamSpec("P")

COLOURS = ("#1f5fa8", "#d1601f", "#2b8a3e", "#8a3ea8", "#b8860b", "#0f8b8d", "#a61e4d", "#5c5f66")
_DPI = 110
_LONGEST_TITLE = 100


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
        figure.suptitle(title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 3]}...", fontsize=12)
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
    """Style a panel, and set its title and axis labels if given; ticks have `points` by default."""
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
    """Write a picture to a side file and rename it: a reader sees the new file or the old one.

    A `$` in its texts is literal: they name runs and steps, and none is a formula.
    """
    from matplotlib.text import Text

    if not distributed.is_first():
        return
    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in text.get_text():
            text.set_parse_math(False)
    with incoming_file(png_path) as side:
        figure.savefig(side, dpi=_DPI, format="png")


def harmless(draw: Callable[P, None]) -> Callable[P, None]:
    """A drawing function that only logs its failures: the figures are in other files too, and no step fails over a
    picture."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except LlamachatError:
            raise  # a full disk will stop the next writes, too
        except Exception as error:
            log.warning(
                "warning: a picture could not be drawn (%s): %s: %s",
                draw.__name__,
                type(error).__name__,
                first_line(error),
            )

    return wrapped
