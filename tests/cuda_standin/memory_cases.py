"""Peaks of memory in shape mode: the cases of `benchmarks/memory.py`, and PPO as a preset runs it, on models of any size."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.memory import Case
from pipelines.recipe.recipe import Recipe, load
from tests.cuda_standin.device import Device

PROMPT, ANSWER = 104, 152  # tokens: answers have the share of a row that `plan` assumes
ROWS = 16  # responses of an iteration: rows of 1024 tokens are filled


def cases_of(recipe: Recipe) -> list[Case]:
    """The steps of a preset, with rows of the preset's length."""
    method, longest = recipe.tuning.method, recipe.base.max_tokens
    sft, reward, ppo = recipe.sections.sft, recipe.sections.reward, recipe.sections.ppo
    cases = [
        Case("sft", method, tokens=longest, checkpointing=sft.gradient_checkpointing),
        Case("rm", method, tokens=longest, checkpointing=reward.gradient_checkpointing),
    ]
    if any(step.stage.command == "ppo" for step in recipe.steps):
        row = 1024 if ppo.tokens_per_microbatch == "auto" else ppo.tokens_per_microbatch
        cases.append(Case("rollout", method, tokens=512, rows=64, new_tokens=32))
        cases.append(
            Case(
                "ppo",
                method,
                tokens=PROMPT,
                rows=ROWS,
                new_tokens=ANSWER,
                row_tokens=row,
                checkpointing=ppo.gradient_checkpointing,
            )
        )
    return [replace(case, attention="auto") for case in cases]


def peaks(device: Device, folder: str, cases: list[dict[str, Any]], rank: int) -> list[dict[str, int]]:
    """Of each case (the fields of a `Case`): bytes of the loaded models, and the peaks of what is allocated and reserved."""
    import benchmarks.memory as memory
    import benchmarks.workers.memory_case as worker

    memory.RANK = rank
    _without_values()
    measured = []
    for fields in cases:
        case = Case(**fields)
        with TemporaryDirectory() as scratch:
            for model in Path(folder).iterdir():
                (Path(scratch) / model.name).symlink_to(model)
            measured.append(
                _peaks_of(device, lambda case=case, place=Path(scratch): worker._OPEN[case.step](case, place))
            )
    return measured


def ppo_peaks(
    device: Device, preset: str, settings: list[str], folder: str, responses: int, prompt_tokens: int
) -> dict[str, int]:
    """Of PPO as the preset runs it with these settings, but for the number of responses, which are as long as they may be.

    A policy, two reward models and a judge are adapters on one base.
    """
    from benchmarks.workers.memory_case import PROMPTS, open_iterations
    from llamachat.config.sections import Run, Tracking
    from llamachat.models.loading import attach_adapter, load_base
    from llamachat.models.reward_model import build_reward_model
    from llamachat.models.start_checks import proved_start
    from llamachat.runs.artifacts import StepFolder
    from llamachat.runs.inputs import StepInputs
    from tests.llamachat.models.tiny_roles import labelled
    from tests.reward.rewarding import publish_reward_model
    from tests.tiny_llama import publish_policy

    _without_values()
    recipe = load(preset, [f"base.model={folder}/base", *settings])
    base, tuning = recipe.base, recipe.tuning
    with TemporaryDirectory() as scratch:
        place = Path(scratch)

        def publish() -> dict[str, Any]:
            """A policy and a reward model, which three roles take."""
            chat_format = proved_start(base, tuning, None)[1]
            model: Any = attach_adapter(load_base(base, device="auto", is_nf4=tuning.method == "qlora"), tuning, seed=0)
            policy = publish_policy(place / "policy", model, chat_format, base=base.model, max_tokens=base.max_tokens)
            del model
            start = build_reward_model(base, tuning, policy=policy, seed=0, device="auto")
            scores = publish_reward_model(start, base, place / "reward")
            models = {"helpfulness": scores, "safety": labelled(scores), "judge": scores}
            return {"policy": policy, "reward_models": models}

        inputs = StepInputs(
            step="ppo",
            folder=StepFolder(place / "ppo"),
            identity={},
            fingerprint="",
            run=Run(dir=scratch),
            base=base,
            tuning=tuning,
            tracking=Tracking(mode="off"),
            data=PROMPTS,
            rollout=recipe.sections.rollout,
            scoring=recipe.sections.scoring,
            **publish(),
        )
        sizes = {"responses_per_iteration": responses, "responses_per_minibatch": responses // 2}
        config = recipe.sections.ppo.model_copy(update=sizes | {"validation_prompts": 4, "test_prompts": 4})
        return _peaks_of(device, lambda: open_iterations(config, inputs, prompt_tokens=prompt_tokens))


def _peaks_of(device: Device, open_steps: Callable[[], Callable[[], object]]) -> dict[str, int]:
    gc.collect()
    device.empty_cache()
    before = device.allocated
    steps = open_steps()
    gc.collect()
    device.empty_cache()
    device.reset_peaks()
    loaded = device.allocated
    steps()
    return {
        "loaded": loaded - before,
        "allocated": device.peak_allocated - before,
        "reserved": device.peak_reserved - before,
    }


def _without_values() -> None:
    """No weight is read: none has a value, and together they may be larger than the machine's memory. Scores are drawn."""
    import torch

    import benchmarks.workers.memory_case as worker
    import llamachat.models.loading as loading
    import llamachat.models.open_roles as open_roles
    import llamachat.models.reward_model as reward_model
    import llamachat.models.roles as roles

    plain = roles.score_rows
    worker._touched = lambda model: None
    for module in (loading, open_roles, reward_model):
        setattr(module, "trunk_digest", lambda *_, **__: "0" * 64)  # noqa: B010  # of a module
    roles.RoleBank.frozen_digest = lambda self: "0" * 64
    roles.score_rows = lambda *arguments, **named: torch.randn_like(plain(*arguments, **named))
