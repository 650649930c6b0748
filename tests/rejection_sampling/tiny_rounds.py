"""Rounds of rejection sampling at toy size: a recipe over a random base, a reward function in a file, and what they left."""

from pathlib import Path
from typing import Any

from llamachat.answers.groups import Group
from llamachat.chat_format import TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import SentencePieceBackend, Tokenizer
from llamachat.runs.artifacts import Artifact, StepFolder
from tests.fakes import train_sentencepiece
from tests.ppo.tiny_ppo import write_function, write_prompts
from tests.sft.tiny_sft import toy_dialogs, write_dialogs
from tests.tiny_llama import publish_policy, scripted_llama
from tests.tiny_steps import SPLIT, sampled_in, write_values

ROUND: dict[str, Any] = {
    "samples_per_prompt": 6,
    "sweep_temperatures": [0.8, 1.2],
    "sweep_prompts": 4,
    "sweep_samples": 4,
    "validation_prompts": 6,
    "test_prompts": 8,
}


def write_recipe(
    path: Path, base: Path, /, *, steps: list[Any] | None = None, prompts: int = 60, **changes: Any
) -> Path:
    """A recipe of one round whose reward counts the letter t; `changes` go over its sections, key by key."""
    folder = path.parent
    if not (folder / "prompts.jsonl").exists():
        write_prompts(folder / "prompts.jsonl", prompts)
    values: dict[str, dict[str, Any]] = {
        "base": {"max_tokens": 96},
        "data": {
            "sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "split": SPLIT,
        },
        "scoring": {"combine": write_function(folder / "letter.py")},
        "rejection_sampling": ROUND,
    }
    return write_values(path, base, values, steps=steps or ["rs"], **changes)


def paris(folder: Path, vocabulary: int = 420) -> Artifact:
    """A policy that says Paris, whatever it is asked."""
    chat_format = load_chat_format(
        "llama2", Tokenizer(SentencePieceBackend(train_sentencepiece(vocab_size=vocabulary)))
    )
    example = chat_format.encode_dialog(
        (Message("user", "What?"), Message("assistant", "Paris")), train_on=TrainOn.EVERY_ANSWER
    )
    first = example.loss_mask.index(True)
    model = scripted_llama(list(dict.fromkeys(example.input_ids[first - 1 :])))  # it has a space on both sides
    return publish_policy(folder, model, chat_format, base="large")


def groups_of(step: StepFolder) -> list[Group]:
    """All groups that the round sampled, training side first."""
    return [Group(**values) for values in sampled_in(step)]
