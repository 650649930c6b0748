"""Sample a policy's answers to a file of prompts and write JSON Lines: each record with its `completions`.

Reads prompts, dialogs and preferences (their context up to the last user turn), in any format accepted for training.
Writes `completions: [{"text", "finished", "logprob"}]`; `logprob` is the sum over the answer's tokens, including the
stop token, under the sampling distribution, in nats. The output is written atomically.
"""

import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamachat.chat_format.dialog import Message, with_system
from llamachat.chat_format.format import fit
from llamachat.data.problems import Problem
from llamachat.data.records import Prompt, Row
from llamachat.errors import UsageError
from llamachat.models.loading import Policy
from llamachat.rollout.engine import Completion, Sampling
from llamachat.runs.outputs import check_output, written_beside
from llamachat.tables import plural
from serving.answer_files import as_written, progress, read_prompts, too_long
from serving.context import longest_dialog, open_engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Counts of what was written."""

    prompts: int
    completions: int
    finished: int  # completions that ended within max_new_tokens
    shortened: int  # prompts whose oldest turns were dropped to fit


@dataclass(frozen=True, slots=True)
class _Question:
    """A record of the file as written back, and its encoded prompt."""

    record: dict[str, Any]
    messages: tuple[Message, ...]
    is_shortened: bool


def sample_file(
    policy: Policy,
    prompts_in: Path,
    out: Path,
    *,
    samples_per_prompt: int,
    sampling: Sampling,
    rows_per_batch: int | None = None,
    overwrite: bool = False,
) -> Sampled:
    """Sample `samples_per_prompt` answers to every prompt of a file and write them to another file.

    In fp32 the output does not depend on `rows_per_batch`.
    """
    if samples_per_prompt < 1:
        raise UsageError(
            f"-n: {samples_per_prompt} answers per prompt were requested. At least 1 is sampled. Raise it."
        )
    check_output(out, [prompts_in], overwrite=overwrite)
    engine = open_engine(policy, rows_per_batch=rows_per_batch)
    limit = longest_dialog(policy, engine)
    make = partial(_question, policy, limit=limit, max_new_tokens=sampling.max_new_tokens)
    questions = read_prompts(prompts_in, forbidden=policy.chat_format.forbidden, make=make)
    shortened = sum(question.is_shortened for question in questions)
    if shortened:
        log.warning("%s: oldest turns dropped to fit %d tokens: %s", prompts_in, limit, plural(shortened, "prompt"))
    encoded = [policy.chat_format.encode_prompt(question.messages) for question in questions]
    with progress(len(encoded) * samples_per_prompt, "sampled", "answers") as advance:
        groups = engine.generate(encoded, samples_per_prompt=samples_per_prompt, sampling=sampling, advance=advance)
    lines = [
        json.dumps(
            {**question.record, "completions": [_described(policy, completion) for completion in group]}, default=str
        )
        for question, group in zip(questions, groups, strict=True)
    ]
    with written_beside(out) as stream:
        stream.writelines(f"{line}\n".encode() for line in lines)
    return Sampled(
        prompts=len(questions),
        completions=sum(map(len, groups)),
        finished=sum(completion.is_finished for group in groups for completion in group),
        shortened=shortened,
    )


def _question(policy: Policy, row: Row, prompt: Prompt, *, limit: int, max_new_tokens: int) -> _Question | Problem:
    messages = with_system(prompt.messages, policy.system)
    fitting = fit(policy.chat_format, messages, limit=limit, max_new_tokens=max_new_tokens)
    if fitting is None:
        return too_long(row.line, limit=limit, policy="this policy")
    return _Question(as_written(row.value, prompt), fitting, is_shortened=len(fitting) < len(messages))


def _described(policy: Policy, completion: Completion) -> dict[str, Any]:
    return {
        "text": policy.chat_format.decode_answer(completion.token_ids),
        "finished": completion.is_finished,
        "logprob": math.fsum(completion.logprobs),
    }
