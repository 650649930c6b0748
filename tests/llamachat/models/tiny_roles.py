"""Policies and reward models at toy size, published as stages publish them, with weights as if they were trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import Base, Tuning
from llamachat.models.loading import attach_adapter, load_base
from llamachat.models.open_roles import open_roles
from llamachat.models.reward_model import build_reward_model
from llamachat.models.roles import RoleBank
from llamachat.runs.artifacts import Artifact
from tests.reward.rewarding import publish_reward_model
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import base_section, publish_policy

FULL = Tuning()
QLORA = Tuning(method="qlora", rank=4, alpha=8)
ROWS = [[1, 270, 279, 383, 357], [1, 331, 262], [1, 289, 300, 310, 20, 33, 45, 7]]
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


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


def make_reward_model(run: Path, base: Base, tuning: Tuning, *, policy: Artifact | None, seed: int) -> Artifact:
    """A reward model built from the policy, then moved, head and all."""
    start = build_reward_model(base, tuning, policy=policy, seed=seed, device="cpu")
    disturb(start.model, seed=seed, scale=0.02 if tuning.method == "full" else 0.1)
    return publish_reward_model(start, base, run)


def labelled(artifact: Artifact) -> Artifact:
    """The same reward model, whose manifest says that it learnt from labels."""
    details = artifact.manifest.details | {"safety_labels": 9}
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"details": details}))


class World:
    """Policies by the method they were made with, and two reward models and a judge for each."""

    def __init__(
        self,
        folder: Path,
        chat_format: ChatFormat,
        sentencepiece_model: bytes,
        write: Callable[..., Path] = write_base,
    ) -> None:
        """`write` makes the base: a folder, the tokenizer's model, and a dtype."""
        (folder / "base16").mkdir()
        self.base = base_section(write(folder / "base", sentencepiece_model))
        written = write(folder / "base16" / "base", sentencepiece_model, dtype=torch.bfloat16)
        self.base16 = base_section(written, dtype="bfloat16")
        self.folder, self.chat_format = folder, chat_format
        self._artifacts: dict[str, Artifact] = {}

    def policy(self, tuning: Tuning, *, seed: int = 1) -> Artifact:
        return self._once(
            f"policy-{tuning.method}-{seed}",
            lambda step: make_policy(step, self.chat_format, self._base(tuning), tuning, seed=seed),
        )

    def reward_model(self, role: str, tuning: Tuning, policy: Tuning, *, policy_seed: int = 1) -> Artifact:
        seed = {"helpfulness": 2, "safety": 3, "judge": 4}[role]
        begins_as = self.policy(policy, seed=policy_seed)
        return self._once(
            f"{role}-{tuning.method}-on-{policy.method}-{policy_seed}",
            lambda run: make_reward_model(run, self._base(tuning, policy), tuning, policy=begins_as, seed=seed),
        )

    def bank(self, tuning: Tuning, policy_tuning: Tuning, /, *, critic: Any = "separate", **changes: Any) -> RoleBank:
        arguments: dict[str, Any] = {
            "policy": self.policy(policy_tuning),
            "base": self._base(tuning, policy_tuning),
            "tuning": tuning,
            "reward_models": {
                role: self.reward_model(role, tuning, policy_tuning) for role in ("helpfulness", "safety")
            },
            "critic": critic,
            "seed": 5,
            "device": "cpu",
        }
        return open_roles(**(arguments | changes))

    def _base(self, *tunings: Tuning) -> Base:
        return self.base16 if QLORA in tunings else self.base

    def _once(self, name: str, make: Callable[[Path], Artifact]) -> Artifact:
        if name not in self._artifacts:
            self._artifacts[name] = make(self.folder / "runs" / name)
        return self._artifacts[name]


def weight_bytes(bank: RoleBank) -> int:
    """Bytes of every weight there is, each counted once, whatever roles share it."""
    storages: dict[int, int] = {}
    for weight in (weight for module in bank._modules() for weight in module.parameters()):
        state: Any = getattr(weight, "quant_state", None)
        parts = [weight.data] if state is None else [weight.data, state.absmax, state.state2.absmax]
        for storage in (part.untyped_storage() for part in parts):
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
