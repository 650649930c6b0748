"""Supervised fine-tuning (section 3.1) and reward models (section 3.2.2; Tables 7, 8, 29) next to the paper's; DPO."""

import re
from pathlib import Path

from evaluation.report import paper
from evaluation.report.drawing import accuracy_by_rating
from evaluation.report.facts import Facts
from evaluation.report.page import (
    ABSENT,
    Block,
    Picture,
    Points,
    Section,
    Table,
    bare_percent,
    measure_row,
    number,
    paper_row,
    row,
)
from llamachat.runs.reader import Measure, RunStep

_VARIED = {"swapped": "another prompt's answer", "half": "half of itself", "twice": "itself twice"}
_DOMAINS = ("helpfulness", "safety")
_LABELS = {rating: rating.replace("_", " ") for rating in paper.RATINGS}


def supervised(facts: Facts) -> Section | None:
    """Change of the loss on held-out answers, for each step that tunes."""
    steps = [step for step in facts.policies if "sft/eval_loss" in step.summary]
    if not steps:
        return None
    columns = (("sft/eval_loss_base", 3), ("sft/eval_loss", 3), ("sft/trained_tokens", 0), ("sft/epoch", 1))
    rows = [row(step.name, *(_figure(step, name, digits) for name, digits in columns)) for step in steps]
    table = Table(
        "Cross-entropy on held-out answers",
        ["step", "before, nats/token", "after, nats/token", "answer tokens trained on", "epochs"],
        rows,
        note="Each step's held-out dialogs are its own: sft's are of data.sft, the others' are answers that they chose, "
        "so lines cannot be compared. The paper gives no losses; it tuned for 2 epochs on 27,540 annotations.",
    )
    return Section("Supervised fine-tuning (section 3.1)", "tuning", [table])


def preferences(facts: Facts) -> Section | None:
    """Change of DPO's figures on held-out pairs."""
    steps = facts.by_command("dpo")
    if not steps:
        return None
    columns = (("accuracy", 3), ("loss", 3), ("reward_chosen", 3), ("reward_rejected", 3))
    rows = [row(step.name, *(_figure(step, f"dpo/eval_{name}", digits) for name, digits in columns)) for step in steps]
    table = Table(
        "Held-out pairs under the policy",
        ["step", "share in the right order", "loss, nats/pair", "implicit reward, chosen", "implicit reward, rejected"],
        rows,
        note="An implicit reward is beta times the change of an answer's log-probability since the step began. Below 0 the "
        "policy gives the answer less probability than it did, which is common for chosen answers, too.",
    )
    return Section("Direct preference optimisation (not in the paper)", "dpo", [table])


def reward_models(facts: Facts, figures: Path) -> Section | None:
    """Accuracy on pairs by domain and rating, and recall of answers labelled unsafe."""
    models = facts.reward_models
    if not models:
        return None
    blocks: list[Block] = [*_probed(models), _by_domain(models)]
    for domain in _DOMAINS:
        rated = {which: _ratings(step, which, domain) for which, step in models.items()}
        if not any(any(measures[:-1]) for measures in rated.values()):
            continue
        blocks.append(_by_rating(domain, rated))
        path = figures / f"accuracy_{domain}.png"
        accuracy_by_rating(path, rated, paper.TABLE_8[domain], domain)
        blocks.append(_accuracy_picture(path, domain, rated))
    unsafe = _on_labels(models)
    return Section("Reward models (section 3.2.2)", "reward-models", [*blocks, *([unsafe] if unsafe else [])])


def _probed(models: dict[str, RunStep]) -> list[Block]:
    """Whether rejection sampling and PPO can trust these models: the probe's verdicts and figures."""
    rows, verdicts = [], []
    for which, step in models.items():
        if "probe" not in step.published.details:
            continue
        verdicts.append(f"`{step.name}`: {step.published.details['probe']['verdict']}.")
        harmless = f"rm/{which}/probe/harmless/"
        constants = _worst(step, f"{harmless}(?!{'|'.join(_VARIED)})[a-z_]+")
        varied = [step.measure(f"{harmless}{name}") for name in _VARIED]
        refused = _worst(step, f"rm/{which}/probe/harmful/refusal_[a-z]+")
        rows.append(measure_row(which, [constants, *varied, refused], bare_percent))
    head = ["model", "over any constant", *_VARIED.values(), "harmful prompts: refusal over the answer"]
    note = (
        "Constants are refusals, 'I am not sure', thanks repeated, the prompt itself and one word, in wordings that were "
        "not trained on; the column shows the one that the model likes best. 50 is a coin."
    )
    caption = "Probe: held-out prompts in percent in which the reference answer scores above ..."
    return [Points(verdicts), Table(caption, head, rows, note=note, name="probe")] if rows else []


def _worst(step: RunStep, pattern: str) -> Measure | None:
    """The lowest of the step's figures that match this pattern."""
    names = [name for name in step.summary if re.fullmatch(pattern, name) and f"{name}_prompts" in step.summary]
    return step.measure(min(names, key=lambda name: step.summary[name])) if names else None


def _by_domain(models: dict[str, RunStep]) -> Table:
    rows = []
    for which, step in models.items():
        measures = [step.measure(f"rm/{which}/test/{domain}/accuracy") for domain in _DOMAINS]
        rows.append(measure_row(f"ours: {which}", measures, bare_percent))
    for rule, label in (("longer_wins", "ours: the longer answer wins"), ("tfidf", "ours: TF-IDF of the domain")):
        measures = []
        for domain in _DOMAINS:
            # Each model comes with a TF-IDF baseline trained on its own pairs; here, that of the domain's own model.
            which = domain if domain in models else next(iter(models))
            is_shown = rule == "longer_wins" or which == domain
            measures.append(models[which].measure(f"rm/{which}/test/{domain}/{rule}") if is_shown else None)
        rows.append(measure_row(label, measures, bare_percent))
    rows += [
        paper_row(f"paper: {name}", *(f"{values[domain]:.1f}" for domain in _DOMAINS))
        for name, values in paper.TABLE_7.items()
    ]
    first, step = next(iter(models.items()))
    counts = {domain: step.summary.get(f"rm/{first}/test/{domain}/pairs") for domain in _DOMAINS}
    sizes = [f"{domain} {count:.0f}" for domain, count in counts.items() if count is not None]
    return Table(
        "Accuracy on test pairs in percent (in the shape of Table 7)",
        ["model", "helpfulness pairs", "safety pairs"],
        rows,
        note=f"Our test pairs: {', '.join(sizes) or 'not counted'}; the paper's are Meta Helpfulness and Meta Safety, so "
        "compare the order of the lines, not their levels. A tie counts half.",
        name="7",
    )


def _ratings(step: RunStep, which: str, domain: str) -> list[Measure | None]:
    """Figures by rating, strongest first, then overall."""
    start = f"rm/{which}/test/{domain}/accuracy"
    return [*(step.measure(f"{start}_{rating}") for rating in paper.RATINGS), step.measure(start)]


def _by_rating(domain: str, rated: dict[str, list[Measure | None]]) -> Table:
    rows = [measure_row(f"ours: {which}", measures, bare_percent) for which, measures in rated.items()]
    rows += [
        paper_row(f"paper: {name}", *(f"{value:.1f}" for value in values))
        for name, values in paper.TABLE_8[domain].items()
    ]
    return Table(
        f"Accuracy on {domain} pairs by rating in percent (in the shape of Table 8)",
        ["model", *_LABELS.values(), "all"],
        rows,
        name=f"8-{domain}",
    )


def _accuracy_picture(path: Path, domain: str, rated: dict[str, list[Measure | None]]) -> Picture:
    descriptions = []
    for which, measures in rated.items():
        values = [
            f"{_LABELS[rating]} {number(100 * one.value, digits=0)}%"
            for rating, one in zip(paper.RATINGS, measures[:-1], strict=True)
            if one is not None
        ]
        descriptions.append(f"{which}: {', '.join(values)}")
    falls = paper.TABLE_8[domain][domain]
    alt = (
        f"Accuracy on {domain} pairs by rating. Ours: {'; '.join(descriptions)}. The paper's {domain} model falls from "
        f"{falls[0]:.0f}% on significantly better to {falls[3]:.0f}% on negligibly better pairs."
    )
    return Picture(
        path,
        alt,
        "Accuracy by how much better the chosen answer is, with 95% intervals; open marks are the paper's Table 8.",
    )


def _on_labels(models: dict[str, RunStep]) -> Table | None:
    keys = ("unsafe_recall", "unsafe_precision", "unsafe_recall_at_gate", "unsafe_precision_at_gate")
    rows = [
        measure_row(f"ours: {which}", (step.measure(f"rm/{which}/{key}") for key in keys), bare_percent)
        for which, step in models.items()
        if f"rm/{which}/unsafe_recall" in step.summary
    ]
    if not rows:
        return None
    without, with_loss = paper.TABLE_29_UNSAFE_RECALL
    rows += [
        paper_row("paper: safety, without auxiliary loss", f"{without:.1f}", ABSENT, ABSENT, ABSENT),
        paper_row(
            "paper: safety", f"{with_loss:.1f}", ABSENT, f"{paper.GATE_RECALL:.0f}", f"{paper.GATE_PRECISION:.0f}"
        ),
    ]
    return Table(
        "Detection of unsafe answers, in percent (Table 29, section 3.2.3)",
        ["model", "recall under 0.5", "precision under 0.5", "recall at the gate, 0.15", "precision at the gate"],
        rows,
        name="29",
    )


def _figure(step: RunStep, name: str, digits: int) -> str:
    value = step.summary.get(name)
    return ABSENT if value is None else f"{value:,.{digits}f}"
