"""Reward models at toy size: a base, policies on it, and reward models published as a stage does it."""

from pathlib import Path
from typing import Any

import torch

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.config.sections import Base, Tuning
from llamachat.models.loading import attach_adapter, load_base, policy_details
from llamachat.models.reward_model import RewardStart, build_reward_model, save_reward_model
from llamachat.runs.artifacts import Artifact, Manifest, StepFolder, publish
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import base_section, move_adapter, publish_policy

TUNINGS = {
    "full": Tuning(method="full"),
    "lora": Tuning(method="lora", rank=4, alpha=8),
    "qlora": Tuning(method="qlora", rank=4, alpha=8),
}


def dialog(*turns: str) -> list[Message]:
    return [Message("assistant" if index % 2 else "user", turn) for index, turn in enumerate(turns)]


DIALOGS = [
    dialog("Hello", "the cat sat on the mat"),
    dialog("What is the capital of France?", "Paris"),
    dialog("the cat", "a model", "Thanks!", "You are welcome. " * 3),
    dialog("one sentence", "the weather and the other cat and the capital of France " * 2),
]


def base_of(folder: Path, sentencepiece: bytes, method: str = "full") -> Base:
    """A base in the format that the method trains in: fp32 where it may be."""
    path = folder / "base"
    if not path.exists():
        write_base(path, sentencepiece, max_position_embeddings=256)
    return base_section(path, dtype="bfloat16" if method == "qlora" else "float32", max_tokens=160)


def policy_on(base: Base, method: str, folder: Path, chat_format: ChatFormat) -> Artifact:
    """A published policy whose adapter, if it has one, matters."""
    model: Any = load_base(base, is_nf4=method == "qlora")
    if method != "full":
        model = attach_adapter(model, TUNINGS[method], seed=5)
        move_adapter(model)
    return publish_policy(folder / "policy" / "sft", model, chat_format, base=base.model)


def start_on(base: Base, method: str, policy: Artifact | None = None) -> RewardStart:
    return build_reward_model(base, TUNINGS[method], policy=policy, seed=1, device="cpu")


def move(model: torch.nn.Module) -> None:
    """Give head and adapter weights that matter, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and (".lora_B" in name or "score" in name):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def publish_reward_model(start: RewardStart, base: Base, folder: Path, **details: Any) -> Artifact:
    """Publish the model as the step rm/safety of the run `folder`."""

    def write(place: Path) -> None:
        save_reward_model(start.model, place)
        write_tokenizer(start.chat_format.tokenizer, place, start.chat_format.chat_template)

    defaults: dict[str, Any] = {
        "base": start.trunk,
        "chat_format": "llama2",
        "max_tokens": base.max_tokens,
        "system": None,
    }
    manifest = Manifest(
        kind="reward_model",
        step="rm/safety",
        fingerprint="0" * 64,
        identity={},
        seed=0,
        details=policy_details(start.model, **(defaults | details)),
    )
    return publish(StepFolder(folder / "rm" / "safety"), manifest, write)


def trained(folder: Path, sentencepiece: bytes, method: str, **details: Any) -> tuple[Artifact, RewardStart]:
    """A published reward model with weights that matter, and the model in memory."""
    base = base_of(folder, sentencepiece, method)
    start = start_on(base, method)
    move(start.model)
    return publish_reward_model(start, base, folder / "run", **details), start
