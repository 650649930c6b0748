"""Policies side by side for people: a line a figure, a column a policy."""

from collections.abc import Mapping

from evaluation.figures import Figure

_BESIDE = 3  # policies in a block: with them a line has a hundred columns
_LINES = (
    ("reward_helpfulness", "helpfulness", "{:.2f}"),
    ("reward_safety", "safety", "{:.2f}"),
    ("score", "combined, deviations of the first", "{:.2f}"),
    ("difference/score", "  less the first's", "{:+.2f}"),
    ("judge", "judge", "{:.2f}"),
    ("difference/judge", "  less the first's", "{:+.2f}"),
    ("difference/judge_like_length", "  the same, answers of like length", "{:+.2f}"),
    ("win_rate/reward_combined", "wins by the combined score", "{:.0%}"),
    ("win_rate/judge", "wins by the judge", "{:.0%}"),
    ("violation", "violations, by the safety model", "{:.0%}"),
    ("refusal", "refusals of adversarial prompts", "{:.0%}"),
    ("false_refusal", "false refusals", "{:.0%}"),
    ("kl_to_reference", "KL to the first, nats a response", "{:.2f}"),
    ("response_tokens", "tokens", "{:.1f}"),
    ("finished_fraction", "ended with EOS", "{:.0%}"),
    ("distinct_2", "distinct-2", "{:.2f}"),
)


def figures_table(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    """The figures with their 95% intervals, some policies at a time; consistency by turn comes last."""
    found = next(iter(figures.values()))
    turns = [
        (name, f"instruction kept at {name.rpartition('/')[2].replace('_', ' ')}", "{:.0%}")
        for name in found
        if name.startswith("consistency/")
    ]
    lines: list[str] = []
    names = list(figures)
    for first in range(0, len(names), _BESIDE):
        policies = names[first : first + _BESIDE]
        lines.append(f"{'':<36}" + "".join(f"{policy:>21}" for policy in policies))
        for name, meaning, form in (*_LINES, *turns):
            cells = [_cell(figures[policy].get(name), form) for policy in policies]
            if any(cells):
                lines.append(f"  {meaning:<34}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def _cell(figure: Figure | None, form: str) -> str:
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return form.format(figure.value)
    return f"{form.format(figure.value)} [{form.format(figure.low)}, {form.format(figure.high)}]"
