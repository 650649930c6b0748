"""`llamachat dashboard --workspace`: a wandb workspace with the curves that matter, arranged by stage of the recipe.

What stands where is plain values (`layout`); panels and units come from the table of metrics. Only `save_workspace` needs
the package wandb-workspaces and an account. One thing surprises: the panels of a stage have the stage's own steps as
x-axis, but those of the system have wandb's, which is the same number in all runs.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamachat.errors import ServerError, UsageError
from llamachat.tracking.metrics import metric_of
from llamachat.tracking.wandb_run import has_key

NAME = "llamachat"
TURNS = (1, 2, 4, 6)  # at which Ghost Attention is measured where a recipe says nothing else
_PACKAGE = "wandb-workspaces"
_WANDB_STEP = "Step"
_RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
_KINDS = ("safe_unsafe", "both_safe", "both_unsafe")
_SCORES = ("score", "reward_helpfulness", "reward_safety", "judge")
_REWARD_MODELS = {"helpfulness": "helpfulness", "safety": "safety", "judge": "helpfulness"}  # with what it is tested on

# Curves by section: title, first part of the axis (None: wandb's own), names in the order of their panels.
_CURVES: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("Supervised tuning", "sft", ("sft/loss", "sft/eval_loss", "sft/finished_fraction", "sft/answer_tokens")),
    *(
        (
            f"Reward model: {which}",
            f"rm/{which}",
            tuple(
                f"rm/{which}/{name}"
                for name in (
                    *("loss", "ranking_loss", "eval_loss", "accuracy", "eval_accuracy"),
                    *("score_chosen", "score_rejected", "auxiliary_loss"),
                )
            ),
        )
        for which in _REWARD_MODELS
    ),
    (
        "Rejection sampling",
        "rs",
        tuple(
            f"rs/{name}"
            for name in (
                *("reward_best", "reward_median", "reward_mean", "standardised_best"),
                *("usable_fraction", "finished_fraction", "response_tokens"),
            )
        ),
    ),
    (
        "Ghost Attention",
        "gatt",
        tuple(f"gatt/{name}" for name in ("kept_fraction", "passing_fraction", "mended_fraction", "answer_tokens")),
    ),
    (
        "Context distillation",
        "distill",
        (
            *(f"distill/safety/{name}" for name in ("original", "generic", "template", "kept", "replaced")),
            "distill/kept_fraction",
        ),
    ),
    (
        "PPO",
        "ppo",
        tuple(
            f"ppo/{name}"
            for name in (
                *(
                    "reward/combined",
                    "reward/helpfulness",
                    "reward/safety",
                    "kl_to_reference",
                    "heldout/kl_to_reference",
                ),
                *("heldout/score", "heldout/reward_helpfulness", "heldout/reward_safety", "heldout/judge"),
                *("reward/gate_fraction", "truncated_fraction", "clip_fraction", "response_tokens"),
                *("entropy", "approx_kl", "kl_coef", "policy_loss", "value_loss", "explained_variance"),
            )
        ),
    ),
    (
        "System",
        None,
        (
            *("memory/peak_gib", "throughput/tokens_per_s", "throughput/rollout_tokens_per_s"),
            *(
                "time/step_s",
                "time/rollout_s",
                "time/score_s",
                "time/update_s",
                "optim/grad_norm",
                "optim/learning_rate",
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: curves over `x`, or bars of final figures."""

    kind: Literal["curves", "bars"]
    title: str
    names: tuple[str, ...]
    x: str = ""


@dataclass(frozen=True, slots=True)
class PanelSection:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]
    is_open: bool


def layout(turns: Sequence[int] = TURNS) -> list[PanelSection]:
    """The sections in the order of the recipe; `turns` are those at which Ghost Attention is measured."""
    sections = []
    for title, prefix, names in _CURVES:
        axis = _WANDB_STEP if prefix is None else f"{prefix}/step"
        panels = [*_curves(names, axis), *_bars(prefix, turns)]
        sections.append(PanelSection(title, tuple(panels), is_open=prefix is not None))
    return sections


def _curves(names: Iterable[str], axis: str) -> list[Panel]:
    """A panel for each panel of the table that these metrics are drawn in."""
    by_panel: dict[str, list[str]] = {}
    for name in names:
        by_panel.setdefault(metric_of(name).panel, []).append(name)
    return [Panel("curves", _title(panel, group), tuple(group), axis) for panel, group in by_panel.items()]


def _bars(prefix: str | None, turns: Sequence[int]) -> list[Panel]:
    """What is one figure at the end: tests of reward models by rating, and each policy against the one before."""
    if prefix is None or prefix == "sft":
        return []
    if prefix.startswith("rm/"):
        which = prefix.removeprefix("rm/")
        place = f"{prefix}/test/{_REWARD_MODELS[which]}/accuracy"
        names = [place, *(f"{place}_{part}" for part in (*_RATINGS, *_KINDS))]
        return [Panel("bars", f"{metric_of(place).panel} by rating, and by which answers are safe", tuple(names))]
    if prefix == "gatt":
        names = [f"gatt/consistency/{told}/turn_{turn}" for turn in turns for told in ("start", "final")]
    else:
        names = [f"{prefix}/test/difference/{score}" for score in _SCORES]
    return [Panel("bars", _title(metric_of(names[0]).panel, names), tuple(names))]


def _title(panel: str, names: Sequence[str]) -> str:
    units = sorted({metric_of(name).unit for name in names} - {"1", "", "fraction"})
    return f"{panel} ({', '.join(units)})" if units else panel


def save_workspace(project: str, *, turns: Sequence[int] = TURNS) -> str:
    """Make the workspace in the user's wandb project and return its address."""
    workspaces, panels = _packages()
    if not has_key():
        raise UsageError(
            "dashboard --workspace: there is no wandb key on this machine. The workspace is kept in your wandb account,"
            " beside the runs. Run `wandb login`, send offline runs with `wandb sync`, then give this command again."
        )
    try:
        entity = os.environ.get("WANDB_ENTITY") or _default_entity()
        sections = [_section(workspaces, panels, section) for section in layout(turns)]
        workspace = workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
        return str(workspace.save().url)
    except Exception as error:  # wandb's own errors, those of its transport, and refusals of the server
        raise ServerError(
            f"dashboard --workspace: wandb did not take the workspace ({(str(error) or repr(error)).splitlines()[0]})."
            f" It has to reach wandb's server, and the project '{project}' to be there with a run. Send a run first with"
            " `wandb sync`, look after the network and `wandb login --verify`, then give this command again."
        ) from error


def _section(workspaces: Any, panels: Any, section: PanelSection) -> Any:
    made = [
        panels.LinePlot(title=panel.title, x=panel.x, y=list(panel.names))
        if panel.kind == "curves"
        else panels.BarPlot(title=panel.title, metrics=list(panel.names))
        for panel in section.panels
    ]
    return workspaces.Section(name=section.title, panels=made, is_open=section.is_open)


def _packages() -> tuple[Any, Any]:
    # Read when wandb is imported: its crash reports carry local variables.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        from wandb_workspaces import workspaces  # pyright: ignore[reportMissingImports]
        from wandb_workspaces.reports import v2  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"dashboard --workspace: {_PACKAGE} cannot be imported ({error}). It is what describes sections and panels to"
            f" wandb, and is not installed by itself. Run `{sys.executable} -m pip install -c constraints.txt {_PACKAGE}`."
        ) from error
    return workspaces, v2


def _default_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)
