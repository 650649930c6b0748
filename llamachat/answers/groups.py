"""K answers to each prompt, scored and ranked: the candidates of the steps that make dialogs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from llamachat.answers.responses import Response, sample
from llamachat.answers.session import AnswerSession
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import RolloutEngine, Sampling
from llamachat.scoring.combining import ranking
from llamachat.scoring.standardising import Constants, standardise

Q = TypeVar("Q")

ANSWERS_PER_BATCH = (
    1024  # sampled and stored together: many rows keep an engine busy, few are lost when the step is killed
)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The model to sample from instead of the session's policy; it encodes prompts with its own chat format."""

    engine: RolloutEngine
    chat_format: ChatFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The K answers to one prompt; a list has one value for each, and is None if there is no such model."""

    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    allowed: list[bool]  # not empty, and valid in the chat format
    helpfulness: list[float] | None
    safety: list[float] | None
    combined: list[float]
    standardised: list[float]  # the combined score in standard deviations of the starting policy's
    order: list[int]  # their indices, best first

    @property
    def candidates(self) -> list[int]:
        """The answers that could be trained on, best first: finished, allowed, each text once."""
        seen: set[str] = set()
        places = []
        for place in self.order:
            if self.finished[place] and self.allowed[place] and self.texts[place] not in seen:
                seen.add(self.texts[place])
                places.append(place)
        return places


def batches_of(prompts: Sequence[Q], samples_per_prompt: int) -> list[tuple[Q, ...]]:
    """The prompts, in whatever form, in batches of bounded size, always the same: each batch has its own seed."""
    size = max(1, ANSWERS_PER_BATCH // samples_per_prompt)
    return [tuple(prompts[first : first + size]) for first in range(0, len(prompts), size)]


def sample_groups(
    session: AnswerSession,
    prompts: Sequence[EncodedPrompt],
    samplings: Sequence[tuple[Sampling, int]],
    constants: Constants,
    *,
    sampler: Sampler | None = None,
) -> list[Group]:
    """The answers to each prompt, one number of answers per sampling, scored and ranked.

    Answers of another sampler are scored by their texts: its token ids may mean something else to the reward models.
    """
    engine, chat_format, encoded = session.engine, session.chat_format, list(prompts)
    if sampler is not None:
        engine, chat_format = sampler.engine, sampler.chat_format
        encoded = [replace(prompt, ids=tuple(chat_format.encode_prompt(prompt.messages))) for prompt in prompts]
    by_prompt: list[list[Response]] = [[] for _ in prompts]
    for sampling, count in samplings:
        responses = sample(engine, chat_format, encoded, sampling, samples_per_prompt=count)
        for index, (group, prompt) in enumerate(zip(by_prompt, prompts, strict=True)):
            own = responses[index * count : (index + 1) * count]
            group += [replace(response, prompt=prompt) for response in own]
    return scored_groups(session, by_prompt, constants, reads_text=sampler is not None)


def scored_groups(
    session: AnswerSession, by_prompt: Sequence[Sequence[Response]], constants: Constants, *, reads_text: bool = False
) -> list[Group]:
    """Groups of these answers, the same number for each prompt."""
    count = len(by_prompt[0])
    responses = [response for group in by_prompt for response in group]
    scored = session.scorer.score(responses, with_judge=False, reads_text=reads_text)
    order = ranking(scored.combined, samples_per_prompt=count).tolist()
    on_scale_B = standardise(scored.scores, scored.combined, constants)
    by_model = {name: scores_B.tolist() for name, scores_B in scored.scores.by_model().items()}
    combined, standardised = scored.combined.scores_B.tolist(), on_scale_B.tolist()

    groups = []
    for index, group in enumerate(by_prompt):
        own = slice(index * count, (index + 1) * count)
        scores = {name: values[own] for name, values in by_model.items()}
        groups.append(
            Group(
                texts=[response.text for response in group],
                tokens=[len(response.ids) for response in group],
                finished=[response.is_finished for response in group],
                allowed=[is_allowed(session.chat_format, response.text) for response in group],
                helpfulness=scores.get("helpfulness"),
                safety=scores.get("safety"),
                combined=combined[own],
                standardised=standardised[own],
                order=order[index],
            )
        )
    return groups


def is_allowed(chat_format: ChatFormat, text: str) -> bool:
    """Whether the answer is valid in a dialog: it is not empty and contains no tag of the chat format."""
    if not text.strip():
        return False
    try:
        chat_format.check_text([Message("assistant", text)])
    except DialogError:
        return False
    return True
