"""Ghost Attention at toy size: an engine that says what it is given, a recipe over a random base, and what the step left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamachat.chat_format import ChatFormat
from llamachat.constraints.families import families
from llamachat.rollout.engine import Completion, Sampling
from tests.ppo.tiny_ppo import WORDS, write_stopping_base
from tests.sft.tiny_sft import pair, write_dialogs
from tests.tiny_steps import SPLIT, write_values

FIGURES = tuple(f"{first} {last}" for first in ("Ada", "Alan", "Emmy", "Rosa") for last in ("Lee", "Mann", "Noll"))
HOBBIES = (
    "baseball", "bowling", "chess", "cooking", "dancing", "fishing", "golf", "hiking", "knitting", "reading", "sailing",
    "tennis",
)  # fmt: skip
ALL = families(lists={"figures": FIGURES, "hobbies": HOBBIES, "languages": ("Greek", "Latin", "Welsh", "Zulu")})
STEP: dict[str, Any] = {
    "dialogs": 24,
    "turns": 3,
    "families": ["no_questions", "quoted", "hobby"],
    "most_constraints": 1,
    "samples_per_turn": 3,
    "recall_share": 0.5,
    "evaluation_turns": [1, 2],
    "evaluation_dialogs": 6,
}
CUT = "<cut>"  # at the end of a scripted answer: it did not come to its end


@dataclass
class ScriptedEngine:
    """A rollout engine whose n-th call returns the n-th list of answers, `samples_per_prompt` for each prompt."""

    chat_format: ChatFormat
    script: list[list[list[str]]]  # calls, prompts, samples
    prompts: list[list[str]] = field(default_factory=list)  # what was asked in each call, as text
    samplings: list[Sampling] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        answers = self.script[len(self.prompts)]
        self.prompts.append([text_of(self.chat_format, ids) for ids in prompts])
        self.samplings.append(sampling)
        assert [len(group) for group in answers] == [samples_per_prompt] * len(prompts), (answers, self.prompts[-1])
        return [[self._completion(text) for text in group] for group in answers]

    def _completion(self, text: str) -> Completion:
        ids = self.chat_format.tokenizer.encode(text.removesuffix(CUT))
        if not text.endswith(CUT):
            ids = [*ids, *self.chat_format.stop_ids]
        return Completion(tuple(ids), (0.0,) * len(ids), is_finished=not text.endswith(CUT))


def text_of(chat_format: ChatFormat, ids: Sequence[int]) -> str:
    """A prompt as a person would read it: turns by their tags, an end of an answer as </s>."""
    tokenizer, parts, begun = chat_format.tokenizer, [], list[int]()
    for token in [*ids, tokenizer.eos_id]:
        if token == tokenizer.eos_id:
            parts.append(tokenizer.decode(begun).strip())
            begun = []
        elif token != tokenizer.bos_id:
            begun.append(token)
    return " </s>".join(parts)


def sampling(seed: int = 0) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=seed)


def write_roomy_base(folder: Path, sentencepiece_model: bytes) -> Path:
    """A random base whose answers end after some tokens, with room for several turns."""
    return write_stopping_base(folder, sentencepiece_model, max_position_embeddings=512)


def talks(count: int) -> list[list[dict[str, Any]]]:
    """Dialogs of one to three turns with different openings."""
    return [
        [
            message
            for turn in range(1 + number % 3)
            for message in pair(f"What is the {WORDS[(number + turn) % len(WORDS)]} {number:o}?", "the cat")
        ]
        for number in range(count)
    ]


def write_recipe(path: Path, base: Path, /, *, steps: list[Any] | None = None, **changes: Any) -> Path:
    """A recipe of one step, without anything that scores; `changes` go over its sections, key by key."""
    folder = path.parent
    lists = {"figures": FIGURES, "hobbies": HOBBIES}
    for name, entries in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{entry}\n" for entry in entries))
    values: dict[str, dict[str, Any]] = {
        "base": {"max_tokens": 400},
        "data": {"sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl", talks(60)))}], "split": SPLIT},
        "sft": {"learning_rate": 1e-4},
        "gatt": {**STEP, "lists": {name: str(folder / f"{name}.txt") for name in lists}},
    }
    return write_values(path, base, values, steps=steps or ["gatt"], **changes)
