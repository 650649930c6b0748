"""The winners of a round, and the pool of all rounds' winners (Llama 2, arXiv:2307.09288, section 3.2.3).

"Top-performing samples from all prior iterations" are pooled, since training on the last round alone made models
forget. Earlier winners are read from the dialogs published by their steps (a user may have edited them) and scored
again with the current models, all from their texts, so that scores differ only by answer.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llamachat.answers.dialog_step import SAMPLED, dialog_line
from llamachat.answers.groups import Group
from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scorer
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.sections import DataSource
from llamachat.data.files import read_rows
from llamachat.data.loading import fraction, read_records
from llamachat.data.prompts import EncodedPrompt
from llamachat.runs.artifacts import DIALOGS

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact


Choice = TypeVar("Choice")
Key = tuple[tuple[str, str], ...]  # roles and texts of the prompt's messages


@dataclass(frozen=True, slots=True)
class Winner:
    """The answer selected for a prompt in a round."""

    prompt: EncodedPrompt
    text: str
    round: str  # the step that sampled it
    tokens: int = 0
    score: float = 0.0  # combined, raw; from sampling, or from the current models if winners were scored again
    is_unsafe: bool = False  # below the gate's threshold, ranks below all others; set only when scored again

    @property
    def key(self) -> Key:
        """Identifies a prompt by its messages."""
        return tuple((message.role, message.content) for message in self.prompt.messages)


def winners_of(
    prompts: Sequence[EncodedPrompt], groups: Sequence[Group], step: str, *, draw_seed: int | None = None
) -> list[Winner]:
    """One eligible answer per prompt that has any: the best, or with `draw_seed` a random one."""
    winners = []
    for prompt, group in zip(prompts, groups, strict=True):
        if candidates := group.candidates:
            place = candidates[0]
            if draw_seed is not None:  # sorted by text, so that the draw is independent of the scores
                place = _drawn(sorted(candidates, key=group.texts.__getitem__), prompt, salt=f"{draw_seed} {step}")
            winners.append(
                Winner(prompt, group.texts[place], step, tokens=group.tokens[place], score=group.combined[place])
            )
    return winners


def _drawn(choices: Sequence[Choice], prompt: EncodedPrompt, *, salt: str) -> Choice:
    """A uniformly drawn choice that depends only on the prompt and the salt."""
    position = fraction("\n".join(message.content for message in prompt.messages), salt=f"winner {salt}")
    return choices[int(position * len(choices))]


def filtered(groups: Iterable[Group]) -> dict[str, int]:
    """Number of ineligible answers by reason; an answer with two reasons counts under the first."""
    counts: Counter[str] = Counter()
    for group in groups:
        seen: set[str] = set()
        for text, is_finished, is_allowed in zip(group.texts, group.finished, group.allowed, strict=True):
            if not is_finished:
                counts["answers left out: truncated at the length limit"] += 1
            elif not is_allowed:
                counts["answers left out: empty, or with a tag of the chat format"] += 1
            elif text in seen:
                counts["answers left out: the same as another one to the prompt"] += 1
            seen.add(text)
        if not group.candidates:
            counts["prompts left out: no answer is left"] += 1
    return dict(counts)


def earlier_winners(
    pooled: "Mapping[str, Artifact]", chat_format: ChatFormat, *, max_tokens: int, dropped: Counter[str]
) -> list[Winner]:
    """Read the winners of earlier rounds from their files; each file also contains those of the rounds before it.

    Adds the number of dropped winners to `dropped`, by reason.
    """
    winners: list[Winner] = []
    for step, artifact in pooled.items():
        path = artifact.path / DIALOGS
        if not path.is_file() or path.stat().st_size == 0:
            continue
        records = read_records(DataSource(path=str(path), format="native"), Dialog, forbidden=chat_format.forbidden)
        origins = [_origin(row.value) for row in read_rows(str(path))]
        for dialog, origin in zip(records, origins, strict=True):
            *context, answer = dialog.messages
            messages = tuple(Message(message.role, message.content) for message in context)
            ids = tuple(chat_format.encode_prompt(messages))
            if len(ids) > max_tokens or not answer.content.strip():
                dropped["earlier winners left out: empty, or longer than the models read"] += 1
                continue
            prompt = EncodedPrompt(messages, ids, bool(origin.get("is_safety")), str(origin.get("id") or ""))
            winners.append(Winner(prompt, answer.content, str(origin.get("round") or step)))
    return _each_once(winners)


def pooled_winners(
    scorer: Scorer,
    own: Sequence[Winner],
    earlier: Sequence[Winner],
    *,
    keeps_all: bool,
    draw_seed: int | None = None,
) -> list[Winner]:
    """All distinct winners, or one per prompt: the best, or with `draw_seed` a random one. Where winners may compete for a
    prompt, all are scored again with the current models.

    Of equal winners the earlier round's is kept. Prompts keep their first order, with earlier rounds first.
    """
    scored = _each_once([*earlier, *own])
    # A single winner per prompt is compared with no other, so it keeps the score from sampling.
    if earlier or len({winner.key for winner in scored}) < len(scored):
        scored = _scored_again(scorer, scored)
    if keeps_all:
        return scored
    by_prompt: dict[Key, list[Winner]] = {}
    for winner in scored:
        by_prompt.setdefault(winner.key, []).append(winner)
    if draw_seed is not None:
        return [_drawn(winners, winners[0].prompt, salt=f"{draw_seed} pool") for winners in by_prompt.values()]
    return [min(winners, key=lambda winner: (winner.is_unsafe, -winner.score)) for winners in by_prompt.values()]


def _each_once(winners: Sequence[Winner]) -> list[Winner]:
    """Keep the first of identical answers to a prompt."""
    once: dict[tuple[Key, str], Winner] = {}
    for winner in winners:
        once.setdefault((winner.key, winner.text), winner)
    return list(once.values())


def _scored_again(scorer: Scorer, winners: Sequence[Winner]) -> list[Winner]:
    if not winners:
        return []
    responses = [
        Response(prompt=winner.prompt, ids=(), logprobs=(), is_finished=True, text=winner.text) for winner in winners
    ]
    combined = scorer.score(responses, with_judge=False, reads_text=True).combined
    scores, unsafe = combined.scores_B.tolist(), combined.is_unsafe_B.tolist()
    return [
        replace(winner, score=score, is_unsafe=is_unsafe)
        for winner, score, is_unsafe in zip(winners, scores, unsafe, strict=True)
    ]


def winner_line(winner: Winner) -> str:
    """The published JSON line of a winner."""
    origin = {
        "round": winner.round,
        "id": winner.prompt.name,
        "is_safety": winner.prompt.is_safety,
        "score": round(winner.score, 6),
    }
    return dialog_line(winner.prompt.messages, winner.text, origin)


def _origin(row: object) -> Mapping[str, Any]:
    origin = row.get(SAMPLED) if isinstance(row, Mapping) else None
    return origin if isinstance(origin, Mapping) else {}
