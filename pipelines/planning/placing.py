"""Which weights the roles of PPO would share, read from the recipe and manifests alone: what `plan` counts.

The rule is `place_reward_models`, by which a role bank opens them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamachat.errors import LlamachatError
from llamachat.memory.estimates import BYTES, Shape, shape_of
from llamachat.memory.role_bytes import Beside, place_reward_models
from llamachat.runs.artifacts import read_artifact
from llamachat.scoring.requirements import MODELS, ModelName, RewardModelFacts, models_read
from pipelines.execution.resolve import earlier_makers, step_folder
from pipelines.recipe.recipe import Recipe, Step, resolve_steps
from pipelines.recipe.stages import POLICY


@dataclass(slots=True)
class Placing:
    """Where the models of one PPO step would lie."""

    is_continued: bool = False  # whether the policy that it starts from is an adapter
    sharing: int = 0  # reward models that are one more adapter on a trunk which is there anyway
    beside: dict[str, Beside] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Model:
    """A reward model, before it is loaded."""

    weights: tuple[str, bool]  # what is under its adapter and whether that is in 4 bits, or its own place
    is_adapter: bool
    shape: Shape


def place_roles(recipe: Recipe, step: Step, shape: Shape) -> Placing:
    """Where each reward model that the step reads would lie; `shape` is that of the base."""
    steps = resolve_steps(recipe)
    found = Placing(is_continued=step.tuning.method != "full" and _starts_from_adapter(recipe, steps, step))
    width = BYTES[recipe.base.dtype]

    def share(name: str, model: _Model, trunk: tuple[str, bool]) -> None:
        found.sharing += 1

    def load(name: str, model: _Model) -> tuple[str, bool] | None:
        is_4bit = model.weights[1]
        found.beside[name] = Beside(model.shape, width=width, is_4bit=is_4bit, has_adapter=model.is_adapter)
        return model.weights if model.is_adapter else None

    place_reward_models(
        dict(_reward_models(recipe, steps, step, shape)),
        (_under(recipe, steps, step), step.tuning.method == "qlora"),
        carries=lambda trunk, model: model.is_adapter and model.weights == trunk,
        share=share,
        load=load,
    )
    return found


def _reward_models(recipe: Recipe, steps: Sequence[Step], step: Step, shape: Shape) -> Iterator[tuple[str, _Model]]:
    """Those that the way of scoring reads, and the judge."""
    models: dict[str, _Model] = {}
    for role, makers in earlier_makers(steps, step).items():
        if role.which and makers:
            models[role.which] = _made(recipe, steps, makers[0], shape)
    for name in MODELS:
        place = getattr(recipe.scoring, name)
        if place is not None:
            models[name] = _named(place, shape)
    known: dict[ModelName, RewardModelFacts] = {name: RewardModelFacts(name, None) for name in MODELS if name in models}
    for name in (*models_read(recipe.scoring, known), "judge"):
        if name in models:
            yield name, models[name]


def _made(recipe: Recipe, steps: Sequence[Step], maker: Step, shape: Shape) -> _Model:
    if maker.tuning.method == "full":
        return _Model((_place(step_folder(recipe, maker).artifact), False), False, shape)
    return _Model((_under(recipe, steps, maker), maker.tuning.method == "qlora"), True, shape)


def _named(place: str, shape: Shape) -> _Model:
    """A model that `scoring` names: one of ours, or a plain one."""
    details = _details(place, "reward_model")
    if details.get("method") in ("lora", "qlora"):
        base = str(details["base"])
        return _Model((_place(base), details["method"] == "qlora"), True, shape_of(base) or shape)
    return _Model((_place(place), False), False, shape_of(str(details.get("path", place))) or shape)


def _under(recipe: Recipe, steps: Sequence[Step], step: Step) -> str:
    """The place of the weights that a step's adapters sit on."""
    makers = earlier_makers(steps, step).get(POLICY)
    if makers:
        maker = makers[0]
        is_full = maker.tuning.method == "full"
        return _place(step_folder(recipe, maker).artifact) if is_full else _under(recipe, steps, maker)
    if recipe.base.policy:
        details = _details(recipe.base.policy, "policy")
        is_adapter = details.get("method") in ("lora", "qlora")
        return _place(details["base"] if is_adapter else details.get("path", recipe.base.policy))
    return _place(recipe.base.model)


def _starts_from_adapter(recipe: Recipe, steps: Sequence[Step], step: Step) -> bool:
    makers = earlier_makers(steps, step).get(POLICY)
    if makers:
        return makers[0].tuning.method != "full"
    return bool(recipe.base.policy) and _details(recipe.base.policy, "policy").get("method") in ("lora", "qlora")


def _details(place: str, kind: Any) -> dict[str, Any]:
    """What the manifest says, and the artifact's own folder as `path`; nothing of what is no artifact of ours.

    What is wrong with it is told where it is read; a plan goes on.
    """
    try:
        artifact = read_artifact(Path(place).expanduser(), kind)
    except LlamachatError:
        return {}
    return artifact.manifest.details | {"path": str(artifact.path)}


def _place(name: Path | str) -> str:
    """One name for one folder; names of the hub stay."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or isinstance(name, Path) else str(name)
