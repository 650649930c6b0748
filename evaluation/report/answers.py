"""Sample answers side by side: of the evaluation, else the last that the last policy's step wrote down."""

from collections.abc import Sequence
from typing import Any

from evaluation.report.facts import Facts
from evaluation.report.page import Answer, Block, Sample, Section, Text, number
from llamachat.runs.reader import RunStep, SampledAnswer
from llamachat.runs.record import STEP, SamplesRecord

_LONGEST_TITLE = 90
_SCORES = {
    "reward_helpfulness": "helpfulness",
    "reward_safety": "safety",
    "reward_combined": "combined",
    "judge": "judge",
}
_WARNING = (
    "What follows was written by models, some of it in answer to prompts that ask for harm. It may be offensive or wrong, "
    "and nothing in it is advice."
)


def answers(facts: Facts, count: int) -> Section | None:
    """So many prompts with all policies' answers; kinds of prompts in turn, so that few still show each."""
    if not count:
        return None
    samples = _of_evaluation(facts, count) if facts.evaluation is not None else []
    source = "Every policy answered the same prompts, sampled alike."
    if not samples:
        step = next((step for step in reversed(facts.policies) if step.folder.samples.is_file()), None)
        if step is None:
            return None
        samples = _of_step(step, count)
        source = f"No evaluation lays answers side by side; these are the last that the step {step.name} wrote down."
    if not samples:
        return None
    blocks: list[Block] = [Text(_WARNING, tone="missing"), Text(source), *samples]
    return Section("Answers side by side", "answers", blocks)


def _of_evaluation(facts: Facts, count: int) -> list[Sample]:
    assert facts.evaluation is not None
    by_kind: dict[str, list[Sample]] = {}
    for sampled in facts.evaluation.samples:
        prompt = [(str(one.get("role", "user")), str(one.get("content", ""))) for one in sampled.prompt]
        said = [
            Answer(policy, sampled.answers[policy].text, _known(sampled.answers[policy]))
            for policy in facts.evaluation.policies
            if policy in sampled.answers
        ]
        by_kind.setdefault(sampled.kind, []).append(Sample(_title(sampled.kind, prompt), prompt, said))
    chosen: list[Sample] = []
    depth = max((len(found) for found in by_kind.values()), default=0)
    for place in range(depth):
        chosen += [found[place] for found in by_kind.values() if place < len(found)]
    return chosen[:count]


def _of_step(step: RunStep, count: int) -> list[Sample]:
    rows = [one for one in SamplesRecord(step.folder.samples).read() if "prompt" in one and "answer" in one]
    last = max((int(one[STEP]) for one in rows), default=0)
    found = []
    for one in [one for one in rows if one[STEP] == last][:count]:
        prompt = [("", str(one["prompt"]))]
        said = Answer(step.name, str(one["answer"]), _length(one.get("tokens"), one.get("finished")))
        found.append(Sample(_title("", prompt), prompt, [said]))
    return found


def _title(kind: str, prompt: Sequence[tuple[str, str]]) -> str:
    text = " ".join(prompt[-1][1].split()) if prompt else ""
    short = text if len(text) <= _LONGEST_TITLE else f"{text[: _LONGEST_TITLE - 3]}..."
    return f"{kind}: {short}" if kind else short


def _known(answer: SampledAnswer) -> str:
    scores = [
        f"{label} {number(value)}" for key, label in _SCORES.items() if (value := answer.scores.get(key)) is not None
    ]
    return ", ".join([*([length] if (length := _length(answer.tokens, answer.finished)) else []), *scores])


def _length(tokens: Any, is_finished: Any) -> str:
    cut = ", cut by the limit" if is_finished is False else ""
    return f"{tokens} tokens{cut}" if tokens is not None else ""
