"""Answers and settings that the tests of scoring share."""

from typing import Any

import torch
from torch import tensor

from llamachat.chat_format.dialog import Message
from llamachat.config.loading import from_plain
from llamachat.config.sections import Scoring
from llamachat.scoring.scores import Answers


def scoring(**values: Any) -> Scoring:
    return from_plain(Scoring, values)


def answers(count: int, *, is_safety: list[bool] | None = None, **columns: list[Any]) -> Answers:
    return Answers(
        prompts=[(Message("user", f"question {index}"),) for index in range(count)],
        completions=[f"answer {'x' * index}" for index in range(count)],
        is_safety_prompt_B=tensor(is_safety or [False] * count),
        is_finished_B=torch.ones(count, dtype=torch.bool),
        columns=columns,
    )
