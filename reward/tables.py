"""The figures of a run's reward models side by side, as Markdown in the shape of the paper's Tables 7, 8 and 29.

Reads the figures of each model's `summary.json`; a model, a column or a table that nothing is known of is left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import get_args

from llamachat.data.records import RATINGS
from llamachat.runs.inputs import Which
from llamachat.tables import markdown_table
from reward.evaluation import DOMAINS, KIND_TITLES, Domain

Summaries = Mapping[Which, Mapping[str, float]]
_ORDER: tuple[Which, ...] = get_args(Which)
_NOTHING = "-"


def markdown(summaries: Summaries) -> str:
    """Every table that these summaries hold figures for, and how to read them."""
    known: Summaries = {which: summaries[which] for which in _ORDER if which in summaries}
    parts = [
        "# Reward models on the test split",
        "Percent, with 95% intervals that keep the pairs of one prompt together; a tie counts half. A pair is right where"
        " the chosen answer scores higher. No conversation of the test split was trained on.",
    ]
    for domain in DOMAINS:
        parts += _table(
            f"{domain.capitalize()} pairs by file (in the shape of the paper's Table 7)", _by_file(known, domain)
        )
    for domain in DOMAINS:
        heads = {rating: rating.replace("_", " ") for rating in RATINGS}
        parts += _table(
            f"{domain.capitalize()} pairs by rating (in the shape of the paper's Table 8)",
            _by_part(known, domain, heads),
        )
    for domain in DOMAINS:
        parts += _table(
            f"{domain.capitalize()} pairs by what is known of their answers (in the shape of the paper's Table 29)",
            _by_part(known, domain, KIND_TITLES),
        )
    parts += _table("Answers labelled safe or unsafe", _labelled(known))
    return "\n\n".join(parts) + "\n"


def _by_file(summaries: Summaries, domain: Domain) -> list[list[str]]:
    """Rows of the table, the head first; its rows are models, then baselines. Empty without a test pair."""
    files = _files(summaries, domain)
    counted = _anyone(summaries, domain, "pairs")
    if counted is None:
        return []
    rows = [["", "all", *files, "all, less TF-IDF"]]
    rows.append(
        ["pairs", f"{counted:.0f}", *(f"{_anyone(summaries, domain, f'{name}/pairs') or 0:.0f}" for name in files), ""]
    )
    for which, figures in summaries.items():
        place = f"rm/{which}/test/{domain}"
        if f"{place}/accuracy" in figures:
            own = [_with_interval(figures, f"{place}/{name}/accuracy") for name in files]
            gap = _with_interval(figures, f"{place}/tfidf_difference", is_signed=True)
            rows.append([which, _with_interval(figures, f"{place}/accuracy"), *own, gap])
    for which, figures in summaries.items():
        place = f"rm/{which}/test/{domain}"
        if f"{place}/tfidf" in figures:
            own = [_percent(figures, f"{place}/{name}/tfidf") for name in files]
            rows.append([f"TF-IDF on the pairs of {which}", _with_interval(figures, f"{place}/tfidf"), *own, ""])
    for which, figures in summaries.items():
        place = f"rm/{which}/test/{domain}"
        if f"{place}/longer_wins" in figures:
            own = [_percent(figures, f"{place}/{name}/longer_wins") for name in files]
            rows.append(["longer wins", _with_interval(figures, f"{place}/longer_wins"), *own, ""])
            break  # a rule without training is the same beside each model
    return rows


def _by_part(summaries: Summaries, domain: Domain, heads: Mapping[str, str]) -> list[list[str]]:
    """Rows of the table, the head first; empty where no pair has one of these parts."""
    parts = [part for part in heads if _anyone(summaries, domain, f"pairs_{part}") is not None]
    if not parts:
        return []
    rows = [["", *(heads[part] for part in parts), "all pairs"]]
    counts = [_anyone(summaries, domain, f"pairs_{part}") or 0 for part in parts]
    rows.append(["pairs", *(f"{count:.0f}" for count in counts), f"{_anyone(summaries, domain, 'pairs') or 0:.0f}"])
    for which, figures in summaries.items():
        place = f"rm/{which}/test/{domain}"
        if f"{place}/accuracy" in figures:
            own = [_with_interval(figures, f"{place}/accuracy_{part}") for part in parts]
            rows.append([which, *own, _with_interval(figures, f"{place}/accuracy")])
    return rows


def _labelled(summaries: Summaries) -> list[list[str]]:
    columns = {
        "balanced_accuracy": "balanced accuracy",
        "auroc": "AUROC",
        "unsafe_recall": "recall of unsafe below 0.5",
        "unsafe_precision": "precision below 0.5",
        "safe_recall": "recall of safe",
        "unsafe_recall_at_gate": "recall of unsafe below 0.15",
        "unsafe_precision_at_gate": "precision below 0.15",
    }
    rows = []
    for which, figures in summaries.items():
        place = f"rm/{which}"
        if f"{place}/test/unsafe_answers" in figures:
            counts = [f"{figures[f'{place}/test/{side}_answers']:.0f}" for side in ("safe", "unsafe")]
            rows.append([which, " + ".join(counts), *(_with_interval(figures, f"{place}/{name}") for name in columns)])
    return [["", "safe + unsafe", *columns.values()], *rows] if rows else []


def _files(summaries: Summaries, domain: Domain) -> list[str]:
    """Names of the test files in the order of the first model that has them."""
    pattern = re.compile(rf"rm/\w+/test/{domain}/([^/]+)/pairs")
    found = (pattern.fullmatch(name) for figures in summaries.values() for name in figures)
    return list(dict.fromkeys(match[1] for match in found if match))


def _anyone(summaries: Summaries, domain: Domain, name: str) -> float | None:
    """A count of the test pairs: the same for all models, since they are tested on the same."""
    names = ((figures, f"rm/{which}/test/{domain}/{name}") for which, figures in summaries.items())
    return next((figures[full] for figures, full in names if full in figures), None)


def _percent(figures: Mapping[str, float], name: str) -> str:
    return f"{100 * figures[name]:.1f}" if name in figures else _NOTHING


def _with_interval(figures: Mapping[str, float], name: str, *, is_signed: bool = False) -> str:
    sign = "+" if is_signed else ""
    if name not in figures:
        return _NOTHING
    text = f"{100 * figures[name]:{sign}.1f}"
    if f"{name}_low" not in figures:
        return text
    return f"{text} [{100 * figures[f'{name}_low']:{sign}.1f}, {100 * figures[f'{name}_high']:{sign}.1f}]"


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Heading and table; nothing without rows."""
    return [f"## {title}", "\n".join(markdown_table(rows, is_padded=True))] if rows else []
