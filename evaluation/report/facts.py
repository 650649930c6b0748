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
# Of the evaluation: metric -> what it takes.
_MEASURES = {
    "reward_helpfulness": "helpfulness scores take a helpfulness model (`rm/helpfulness`)",
    "reward_safety": "safety scores take a safety model (`rm/safety`)",
    "judge": "the judge's verdict takes a judge (`rm/judge`, trained on a share of its own: `data.split.judge`)",
    "violation": "violations take a safety model (`rm/safety`) and prompts marked is_safety (`data.adversarial`)",
    "harmless/refused": "false refusals take borderline prompts (`data.borderline`)",
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
    """A sentence each: steps of the recipe that are not finished, steps that it lacks, figures that were not measured."""
    done = {step.name for step in facts.steps}
    commands = {step.command for step in facts.steps}
    recipe = facts.inputs.folder.config
    lines, named = [], set[str]()
    for name in facts.recipe_steps:
        # `rm` stands for its models, which have steps of their own.
        if name not in done and not any(step.startswith(f"{name}/") for step in done):
            named |= {name, command_of(name)}
            why = f" It gives {_WORTH[name]}." if name in _WORTH else ""
            lines.append(
                f"{name} is not finished: `llamachat {command_of(name)} --config {quote(str(recipe))}` makes it.{why}"
            )
    for name, worth in _WORTH.items():
        if name not in done and name not in commands and name not in named:
            lines.append(
                f"There is no {name}, which gives {worth}: put `{name}` into the recipe's `steps`, then "
                f"`llamachat {command_of(name)} --config RECIPE` makes it."
            )
    return [*lines, *_unmeasured(facts)]


def _unmeasured(facts: Facts) -> list[str]:
    evaluation = facts.evaluation
    if evaluation is None:
        return []
    again = "then `llamachat eval --overwrite` measures it"
    lines = [
        f"The evaluation lacks a figure: {words}; {again}."
        for key, words in _MEASURES.items()
        if not evaluation.has(key)
    ]
    if not evaluation.turns():
        lines.append(f"The evaluation did not check how far instructions are kept (section gatt); {again}.")
    unseen = [step.name for step in facts.policies if step.name not in evaluation.policies]
    if unseen:
        lines.append(
            f"The evaluation knows nothing of {', '.join(unseen)}: `llamachat eval --overwrite` measures all policies."
        )
    return lines
