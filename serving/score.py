"""Score a file of answers with a reward model and write JSON Lines: each record with its scores.

Reads dialogs (adds `score` for the last answer), preferences (adds `score_chosen`, `score_rejected`) and the output of
`llamachat sample` (adds `score` to each completion), in any format accepted for training. Scores are raw, without a
sigmoid. The output is written atomically. An answer that is too long for the reward model, or a sampled answer that
is not valid in a dialog, such as an empty one, gets the score null and is counted; neither is an error in the file.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.chat_format.dialog import Dialog, DialogError, Message, check_message
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.problems import Problem, problem, report
from llamachat.data.records import Preference, Row, as_prompt
from llamachat.errors import DataError, UsageError
from llamachat.models.reward_model import RewardModel
from llamachat.runs.outputs import check_output, written_beside
from llamachat.tables import plural
from serving.answer_files import as_written, progress

log = logging.getLogger(__name__)

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """Counts of scored records, and accuracy on pairs."""

    records: int
    answers: int
    without: int  # answers without a score
    pairs: int  # pairs with two scores
    accuracy: float | None  # share of pairs whose chosen answer scores higher; a tie counts half


@dataclass(frozen=True, slots=True)
class _Scorable:
    """A record as written back, and its answers' ids; None for an answer that cannot be scored."""

    record: dict[str, Any]
    kind: str  # dialog, preference or completions
    answers: list[Ids | None]


def score_file(model: RewardModel, path: Path, out: Path | None, *, overwrite: bool = False) -> tuple[Scored, str]:
    """Score every answer of a file; return the records as JSON Lines and write them to `out` if given."""
    if out is not None:
        check_output(out, [path], overwrite=overwrite)
    records = _read(model, path)
    rows = [ids for item in records for ids in item.answers if ids is not None]
    with progress(len(rows), "scored", "answers") as advance:
        remaining_scores = iter(model.score_ids(rows, advance=advance).tolist() if rows else [])
    scores = [[None if ids is None else next(remaining_scores) for ids in item.answers] for item in records]
    text = "".join(f"{json.dumps(_with_scores(*pair), default=str)}\n" for pair in zip(records, scores, strict=True))
    if out is not None:
        with written_beside(out) as stream:
            stream.write(text.encode())
    without = sum(map(len, scores)) - len(rows)
    if without:
        log.warning("%s: score null for %s (too long, empty, or with a tag)", path, plural(without, "answer"))
    pairs = [pair for item, pair in zip(records, scores, strict=True) if item.kind == "preference" and None not in pair]
    return Scored(len(records), len(rows), without, len(pairs), _accuracy(pairs)), text


def score_turns(model: RewardModel, turns: Sequence[str]) -> float:
    """The score of the last of these turns, which alternate between user and assistant."""
    if len(turns) % 2:
        raise UsageError(
            f"-m: {len(turns)} given, but the last one is the answer that is scored. Give question and answer in turn: "
            "-m QUESTION -m ANSWER."
        )
    messages = [Message("assistant" if index % 2 else "user", turn) for index, turn in enumerate(turns)]
    try:
        model.chat_format.check_text(messages)
        ids = model.encode(messages)
    except DialogError as error:
        raise UsageError(f"-m: {error}") from error
    return float(model.score_ids([ids])[0])


def _read(model: RewardModel, path: Path) -> list[_Scorable]:
    """Every record of the file in order; one error lists all bad lines."""
    rows = list(read_rows(str(path)))
    sampled = {row.line for row in rows if isinstance(row.value, Mapping) and "completions" in row.value}
    problems: list[Problem] = []
    records: list[tuple[int, _Scorable]] = []
    without = 0
    for is_sampled in (False, True):
        part = [row for row in rows if (row.line in sampled) == is_sampled]
        kind = "prompt" if is_sampled else None
        for parsed in parse_rows(part, path=str(path), kind=kind, forbidden=model.chat_format.forbidden):
            without += parsed.record is None and not parsed.problems
            encoded = _encoded(model, parsed, is_sampled=is_sampled)
            if isinstance(encoded, _Scorable):
                records.append((parsed.line, encoded))
            else:
                problems += encoded
    if problems:
        raise DataError(report(sorted(problems, key=lambda fault: fault.line), path))
    if not records:
        raise DataError(
            f"{path}: holds no answer. There is nothing to score. Give dialogs, preferences or completions."
        )
    if without:
        log.warning("%s: no answer in %s", path, plural(without, "row"))
    return [item for _, item in sorted(records, key=lambda pair: pair[0])]


def _encoded(model: RewardModel, parsed: Row, *, is_sampled: bool) -> _Scorable | Sequence[Problem]:
    """The record with its answers as ids, or its problems; no problems for an empty row of a known data set."""
    if parsed.record is None:
        return parsed.problems
    record = as_written(parsed.value, parsed.record)
    if is_sampled:
        return _with_completions(model, as_prompt(parsed.record).messages, record, parsed.line)
    if isinstance(parsed.record, Preference):
        return _Scorable(
            record, "preference", _ids(model, parsed.record.prompt, parsed.record.chosen, parsed.record.rejected)
        )
    if isinstance(parsed.record, Dialog):
        return _Scorable(record, "dialog", _ids(model, parsed.record.messages[:-1], parsed.record.messages[-1]))
    fix = "Sample answers with `llamachat sample`, or give dialogs or preferences."
    return [problem(parsed.line, "completions", "is missing: a prompt alone has no score.", fix)]


def _with_completions(
    model: RewardModel, prompt: Sequence[Message], record: dict[str, Any], line: int
) -> _Scorable | list[Problem]:
    completions = record.get("completions")
    if (
        not isinstance(completions, list)
        or not completions
        or not all(isinstance(item, Mapping) and isinstance(item.get("text"), str) for item in completions)
    ):
        fix = 'Write "completions": [{"text": "..."}], as `llamachat sample` does.'
        return [problem(line, "completions", "is no list of objects with a 'text', the answer.", fix)]
    return _Scorable(
        record, "completions", [_ids(model, prompt, Message("assistant", item["text"]))[0] for item in completions]
    )


def _ids(model: RewardModel, prompt: Sequence[Message], *answers: Message) -> list[Ids | None]:
    """The ids of each answer to a prompt; None for all if one is too long or not valid in a dialog."""
    try:
        for answer in answers:
            check_message(answer, "answer")
        return [*model.encode_answers(prompt, answers)]
    except DialogError:
        return [None] * len(answers)


def _with_scores(item: _Scorable, scores: Sequence[float | None]) -> dict[str, Any]:
    if item.kind == "dialog":
        return {**item.record, "score": scores[0]}
    if item.kind == "preference":
        return {**item.record, "score_chosen": scores[0], "score_rejected": scores[1]}
    completions = [
        {**completion, "score": score} for completion, score in zip(item.record["completions"], scores, strict=True)
    ]
    return {**item.record, "completions": completions}


def _accuracy(pairs: Sequence[Sequence[float | None]]) -> float | None:
    if not pairs:
        return None
    wins = 0.0
    for chosen, rejected in pairs:
        assert chosen is not None and rejected is not None, "the others are left out"
        wins += 0.5 if chosen == rejected else float(chosen > rejected)
    return wins / len(pairs)
