"""Consistency figures by metric name, as a table and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamachat.answers.consistency import CHECKED, RECALLED, Outcome, Rate, Trial, differences, rates
from llamachat.tables import text_table
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

# Moments in metric names: the policy before and after, and the policy before without an instruction.
MOMENTS = ("start", "final", "chance")
_NAMES = {"start": "before", "final": "after", "chance": "chance (no instruction)"}
_COLOURS = {"start": COLOURS[-1], "final": COLOURS[0], "chance": COLOURS[1]}
_KINDS = ((CHECKED, "kept, by checker"), (RECALLED, "recalled, by question"))


def consistency_figures(outcomes: Mapping[str, Outcome], trials: Sequence[Trial]) -> dict[str, float]:
    """Rates by moment, kind, family and turn, and the differences after - before and after - chance, with intervals."""
    figures: dict[str, float] = {}
    for moment, outcome in outcomes.items():
        for kind in (CHECKED, RECALLED):
            figures |= _by_turn(f"gatt/{kind}/{moment}", rates(outcome, trials, kind=kind))
        for family, kind in _families(trials).items():
            by_turn = rates(outcome, trials, kind=kind, family=family)
            figures |= {f"gatt/family/{family}/{moment}/turn_{turn}": rate.value for turn, rate in by_turn.items()}
    if "final" in outcomes:
        for name, other in (("over_start", "start"), ("over_chance", "chance")):
            for kind in (CHECKED, RECALLED):
                gaps = differences(outcomes["final"], outcomes[other], trials, kind=kind)
                figures |= _by_turn(f"gatt/{kind}/{name}", gaps)
    return figures


def consistency_table(outcomes: Mapping[str, Outcome], trials: Sequence[Trial]) -> str:
    """A readable table: a block for checked constraints, one for recalled values, then a line for each family."""
    lines = []
    turns = sorted(outcomes["start"].kept)
    for kind, title in _KINDS:
        if not any(trial.kind == kind for trial in trials):
            continue
        rows = [(f"{title}, % of held-out dialogs", *(f"turn {turn}" for turn in turns))]
        for moment, outcome in outcomes.items():
            by_turn = rates(outcome, trials, kind=kind)
            rows.append((f"  {_NAMES[moment]}", *(_cell(by_turn.get(turn)) for turn in turns)))
        for family, own in _families(trials).items():
            if own == kind:
                by_moment = [rates(outcome, trials, kind=kind, family=family) for outcome in outcomes.values()]
                cells = ("  ".join(_percent(by_turn.get(turn)) for by_turn in by_moment) for turn in turns)
                rows.append((f"    {family}, {'/'.join(_NAMES[m].split()[0] for m in outcomes)}", *cells))
        lines += text_table(rows, align="<>")
    return "\n".join(lines)


@harmless
def draw_consistency(outcomes: Mapping[str, Outcome], trials: Sequence[Trial], path: Path) -> None:
    """Plot consistency by turn, with 95% intervals: all checked constraints, all recalled values, and each family."""
    panels: list[tuple[str, str, str | None]] = []
    for kind, title in _KINDS:
        own = [family for family, of in _families(trials).items() if of == kind]
        if own:
            panels.append((title, kind, None))
            panels += [(family, kind, family) for family in own] if len(own) > 1 else []
    figure, places = panel_grid(len(panels), panel=(3.4, 2.7), columns=4, share_x=True)
    for place, (title, kind, family) in zip(places, panels, strict=True):
        for moment, outcome in outcomes.items():
            by_turn = rates(outcome, trials, kind=kind, family=family)
            turns = sorted(by_turn)
            by_order = [by_turn[turn] for turn in turns]
            place.errorbar(
                turns,
                [rate.value for rate in by_order],
                yerr=[[rate.value - rate.low for rate in by_order], [rate.high - rate.value for rate in by_order]],
                marker="o",
                markersize=3,
                linewidth=1.5,
                elinewidth=0.8,
                capsize=2,
                color=_COLOURS[moment],
                label=_NAMES[moment],
            )
        place.set_ylim(-0.03, 1.03)
        style_panel(place, title, x="turn", title_points=9.5, tick_points=7.5)
    places[0].legend(fontsize=7.5, frameon=False)
    save_png(figure, path)


def _families(trials: Sequence[Trial]) -> dict[str, str]:
    """Families in a fixed order, and how each is measured."""
    return dict(sorted({trial.family: trial.kind for trial in trials}.items()))


def _by_turn(prefix: str, by_turn: Mapping[int, Rate]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for turn, rate in by_turn.items():
        figures |= rate.named(f"{prefix}/turn_{turn}")
    return figures


def _cell(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _percent(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.value:.0%}"
