"""What the report is about: the finished steps of a run and their evaluation, and what is not there."""

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
# Of the evaluation: metric -> what it is, the reward model and the data that it is measured with.
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
        """The pretrained base by its name in the recipe."""
        base = self.inputs.recipe.get("base")
        return str(base.get("model", "-")) if isinstance(base, dict) else "-"

    @property
    def policies(self) -> list[RunStep]:
        return self._of_kind("policy")

    @property
    def places(self) -> dict[str, int]:
        """The policies' places in the run, by which pictures colour them; one from elsewhere that was evaluated is first."""
        evaluated = self.evaluation.policies if self.evaluation is not None else []
        own = [step.name for step in self.policies]
        names = [*(name for name in evaluated if name not in own), *own, *(curve.policy for curve in self.curves)]
        return {name: place for place, name in enumerate(dict.fromkeys(names))}

    @property
    def reward_models(self) -> dict[str, RunStep]:
        """Reward models by what they judge."""
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
        """Names of the recipe's steps, without the report and what follows it."""
        names = [
            entry if isinstance(entry, str) else next(iter(entry)) for entry in self.inputs.recipe.get("steps") or ()
        ]
        return names[: names.index(self.inputs.step)] if self.inputs.step in names else names

    @property
    def curves(self) -> list[Curve]:
        """Reward against the number of answers: of the evaluation, else of rejection sampling."""
        if self.evaluation is not None and self.evaluation.curves:
            return self.evaluation.curves
        return [curve for step in self.by_command("rs") for curve in step.best_of_n]


def read_facts(inputs: StepInputs) -> Facts:
    """Read what the earlier steps wrote; dialogs, which end no step, are left out."""
    steps = tuple(step_of(artifact) for artifact in inputs.surveyed if artifact.manifest.kind != "dialogs")
    evaluations = [step.evaluation for step in steps if step.published.kind == "evaluation"]
    return Facts(inputs, steps, evaluations[-1] if evaluations else None)


def missing(facts: Facts) -> list[str]:
    """A sentence each: steps of the recipe that are not finished, figures of it that were not measured."""
    done = {step.name for step in facts.steps}
    recipe = facts.inputs.folder.config
    lines = []
    for name in facts.recipe_steps:
        # `rm` stands for its models, which have steps of their own.
        if name not in done and not any(step.startswith(f"{name}/") for step in done):
            why = f" It gives {_WORTH[name]}." if name in _WORTH else ""
            lines.append(
                f"{name} is not finished: `llamachat {command_of(name)} --config {quote(str(recipe))}` makes it.{why}"
            )
    return [*lines, *_unmeasured(facts)]


def left_out(facts: Facts) -> str:
    """What the report could show of a recipe with more steps; empty where the recipe has them all."""
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
