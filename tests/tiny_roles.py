"""Policies and reward models at toy size, published as stages publish them, with weights as if they were trained."""

from pathlib import Path
from typing import Any

import torch

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import Base, Tuning
from llamachat.models.loading import attach_adapter, load_base
from llamachat.models.reward_model import build_reward_model, reward_model_details, save_reward_model
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.folder import StepFolder
from llamachat.tokenizer import write_tokenizer
from tests.tiny_llama import publish_policy


def disturb(model: torch.nn.Module, *, seed: int, scale: float = 0.1) -> None:
    """Move everything that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * scale)


def make_policy(step: Path, chat_format: ChatFormat, base: Base, tuning: Tuning, *, seed: int = 1) -> Artifact:
    """A policy tuned from the base by this method."""
    model: Any = load_base(base, is_nf4=tuning.method == "qlora")
    if tuning.method != "full":
        model = attach_adapter(model, tuning, seed=seed)
    disturb(model, seed=seed, scale=0.02 if tuning.method == "full" else 0.1)
    return publish_policy(step, model, chat_format, base=base.model)


def make_reward_model(
    step: Path, base: Base, tuning: Tuning, *, policy: Artifact | None, seed: int = 1, system: str | None = None
) -> Artifact:
    """A reward model built from the policy, then moved, head and all."""
    start = build_reward_model(base, tuning, policy=policy, seed=seed, device="cpu")
    disturb(start.model, seed=seed, scale=0.02 if tuning.method == "full" else 0.1)

    def write(folder: Path) -> None:
        save_reward_model(start.model, folder)
        write_tokenizer(start.chat_format.tokenizer, folder, start.chat_format.chat_template)

    details = reward_model_details(
        start.model, base=start.trunk, chat_format=start.chat_format.name, max_tokens=base.max_tokens, system=system
    )
    manifest = Manifest(
        kind="reward_model", step=step.name, fingerprint="0" * 64, identity={}, seed=seed, details=details
    )
    return publish(StepFolder(step), manifest, write)
