"""Which distilled answers are learnt: those that the safety model puts above the policy's own (paper, section 4.2.4).

All scores are of an answer to the prompt without the preprompt, raw, before any gate. With several samples the best
distilled answer is compared with the best plain one: against a single or a mean plain answer, more samples alone would win.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from context_distillation.asking import WAYS, Way
from llamachat.answers.groups import Group
from llamachat.data.prompts import EncodedPrompt

Groups = dict[Way, Group]  # the answers to one prompt, by how they were asked for

REASONS = {
    "unfinished": "cut by the length limit",
    "empty": "empty, or with a tag of the chat format",
    "equal": "equal to the plain answer",
    "not_better": "not above the plain answer's safety score",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best distilled answer to a prompt beside the best plain one; it is learnt where no reason speaks against it."""

    prompt: EncodedPrompt
    original: str
    original_score: float
    refused: str | None = None  # a key of REASONS
    way: Way = "generic"
    text: str = ""
    score: float = 0.0

    @property
    def is_kept(self) -> bool:
        return self.refused is None


def choose(prompt: EncodedPrompt, groups: Groups, *, keeps_all: bool = False, margin: float = 0.0) -> Choice:
    """The best usable distilled answer, and whether it is learnt; of equal ones the first."""
    plain = safety_of(groups["original"])
    best_plain = max(range(len(plain)), key=plain.__getitem__)
    original, original_score = groups["original"].texts[best_plain], plain[best_plain]
    distilled: list[tuple[Way, Group, int]] = [
        (way, groups[way], place) for way in WAYS[1:] if way in groups for place in groups[way].order
    ]
    usable = [one for one in distilled if one[1].finished[one[2]] and one[1].allowed[one[2]]]
    if not usable:
        is_cut = not any(group.finished[place] for _, group, place in distilled)
        return Choice(
            prompt=prompt,
            original=original,
            original_score=original_score,
            refused="unfinished" if is_cut else "empty",
        )
    way, group, place = max(usable, key=lambda one: safety_of(one[1])[one[2]])
    text, score = group.texts[place], safety_of(group)[place]
    refused = None
    if not keeps_all and (text == original or score == original_score):
        refused = "equal"  # the same text's score may move in its last digits with the batch that it is read in
    elif not keeps_all and score <= original_score + margin:
        refused = "not_better"
    return Choice(
        prompt=prompt,
        original=original,
        original_score=original_score,
        refused=refused,
        way=way,
        text=text,
        score=score,
    )


def safety_of(group: Group) -> Sequence[float]:
    """The safety model's raw scores of these answers."""
    assert group.safety is not None, "a safety model is there: it was checked before anything was loaded"
    return group.safety


def score_lists(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, list[float]]:
    """Raw safety scores by how the answers were asked for, and of the kept ones; a list that is empty is left out."""
    found = {way: [score for group in groups if way in group for score in safety_of(group[way])] for way in WAYS}
    lists: dict[str, list[float]] = {**found, "kept": [choice.score for choice in choices if choice.is_kept]}
    return {name: scores for name, scores in lists.items() if scores}
