"""Policies that say what a table tells them, the prompts that they are sent, and JSON Lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.models.loading import Policy
from tests.tiny_llama import scripted_llama

END_OF_PROMPT = "[/INST]"


@dataclass
class Recording:
    """A chat format that remembers the prompts it was asked to encode."""

    real: Any
    prompts: list[tuple[Message, ...]] = field(default_factory=list)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        self.prompts.append(tuple(messages))
        return self.real.encode_prompt(messages)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def policy_of(model: LlamaForCausalLM, chat_format: Any, **changes: Any) -> Policy:
    settings: dict[str, Any] = {"max_tokens": 128, "system": None, "name": "tiny/sft"}
    return Policy(model=model, tokenizer=chat_format.tokenizer, chat_format=chat_format, **(settings | changes))


def answering(chat_format: ChatFormat, *texts: str) -> LlamaForCausalLM:
    """A model that answers every prompt with one of these texts, each as likely; no piece stands twice in them."""
    tokenizer = chat_format.tokenizer
    last = tokenizer.encode(END_OF_PROMPT)
    answers = [tokenizer.encode(f"{END_OF_PROMPT} {text}")[len(last) :] for text in texts]
    return scripted_llama(*([last[-1], *answer, tokenizer.eos_id] for answer in answers))


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Each record as JSON; a text as it is."""
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
