"""What the report would show and cannot, and which command makes it."""

from evaluation.report.reading import Facts, command_of

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
    "false_refusal": "false refusals take borderline prompts (`data.borderline`)",
}


def missing(facts: Facts) -> list[str]:
    """A sentence each: steps of the recipe that are not finished, steps that it lacks, figures that were not measured."""
    done = {step.name for step in facts.steps}
    commands = {step.command for step in facts.steps}
    recipe = facts.inputs.folder.config
    lines, told = [], set[str]()
    for name in facts.recipe_steps:
        if name not in done:
            told |= {name, command_of(name)}
            why = f" It gives {_WORTH[name]}." if name in _WORTH else ""
            lines.append(f"{name} is not finished: `llamachat {command_of(name)} --config {recipe}` makes it.{why}")
    for name, worth in _WORTH.items():
        if name not in done and name not in commands and name not in told:
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
