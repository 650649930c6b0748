"""The content of the report: finished steps of a run, their evaluation, and what is missing."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from llamachat.runs.inputs import StepInputs
from llamachat.runs.reader import Curve, Evaluation, RunStep, command_of, step_of

_WORTH = {
    "sft": "a policy to compare others with",
    "rm/helpfulness": "helpfulness scores",
    "rm/safety": "safety scores and violations",
    "rm/judge": "a judge that selects nothing",
    "eval": "the table of all policies on the same prompts, win rates, violations and answers side by side",
}
# Figures of the evaluation: metric -> description, and the reward model and data it needs.
_MEASURES: dict[str, tuple[str, str, str]] = {
    "reward_helpfulness": ("helpfulness scores", "helpfulness", ""),
    "reward_safety": ("safety scores", "safety", ""),
    "judge": ("the judge's scores", "judge", ""),
    "violation": ("violations by the safety model", "safety", "adversarial"),
    "harmless/refused": ("refusals of harmless prompts that look harmful", "", "borderline"),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the report shows."""

    inputs: StepInputs
    steps: tuple[RunStep, ...]
    evaluation: Evaluation | None

    @property
    def run_name(self) -> str:
        return Path(self.inputs.run.dir).resolve().name

    @property
    def base(self) -> str:
        """The pretrained base's name in the recipe."""
        base = self.inputs.recipe.get("base")
        return str(base.get("model", "-")) if isinstance(base, dict) else "-"

    @property
    def policies(self) -> list[RunStep]:
        return self._of_kind("policy")

    @property
    def places(self) -> dict[str, int]:
        """Each policy's index in the run, which sets its colour in plots; an evaluated external policy comes first."""
        evaluated = self.evaluation.policies if self.evaluation is not None else []
        own = [step.name for step in self.policies]
        names = [*(name for name in evaluated if name not in own), *own, *(curve.policy for curve in self.curves)]
        return {name: place for place, name in enumerate(dict.fromkeys(names))}

    @property
    def reward_models(self) -> dict[str, RunStep]:
        """Reward models by domain."""
        return {
            str(step.published.details.get("which") or step.name.rpartition("/")[2]): step
            for step in self._of_kind("reward_model")
        }

    def _of_kind(self, kind: str) -> list[RunStep]:
        return [step for step in self.steps if step.published.kind == kind]

    def by_command(self, command: str) -> list[RunStep]:
        """The steps of one command, in the order of the run."""
        return [step for step in self.steps if step.command == command]

    @property
    def recipe_steps(self) -> list[str]:
        """Names of the recipe's steps before the report."""
        names = [
            entry if isinstance(entry, str) else next(iter(entry)) for entry in self.inputs.recipe.get("steps") or ()
        ]
        return names[: names.index(self.inputs.step)] if self.inputs.step in names else names

    @property
    def curves(self) -> list[Curve]:
        """Reward by number of answers, from the evaluation or else from rejection sampling."""
        if self.evaluation is not None and self.evaluation.curves:
            return self.evaluation.curves
        return [curve for step in self.by_command("rs") for curve in step.best_of_n]


def read_facts(inputs: StepInputs) -> Facts:
    """Read the results of earlier steps, without dialogs, which do not finish a step."""
    steps = tuple(step_of(artifact) for artifact in inputs.surveyed if artifact.manifest.kind != "dialogs")
    evaluations = [step.evaluation for step in steps if step.published.kind == "evaluation"]
    return Facts(inputs, steps, evaluations[-1] if evaluations else None)


def missing(facts: Facts) -> list[str]:
    """One sentence for each unfinished step of the recipe and each figure that was not measured."""
    done = {step.name for step in facts.steps}
    recipe = facts.inputs.folder.config
    lines = []
    for name in facts.recipe_steps:
        # `rm` means all its models, each of which is a step.
        if name not in done and not any(step.startswith(f"{name}/") for step in done):
            why = f" It gives {_WORTH[name]}." if name in _WORTH else ""
            lines.append(
                f"{name} is not finished: `llamachat {command_of(name)} --config {quote(str(recipe))}` makes it.{why}"
            )
    return [*lines, *_unmeasured(facts)]


def left_out(facts: Facts) -> str:
    """What the report would show with more steps in the recipe; empty if it has them all."""
    known = {step.name for step in facts.steps} | {step.command for step in facts.steps} | set(facts.recipe_steps)
    known |= {command_of(name) for name in facts.recipe_steps if "/" not in name}
    absent = [f"`{name}` ({worth})" for name, worth in _WORTH.items() if name not in known]
    return f"Steps that this recipe leaves out: {', '.join(absent)}." if absent else ""


def _unmeasured(facts: Facts) -> list[str]:
    evaluation = facts.evaluation
    if evaluation is None:
        return []
    again = "`llamachat eval --overwrite` measures it"
    data = facts.inputs.recipe.get("data") or {}
    lines = [
        f"The evaluation lacks {words}: {again}."
        for key, (words, model, prompts) in _MEASURES.items()
        if not evaluation.has(key)
        and (not model or model in facts.reward_models)
        and (not prompts or data.get(prompts))
    ]
    if not evaluation.turns() and facts.by_command("gatt"):
        lines.append(f"The evaluation did not check how far instructions are kept (section gatt): {again}.")
    unseen = [step.name for step in facts.policies if step.name not in evaluation.policies]
    if unseen:
        lines.append(
            f"The evaluation knows nothing of {', '.join(unseen)}: `llamachat eval --overwrite` measures all policies."
        )
    return lines
