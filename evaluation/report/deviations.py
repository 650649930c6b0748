"""Where this run departs from the paper, told from what the steps were run with, not from what the schema allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.report.facts import Facts
from evaluation.report.page import Section, Table, row
from llamachat.memory.estimates import shape_of
from llamachat.runs.reader import RunStep


@dataclass(frozen=True, slots=True)
class Value:
    """A value that the paper states, and where a step of ours keeps its own."""

    command: str
    section: str
    key: str
    what: str
    paper: Any  # the value, or several any of which is the paper's
    unit: str = ""


_VALUES = (
    Value("sft", "sft", "epochs", "epochs", 2),
    Value("sft", "sft", "learning_rate", "learning rate", 2e-5),
    Value("sft", "sft", "examples_per_step", "batch", 64, "dialogs"),
    Value("sft", "base", "max_tokens", "longest sequence", 4096, "tokens"),
    Value("rm", "reward", "epochs", "epochs", 1),
    Value("rm", "reward", "learning_rate", "learning rate", (1e-5, 5e-6)),
    Value("rm", "reward", "pairs_per_step", "batch", 512, "pairs"),
    Value("ppo", "ppo", "responses_per_iteration", "answers an iteration", 512),
    Value("ppo", "ppo", "responses_per_minibatch", "mini-batch", 64, "answers"),
    Value("ppo", "ppo", "learning_rate", "learning rate", 1e-6),
    Value("ppo", "ppo", "kl_coef", "KL coefficient beta", (0.01, 0.005)),
    Value("ppo", "ppo", "clip_range", "clip range", 0.2),
)
_MOST_ITERATIONS = (200, 400)


def deviations(facts: Facts) -> Section:
    """What, the paper's, ours: the base and the data first, then the steps in their order."""
    rows = [*_of_the_whole(facts), *_of_values(facts), *_of_commands(facts)]
    table = Table(
        "Where this run differs",
        ["what", "paper", "this run"],
        [row(*texts) for texts in rows],
        note="Only what the paper states is compared. What it leaves open (the number of samples of rejection sampling, the "
        "critic of PPO, the auxiliary loss, ...) is ours, and docs/paper_map.md lists it.",
        name="deviations",
    )
    return Section("Deviations from the paper", "deviations", [table])


def _of_the_whole(facts: Facts) -> list[tuple[str, str, str]]:
    recipe = facts.inputs.recipe
    base = facts.base
    shape = shape_of(base)
    size = f", {_count(shape.weights)} parameters" if shape else ""
    tuning = recipe.get("tuning") or {}
    rows = [("base", "Llama 2, 7 to 70 billion parameters, 2 trillion tokens", f"{base}{size}")]
    method = tuning.get("method", "full")
    if method != "full":
        quantised = ", the base in 4 bits" if method == "qlora" else ""
        rows.append(("tuning", "all weights", f"{method}: adapters of rank {tuning.get('rank')}{quantised}"))
    rows.append(("tuning data", "27,540 annotations written for it", _told(_sources(recipe, "sft"))))
    if facts.reward_models:
        pairs = [*_sources(recipe, "helpfulness"), *_sources(recipe, "safety")]
        rows.append(
            ("preferences", "1.4 million pairs, weekly, of the latest model's answers", f"{_told(pairs)}, once")
        )
    names = ", ".join(step.name for step in facts.policies) or "no policy"
    rows.append(
        ("rounds", "five of RLHF, with new preferences before each; PPO after the fourth", f"one pass: {names}")
    )
    if facts.evaluation is not None:
        rows.append(
            ("judgement", "people, and GPT-4", "reward models, where there is one a judge that selects nothing")
        )
    return rows


def _of_values(facts: Facts) -> list[tuple[str, str, str]]:
    rows = []
    for value in _VALUES:
        for step in facts.by_command(value.command):
            ours, end = step.value(value.section, value.key), step.ending
            cut = end.count if end is not None and end.key == value.key else None
            stated = value.paper if isinstance(value.paper, tuple) else (value.paper,)
            if ours is not None and (cut or ours not in stated):
                told = [f"{one:g} {value.unit}".strip() for one in (stated[0], ours)]
                rows.append((f"{step.name}: {value.what}", told[0], cut or told[1]))
    return rows


def _of_commands(facts: Facts) -> list[tuple[str, str, str]]:
    rows = []
    for step in facts.by_command("ppo"):
        planned, end = step.value("ppo", "iterations"), step.ending
        iterations = planned if end is None or end.done is None else end.done
        low, high = _MOST_ITERATIONS
        if iterations is not None and not low <= iterations <= high:
            told = f"{planned}" if end is None else end.count
            rows.append((f"{step.name}: iterations", f"{low} to {high}", told))
    for step in facts.by_command("rs"):
        if step.value("rejection_sampling", "start") == "current":
            rows.append((f"{step.name}: tuned", "the base model anew", "the present policy"))
    for step in facts.by_command("gatt"):
        rows.append(
            (f"{step.name}: measured", "recall of a figure or hobby, by people", "instructions checked by rule")
        )
        if _lists(step):
            rows.append((f"{step.name}: hobbies and figures", "lists that the model wrote itself", "lists in files"))
    return rows


def _lists(step: RunStep) -> bool:
    return step.value("gatt", "values") == "lists"


def _sources(recipe: Mapping[str, Any], key: str) -> list[Any]:
    return list((recipe.get("data") or {}).get(key) or ())


def _told(sources: Sequence[Any]) -> str:
    return f"{len(sources)} source{'' if len(sources) == 1 else 's'}"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"
