"""Figures of consistency by their names in the table of metrics, as a table for people, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamachat.answers.consistency import CHECKED, RECALLED, Outcome, Rate, Trial, differences, rates
from llamachat.tracking.pictures import save_png

# Moments of the table of metrics: the policy before and after, and the one before without any instruction.
MOMENTS = ("start", "final", "chance")
_NAMES = {"start": "before", "final": "after", "chance": "chance (told nothing)"}
_COLOURS = {"start": "#5c5f66", "final": "#1f5fa8", "chance": "#d1601f"}


def consistency_figures(outcomes: Mapping[str, Outcome], trials: Sequence[Trial]) -> dict[str, float]:
    """Rates by moment, kind, family and turn, and the differences after - before and after - chance, with intervals."""
    found: dict[str, float] = {}
    for moment, outcome in outcomes.items():
        for kind in (CHECKED, RECALLED):
            _put(found, f"gatt/{kind}/{moment}", rates(outcome, trials, kind=kind))
        for family, kind in _families(trials).items():
            by_turn = rates(outcome, trials, kind=kind, family=family)
            found |= {f"gatt/family/{family}/{moment}/turn_{turn}": rate.value for turn, rate in by_turn.items()}
    if "final" in outcomes:
        for name, other in (("over_start", "start"), ("over_chance", "chance")):
            for kind in (CHECKED, RECALLED):
                gaps = differences(outcomes["final"], outcomes[other], trials, kind=kind)
                _put(found, f"gatt/{kind}/{name}", gaps)
    return found


def consistency_table(outcomes: Mapping[str, Outcome], trials: Sequence[Trial]) -> str:
    """The same for people: a block for all that is checked, one for what is recalled, then a line for each family."""
    lines = []
    for kind, title in ((CHECKED, "kept, by checker"), (RECALLED, "recalled, by question")):
        if not any(trial.kind == kind for trial in trials):
            continue
        turns = sorted(outcomes["start"].kept)
        lines.append(f"{title}, % of held-out dialogs" + " " * 6 + "".join(f"{f'turn {turn}':>18}" for turn in turns))
        for moment, outcome in outcomes.items():
            by_turn = rates(outcome, trials, kind=kind)
            lines.append(f"  {_NAMES[moment]:<38}" + "".join(_cell(by_turn.get(turn)) for turn in turns))
        for family, own in _families(trials).items():
            if own == kind:
                cells = "".join(
                    f"{'  '.join(_percent(rates(outcomes[m], trials, kind=kind, family=family).get(turn)) for m in outcomes):>18}"
                    for turn in turns
                )
                lines.append(f"    {family + ', ' + '/'.join(_NAMES[m].split()[0] for m in outcomes):<36}" + cells)
    return "\n".join(lines)


def draw_consistency(outcomes: Mapping[str, Outcome], trials: Sequence[Trial], path: Path) -> None:
    """Consistency by turn, with 95% intervals: all that is checked, all that is recalled, and each family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, str | None]] = []
    for kind, title in ((CHECKED, "kept, by checker"), (RECALLED, "recalled, by question")):
        own = [family for family, of in _families(trials).items() if of == kind]
        if own:
            panels.append((title, kind, None))
            panels += [(family, kind, family) for family in own] if len(own) > 1 else []
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for place, (title, kind, family) in zip(axes, panels, strict=False):
        for moment, outcome in outcomes.items():
            by_turn = rates(outcome, trials, kind=kind, family=family)
            turns = sorted(by_turn)
            values = [by_turn[turn].value for turn in turns]
            errors = [
                [by_turn[turn].value - by_turn[turn].low for turn in turns],
                [by_turn[turn].high - by_turn[turn].value for turn in turns],
            ]
            place.errorbar(
                turns, values, yerr=errors, marker="o", markersize=3, linewidth=1.5, elinewidth=0.8, capsize=2,
                color=_COLOURS[moment], label=_NAMES[moment],
            )  # fmt: skip
        place.set_title(title, fontsize=9.5, loc="left")
        place.set_ylim(-0.03, 1.03)
        place.set_xlabel("turn", fontsize=8)
        place.tick_params(labelsize=7.5)
        place.grid(visible=True, alpha=0.25, linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7.5, frameon=False)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    save_png(figure, path)


def _families(trials: Sequence[Trial]) -> dict[str, str]:
    """Families and how they are measured, in a fixed order."""
    return dict(sorted({trial.family: trial.kind for trial in trials}.items()))


def _put(found: dict[str, float], prefix: str, by_turn: Mapping[int, Rate]) -> None:
    for turn, rate in by_turn.items():
        place = f"{prefix}/turn_{turn}"
        found |= {place: rate.value, f"{place}_low": rate.low, f"{place}_high": rate.high}


def _cell(rate: Rate | None) -> str:
    return f"{'':>18}" if rate is None else f"{f'{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]':>18}"


def _percent(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.value:.0%}"
