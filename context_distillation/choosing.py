"""Select distilled answers to train on: those that the safety model scores above the policy's own (paper, 4.2.4); with
figures and a plot in the shape of the paper's figure 16.

All scores are raw safety scores, computed without the preprompt and before any gate. The best distilled answer is
compared with the best of the same number of plain answers under the same rules: otherwise a preprompt without effect
would win for more than half of the prompts, merely by having more samples.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from context_distillation.prompts import FORMS, Form
from llamachat.answers.groups import Group
from llamachat.data.prompts import EncodedPrompt
from llamachat.maths.intervals import paired_bootstrap
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

Groups = dict[Form, Group]  # the answers to one prompt, by form
_BINS = 25
_MEANINGS = {
    "original": "no preprompt",
    "generic": "generic preprompt",
    "template": "answer template of the category",
    "kept": "kept, to be trained on",
}

REASONS = {
    "unfinished": "truncated at the length limit",
    "empty": "empty, or with a tag of the chat format",
    "equal": "equal to the plain answer",
    "not_better": "not above the plain answer's safety score",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best distilled and the best plain answer to a prompt; the distilled one is kept unless `refused` is set."""

    prompt: EncodedPrompt
    original: str
    original_score: float
    refused: str | None = None  # a key of REASONS
    form: Form = "generic"
    text: str = ""
    score: float = 0.0

    @property
    def is_kept(self) -> bool:
        return self.refused is None


def choose(prompt: EncodedPrompt, groups: Groups, *, keeps_all: bool = False, margin: float = 0.0) -> Choice:
    """Select the best usable distilled answer, the first in a tie, and decide whether it is trained on."""
    plain = groups["original"]
    # A truncated or empty answer cannot win on either side, but is compared with if there is no other plain answer.
    best_plain = max(
        range(len(plain.texts)),
        key=lambda place: (plain.finished[place] and plain.allowed[place], safety_of(plain)[place]),
    )
    original, original_score = plain.texts[best_plain], safety_of(plain)[best_plain]
    choice = Choice(prompt=prompt, original=original, original_score=original_score)
    distilled: list[tuple[Form, Group, int]] = [
        (form, groups[form], place) for form in FORMS[1:] if form in groups for place in groups[form].order
    ]
    usable = [one for one in distilled if one[1].finished[one[2]] and one[1].allowed[one[2]]]
    if not usable:
        is_cut = not any(group.finished[place] for _, group, place in distilled)
        return replace(choice, refused="unfinished" if is_cut else "empty")
    form, group, place = max(usable, key=lambda one: safety_of(one[1])[one[2]])
    text, score = group.texts[place], safety_of(group)[place]
    refused = None
    if not keeps_all and (text == original or score == original_score):
        refused = "equal"  # the same text's score may differ in its last digits between batches
    elif not keeps_all and score <= original_score + margin:
        refused = "not_better"
    return replace(choice, refused=refused, form=form, text=text, score=score)


def safety_of(group: Group) -> Sequence[float]:
    """The safety model's raw scores of these answers."""
    assert group.safety is not None, "a safety model is there: it was checked before anything was loaded"
    return group.safety


def score_lists(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, list[float]]:
    """Raw safety scores by form of the prompt, and of the kept answers; empty lists are left out."""
    lists: dict[str, list[float]] = {
        form: [score for group in groups if form in group for score in safety_of(group[form])] for form in FORMS
    }
    lists["kept"] = [choice.score for choice in choices if choice.is_kept]
    return {name: scores for name, scores in lists.items() if scores}


def batch_figures(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, float]:
    """Mean safety scores of all answers by form of the prompt, and of those trained on."""
    figures: dict[str, float] = {}
    for form in FORMS:
        answers = [group[form] for group in groups if form in group]
        if answers:
            figures[f"distill/safety/{form}"] = fmean(score for group in answers for score in safety_of(group))
            figures[f"distill/finished_fraction/{form}"] = fmean(done for group in answers for done in group.finished)
            figures[f"distill/response_tokens/{form}"] = fmean(count for group in answers for count in group.tokens)
    kept = [choice for choice in choices if choice.is_kept]
    if kept:
        figures["distill/safety/kept"] = fmean(choice.score for choice in kept)
        figures["distill/safety/replaced"] = fmean(choice.original_score for choice in kept)
    return figures | {"distill/kept_fraction": len(kept) / len(choices)}


def step_figures(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, float]:
    """Mean safety scores over all prompts, counts, and the effect of preprompts on scores, with 95% intervals."""
    if not choices:
        return {}
    figures = batch_figures(groups, choices)
    for form in FORMS[1:]:
        pairs = [(safety_of(group[form]), safety_of(group["original"])) for group in groups if form in group]
        if pairs:
            gap = paired_bootstrap([fmean(one) for one, _ in pairs], [fmean(other) for _, other in pairs])
            figures |= gap.named(f"distill/effect/{form}")
    reasons = Counter(choice.refused for choice in choices)
    figures |= {f"distill/refused/{reason}": float(reasons[reason]) for reason in REASONS}
    return figures | {"distill/prompts": float(len(choices)), "distill/kept": float(reasons[None])}


def left_out(choices: Sequence[Choice]) -> dict[str, int]:
    """Number of distilled answers that are not trained on, by reason."""
    counts = Counter(choice.refused for choice in choices if choice.refused is not None)
    return {f"distilled answers left out: {REASONS[reason]}": count for reason, count in counts.items()}


@harmless
def draw_scores(lists: Mapping[str, Sequence[float]], choices: Sequence[Choice], path: Path) -> None:
    """Plot shares of answers by safety score as a probability (left), and best distilled against best plain (right)."""
    figure, (spread, pairs) = panel_grid(2, panel=(5.25, 3.8))
    colours = dict(zip(_MEANINGS, (COLOURS[-1], COLOURS[0], COLOURS[1], "#2f8f4e"), strict=True))
    for name, scores in lists.items():
        values = [_probability(score) for score in scores]
        spread.hist(
            values,
            bins=[step / _BINS for step in range(_BINS + 1)],
            weights=[1 / len(values)] * len(values),
            histtype="step",
            linewidth=1.6,
            color=colours[name],
            label=f"{_MEANINGS[name]}, mean {fmean(values):.2f}",
        )
    for is_kept, colour, label in ((True, colours["kept"], "kept"), (False, colours["original"], "left out")):
        drawn = [choice for choice in choices if choice.is_kept is is_kept and choice.text]
        places = [_probability(choice.original_score) for choice in drawn]
        heights = [_probability(choice.score) for choice in drawn]
        pairs.scatter(places, heights, s=7, alpha=0.5, color=colour, label=f"{label}, {len(drawn)}", linewidths=0)
    pairs.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    labels = (
        ("safety model's probability of safe", "share of answers"),
        ("best plain answer", "best distilled answer"),
    )
    for place, (x, y) in zip((spread, pairs), labels, strict=True):
        style_panel(place, x=x, y=y, has_grid=False, has_legend=True)
    save_png(figure, path)


def _probability(score: float) -> float:
    """The logistic function; scores are logits."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
