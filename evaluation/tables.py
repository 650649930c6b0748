"""Policies side by side for people: a line a figure, a column a policy."""

from collections.abc import Mapping

from evaluation.figures import Figure

_LINES = (
    ("reward_helpfulness", "helpfulness", "{:.3f}"),
    ("reward_safety", "safety", "{:.3f}"),
    ("score", "combined, in deviations of the first", "{:.3f}"),
    ("difference/score", "  less the first's", "{:+.3f}"),
    ("judge", "judge", "{:.3f}"),
    ("difference/judge", "  less the first's", "{:+.3f}"),
    ("difference/judge_like_length", "  the same, answers of like length", "{:+.3f}"),
    ("win_rate/reward_combined", "wins by the combined score", "{:.0%}"),
    ("win_rate/judge", "wins by the judge", "{:.0%}"),
    ("violation", "violations, by the safety model", "{:.1%}"),
    ("refusal", "refusals of adversarial prompts", "{:.1%}"),
    ("false_refusal", "false refusals", "{:.1%}"),
    ("kl_to_reference", "KL to the first, nats a response", "{:.2f}"),
    ("response_tokens", "tokens", "{:.1f}"),
    ("finished_fraction", "ended with EOS", "{:.1%}"),
    ("distinct_2", "distinct-2", "{:.3f}"),
)


def figures_table(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    """The figures with their 95% intervals; consistency by turn comes last."""
    found = next(iter(figures.values()))
    turns = [(name, f"instruction kept at {name.rpartition('/')[2].replace('_', ' ')}", "{:.0%}") for name in found
             if name.startswith("consistency/")]  # fmt: skip
    lines = [f"{'':<40}" + "".join(f"{policy:>26}" for policy in figures)]
    for name, meaning, form in (*_LINES, *turns):
        cells = [_cell(by_name.get(name), form) for by_name in figures.values()]
        if any(cells):
            lines.append(f"  {meaning:<38}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(figure: Figure | None, form: str) -> str:
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return form.format(figure.value)
    return f"{form.format(figure.value)} [{form.format(figure.low)}, {form.format(figure.high)}]"
