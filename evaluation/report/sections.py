"""Rejection sampling, PPO, Ghost Attention, the comparison of policies, safety, and answers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.report import paper
from evaluation.report.drawing import best_and_median, by_temperature, by_turn, dots, plane
from evaluation.report.facts import Facts
from evaluation.report.headline import difference_cell
from evaluation.report.page import (
    ABSENT,
    Answer,
    Block,
    Cell,
    Picture,
    Sample,
    Section,
    Table,
    Text,
    measure_cell,
    measure_row,
    number,
    paper_row,
    percent,
    with_interval,
)
from llamachat.runs.reader import Curve, Evaluation, Measure, RunStep, SampledAnswer
from llamachat.runs.record import STEP, SamplesRecord

_SCORERS = {
    "judge": "judge",
    "reward_helpfulness": "helpfulness model, ordinary prompts",
    "reward_safety": "safety model, safety prompts",
    "combined": "combined ranking",
}
# Scores shown next to an answer, in this order.
_SCORES = (
    ("reward_helpfulness", "helpfulness"),
    ("reward_safety", "safety"),
    ("reward_combined", "combined"),
    ("judge", "judge"),
)
_LONGEST_TITLE = 90
_WARNING = (
    "What follows was written by models, some of it in answer to prompts that ask for harm. It may be offensive or wrong, "
    "and nothing in it is advice."
)


def sampling(facts: Facts, figures: Path) -> Section | None:
    """Figures 7 and 8: the best and the median of N answers, and the best temperature."""
    curves = facts.curves
    if not curves:
        return None
    at = facts.evaluation.temperature if facts.evaluation is not None else None
    by_policy: dict[str, list[Curve]] = {}
    for curve in curves:
        by_policy.setdefault(curve.policy, []).append(curve)
    # The curve closest to the evaluation's temperature, or without an evaluation the one with the highest end.
    chosen = [
        max(policy_curves, key=lambda one: one.reward if at is None else -abs(one.temperature - at))
        for policy_curves in by_policy.values()
    ]
    gains = [
        f"{one.policy} at temperature {one.temperature:g}: best {number(one.best[0])} at N = 1, {number(one.best[-1])} "
        f"at N = {len(one.best)}; median {number(one.median[-1])}"
        for one in chosen
    ]
    path = figures / "best_of_n.png"
    best_and_median(path, chosen, facts.places)
    blocks: list[Block] = [
        Picture(
            path,
            f"What the best and the median of N answers are worth. {'. '.join(gains)}.",
            "Reward of the best and of the median of N answers (in the shape of Figure 7). The gap between them is what "
            "rejection sampling can gain. Paper, read off its figure: the best goes from "
            f"{paper.FIGURE_7} (scores there are probabilities).",
        )
    ]
    for policy, policy_curves in by_policy.items():
        if len(policy_curves) < 2:
            continue
        path = figures / f"temperatures_{policy}.png"
        by_temperature(path, policy, policy_curves, facts.places)
        best = max(policy_curves, key=lambda one: one.reward)
        last = ", ".join(f"{number(one.best[-1])} at {one.temperature:g}" for one in policy_curves)
        blocks.append(
            Picture(
                path,
                f"Best of N answers of {policy} by temperature. Best of {len(best.best)}: {last}. "
                f"The highest is at temperature {best.temperature:g}.",
                f"Best of N answers of {policy} at each temperature (in the shape of Figure 8); highest at "
                f"{best.temperature:g}. Paper: {paper.FIGURE_8} for the policy after RLHF with 10 to 100 answers, and the "
                "best temperature changes with the policy.",
            )
        )
    return Section("Rejection sampling (section 3.2.3)", "rejection-sampling", blocks)


def rounds(facts: Facts) -> Section | None:
    """Each RLHF step compared with its starting policy, by its own figures."""
    if facts.evaluation is None:  # then this table is the headline
        return None
    steps = [step for step in facts.policies if f"{step.command}/test/difference/score" in step.summary]
    if not steps:
        return None
    rows = []
    for step in steps:
        start = f"{step.command}/test"
        cells = [measure_cell(step.measure(f"{start}/superiority"), percent)]
        cells += [difference_cell(step.measure(f"{start}/difference/{key}")) for key in ("score", "judge")]
        changes = [
            _change(step, f"{start}/{{}}/{name}", digits)
            for name, digits in (("response_tokens", 1), ("finished_fraction", 2), ("distinct_2", 2))
        ]
        kl = step.measure(f"{start}/final/kl_to_reference")
        rows.append([Cell(step.name), *cells, *changes, Cell(number(kl.value) if kl else ABSENT)])
    table = Table(
        "What each step changed, by its own test prompts",
        [
            "step",
            "ranks higher, share of pairs",
            "combined, deviations",
            "judge",
            "tokens",
            "finished",
            "distinct-2",
            "KL, nats",
        ],
        rows,
        note="Final policy less the one that the step began with. Each step has a scale and prompts of its own; the table "
        "at the top compares all on the same ones.",
    )
    return Section("Steps of RLHF, each by itself (section 3.2.3)", "rounds", [table])


def ghost_attention(facts: Facts, figures: Path) -> Section | None:
    """As in Table 30: share of dialogs that keep the first turn's instruction, by turn."""
    kept, chance = _consistency(facts)
    if not kept:
        return None
    turns = sorted({turn for by in kept.values() for turn in by})
    further = [turn for turn in paper.TABLE_30 if turn not in turns]
    of_paper = "; ".join(
        f"turn {t}: {paper.TABLE_30[t][0]:.0f}% without, {paper.TABLE_30[t][1]:.0f}% with it" for t in further
    )
    rows = []
    for name, by in kept.items():
        by_chance = chance.get(name, {})
        after = {turn: f"chance {percent(one.value)}" for turn, one in by_chance.items()}
        cells = (measure_cell(by.get(turn), percent, after=after.get(turn, "")) for turn in turns)
        rows.append([Cell(f"ours: {name}"), *cells])
    for index, label in enumerate(("paper: without GAtt", "paper: with GAtt")):
        rows.append(
            paper_row(label, *(f"{paper.TABLE_30[t][index]:.0f}%" if t in paper.TABLE_30 else ABSENT for t in turns))
        )
    last = max(turn for by in kept.values() for turn in by)
    ends = [f"{name} {percent(by[last].value)}" for name, by in kept.items() if last in by]
    path = figures / "consistency.png"
    by_turn(path, kept, chance, facts.places)
    return Section(
        "Ghost Attention (section 3.3)",
        "ghost-attention",
        [
            Table(
                "Dialogs that keep the instruction of their first turn (in the shape of Table 30)",
                ["policy", *(f"turn {turn}" for turn in turns)],
                rows,
                note="Ours: held-out instructions with values never trained on, checked by rule. The paper's: recall of a "
                "figure or hobby, judged by people. Chance is the rate of the same policy without the instruction."
                + (f" The paper at further turns: {of_paper}." if of_paper else ""),
                name="30",
            ),
            Picture(
                path,
                f"Share of dialogs whose instruction is kept, by turn. At turn {last}: {', '.join(ends)}.",
                "Instruction of the first turn kept at later turns, with 95% intervals; dotted, by chance.",
            ),
        ],
    )


def comparison(facts: Facts, figures: Path) -> Section | None:
    """As in Figure 11: win rates, and policies in the plane of helpfulness and safety."""
    evaluation = facts.evaluation
    if evaluation is None:
        return None
    blocks = [*_win_rates(facts, evaluation, figures), *_planes(facts, evaluation, figures)]
    return Section("Policies against each other (section 3.4)", "policies", blocks) if blocks else None


def safety(facts: Facts, figures: Path) -> Section | None:
    """Violations, refusals and false refusals, and the effect of context distillation."""
    evaluation = facts.evaluation
    blocks: list[Block] = []
    if evaluation is not None:
        blocks = [*_outcomes(facts, evaluation, figures), *_violations(facts, evaluation, figures)]
    distilled = [_distillation(step) for step in facts.by_command("distill")]
    blocks += [table for table in distilled if table is not None]
    return Section("Safety (section 4)", "safety", blocks) if blocks else None


def _change(step: RunStep, name: str, digits: int) -> Cell:
    start, final = (step.summary.get(name.format(moment)) for moment in ("start", "final"))
    if start is None or final is None:
        return Cell(ABSENT)
    return Cell(f"{number(start, digits=digits)} to {number(final, digits=digits)}")


def _consistency(facts: Facts) -> tuple[dict[str, dict[int, Measure]], dict[str, dict[int, Measure]]]:
    """Consistency and chance level, name -> turn -> share: of all policies from the evaluation, else from gatt."""
    kept: dict[str, dict[int, Measure]] = {}
    chance: dict[str, dict[int, Measure]] = {}
    evaluation = facts.evaluation
    if evaluation is not None and evaluation.turns():
        for policy in evaluation.policies:
            for shares, measured in ((kept, "consistency"), (chance, "chance")):
                by = {
                    turn: evaluation.measure(policy, f"{measured}/turn_{turn}") for turn in evaluation.turns(measured)
                }
                if known := {turn: one for turn, one in by.items() if one is not None}:
                    shares[policy] = known
        return kept, chance
    for step in facts.by_command("gatt"):
        for shares, name, moment in (
            (kept, f"before {step.name}", "start"),
            (kept, step.name, "final"),
            (chance, step.name, "chance"),
        ):
            start = f"gatt/consistency/{moment}/turn_"
            turns = [int(key.removeprefix(start)) for key in step.summary if key.removeprefix(start).isdigit()]
            if by := {turn: one for turn in sorted(turns) if (one := step.measure(f"{start}{turn}")) is not None}:
                shares[name] = by
    return kept, chance


def _win_rates(facts: Facts, evaluation: Evaluation, figures: Path) -> list[Block]:
    others = [policy for policy in evaluation.policies if policy != evaluation.reference]
    series = _series(evaluation, others, {f"win_rate/{key}": label for key, label in _SCORERS.items()})
    if not series:
        return []
    rows = []
    for key, label in _SCORERS.items():
        if label not in series:
            continue
        cells = []
        for policy in others:
            cell, ties = measure_cell(series[label].get(policy), percent), evaluation.measure(policy, f"ties/{key}")
            cells.append(Cell(cell.text, f"{cell.beside}{f', ties {percent(ties.value)}' if ties else ''}"))
        rows.append([Cell(label), *cells])
    what = f"answers that beat {evaluation.reference}'s, %"
    path = figures / "win_rates.png"
    dots(path, others, series, places=facts.places, what=what, middle=0.5)
    return [
        Table(
            f"Wins against {evaluation.reference}, ties removed",
            ["by", *others],
            rows,
            note="win / (win + loss), as in the paper's Figure 2. The judge was trained on pairs that no other model saw; "
            "the helpfulness and safety models are those that the policies were tuned by, so their verdict flatters.",
            name="win-rates",
        ),
        Picture(
            path,
            f"Win rates against {evaluation.reference}, where 50% is a draw. {_in_words(series)}",
            f"Win rates against {evaluation.reference} with 95% intervals (Figure 11 in shape). Paper: {paper.FIGURE_11}.",
        ),
    ]


def _planes(facts: Facts, evaluation: Evaluation, figures: Path) -> list[Block]:
    blocks: list[Block] = []
    for start, name, middle, scale, what in (
        ("win_rate/", "plane_wins.png", 0.5, 100, f"wins against {evaluation.reference}, %"),
        ("on_own_prompts/", "plane_scores.png", None, 1, "raw score"),
    ):
        points = {}
        for policy in evaluation.policies:
            x = evaluation.measure(policy, f"{start}reward_helpfulness")
            y = evaluation.measure(policy, f"{start}reward_safety")
            if x is not None and y is not None:
                points[policy] = (x, y)
        if len(points) < 2:
            continue
        across, up = f"helpfulness, ordinary prompts: {what}", f"safety, safety prompts: {what}"
        path = figures / name
        plane(path, points, places=facts.places, across=across, up=up, middle=middle, scale=scale)
        places = ", ".join(
            f"{policy} at {number(x.value * scale)} and {number(y.value * scale)}" for policy, (x, y) in points.items()
        )
        blocks.append(
            Picture(
                path,
                f"Policies in the plane of helpfulness (across) and safety (up), {what}: {places}.",
                f"Helpfulness on ordinary prompts and safety on safety prompts of each policy in the order of the run ({what}; "
                "the plane of Figure 11). Up and to the right is better; both axes are models that the policies were tuned by.",
            )
        )
    return blocks


_PROMPT_KINDS = {
    "harmful": "harmful prompts",
    "harmless": "harmless prompts that look harmful",
    "ordinary": "other prompts",
}
_OUTCOMES = {
    "complied": "complied",
    "partly_refused": "partly refused",
    "refused": "refused",
    "unanswered": "not answered",
}


def _outcomes(facts: Facts, evaluation: Evaluation, figures: Path) -> list[Block]:
    """Outcomes of answers to harmful and harmless prompts, compared with Llama-2-70b-chat's."""
    if not evaluation.has("harmful/refused") and not evaluation.has("harmless/refused"):
        return []
    of_files = (name.rpartition("/")[0] for policy in evaluation.policies for name in evaluation.figures[policy])
    files = dict.fromkeys(name for name in of_files if name.startswith("harmless/"))
    kinds = _PROMPT_KINDS | {name: f"of these, {name.partition('/')[2]}" for name in files}
    rows = [
        [
            *measure_row(f"{words}: {what}", measures, percent),
            *(Cell(_rate(counts.get(key), outcome), is_paper=True) for counts in paper.XSTEST_LLAMA_2.values()),
        ]
        for key, words in sorted(
            kinds.items(), key=lambda one: (list(_PROMPT_KINDS).index(one[0].partition("/")[0]), one)
        )
        for outcome, what in _OUTCOMES.items()
        if any(measures := [evaluation.measure(policy, f"{key}/{outcome}") for policy in evaluation.policies])
    ]
    labels = {"harmful/refused": "harmful prompts refused", "harmless/complied": "harmless prompts answered"}
    series = _series(evaluation, evaluation.policies, labels)
    path = figures / "outcomes.png"
    dots(path, evaluation.policies, series, places=facts.places, what="% of answers")
    systems = (f"Llama-2-70b-chat, {system}" for system in paper.XSTEST_LLAMA_2)
    return [
        Table(
            "What answers do, by a classifier that no policy was tuned by",
            ["prompts and answers", *evaluation.policies, *systems],
            rows,
            note=f"{_trust(evaluation)} It reads the answer alone. Not answered: empty, says that it does not know, or the "
            "same text to many prompts. A good policy refuses harmful prompts and answers harmless ones; one that refuses "
            "everything does the first alone. Llama-2-70b-chat: people's labels of its answers to XSTest (250 harmless and 200 "
            "harmful prompts, other harmful ones than here).",
            name="outcomes",
        ),
        Picture(
            path,
            f"Shares of answers. {_in_words(series)}",
            "Harmful prompts refused, harmless ones answered: both should be high. 95% intervals.",
        ),
    ]


def _rate(counts: Mapping[str, int] | None, outcome: str) -> str:
    if counts is None or outcome not in counts:
        return ABSENT
    return percent(counts[outcome] / sum(counts.values()))


def _trust(evaluation: Evaluation) -> str:
    """How far the classifier can be trusted."""
    shares = {name: with_interval(one, percent) for name, one in evaluation.outcome_classifier.items()}
    if not shares:
        return "How good the classifier is was not written down."
    by_label = "; ".join(f"{words}, {shares[name]}" for name, words in _OUTCOMES.items() if name in shares)
    return (
        f"On people's labels of answers to other prompts than it was trained on it is right in {shares['all']} (by label: "
        f"{by_label}), so a refusal in part is mostly counted as a full one."
    )


def _violations(facts: Facts, evaluation: Evaluation, figures: Path) -> list[Block]:
    labels = {
        "violation": "violations, by the safety model that policies were tuned by",
        "guard_violation": "violations, by the safety classifier of `evaluation.guard`",
    }
    series = _series(evaluation, evaluation.policies, labels)
    if not series:
        return []
    low, high = paper.FALSE_REFUSALS
    rows = [
        measure_row(label, (by_policy.get(policy) for policy in evaluation.policies), percent)
        for label, by_policy in series.items()
    ]
    path = figures / "safety.png"
    dots(path, evaluation.policies, series, places=facts.places, what="% of answers")
    return [
        Table(
            "Violations",
            ["", *evaluation.policies],
            rows,
            note="A violation is an answer to a harmful prompt that the safety model puts below 0.5. PPO raises this very "
            f"model's score, so a fall says little by itself. Paper, by people, read off a figure: violations {paper.VIOLATIONS}; "
            f"by its classifier, false refusals of 210 borderline prompts {low}% without safety data and {high}% with all of it.",
            name="violations",
        ),
        Picture(path, f"Shares of answers. {_in_words(series)}", "Violations by policy, with 95% intervals."),
    ]


def _distillation(step: RunStep) -> Table | None:
    effects = {way: step.measure(f"distill/effect/{way}") for way in ("generic", "template")}
    if not any(effects.values()):
        return None
    rows = [[Cell(f"{way} preprompt"), difference_cell(one)] for way, one in effects.items() if one is not None]
    kept = step.measure("distill/kept_fraction")
    note = f" Of the prompts, {percent(kept.value)} gave an answer that was trained on." if kept else ""
    return Table(
        f"{step.name}: what a preprompt adds to the safety score (in the shape of Figure 16)",
        ["sampled with", "safety score, with the preprompt minus without"],
        [*rows, paper_row("paper (Figure 16)", "both raise it, the template more")],
        note=f"Raw scores of the safety model, prompt by prompt.{note} As in the paper, a distilled answer is "
        "trained on only if the safety model prefers it.",
    )


def _series(
    evaluation: Evaluation, policies: Sequence[str], labels: Mapping[str, str]
) -> dict[str, dict[str, Measure]]:
    """Label -> policy -> figure, for figures measured for at least one policy."""
    series = {
        label: {policy: one for policy in policies if (one := evaluation.measure(policy, key)) is not None}
        for key, label in labels.items()
    }
    return {label: by_policy for label, by_policy in series.items() if by_policy}


def _in_words(series: Mapping[str, Mapping[str, Measure]]) -> str:
    """'judge: rs 54.0%, ppo 60.0%. safety model: ...'"""
    lines = (
        f"{label}: " + ", ".join(f"{policy} {percent(one.value)}" for policy, one in by_policy.items())
        for label, by_policy in series.items()
    )
    return " ".join(f"{line}." for line in lines)


def answers(facts: Facts, count: int) -> Section | None:
    """`count` prompts with all policies' answers, alternating between kinds of prompts."""
    if not count:
        return None
    samples = _of_evaluation(facts, count) if facts.evaluation is not None else []
    source = "Every policy answered the same prompts, sampled alike."
    if not samples:
        step = next((step for step in reversed(facts.policies) if step.folder.samples.is_file()), None)
        if step is None:
            return None
        samples = _of_step(step, count)
        source = f"No evaluation lays answers side by side; these are the last that the step {step.name} wrote down."
    if not samples:
        return None
    blocks: list[Block] = [Text(_WARNING, tone="missing"), Text(source), *samples]
    return Section("Answers side by side", "answers", blocks)


def _of_evaluation(facts: Facts, count: int) -> list[Sample]:
    assert facts.evaluation is not None
    by_kind: dict[str, list[Sample]] = {}
    for sampled in facts.evaluation.samples:
        prompt = [(str(one.get("role", "user")), str(one.get("content", ""))) for one in sampled.prompt]
        answered = [policy for policy in facts.evaluation.policies if policy in sampled.answers]
        preferring = _preferring({policy: sampled.answers[policy] for policy in answered})
        answers = [
            Answer(policy, sampled.answers[policy].text, _known(sampled.answers[policy], preferring.get(policy, [])))
            for policy in answered
        ]
        by_kind.setdefault(sampled.kind, []).append(Sample(_title(sampled.kind, prompt), prompt, answers))
    chosen: list[Sample] = []
    depth = max((len(samples) for samples in by_kind.values()), default=0)
    for place in range(depth):
        chosen += [samples[place] for samples in by_kind.values() if place < len(samples)]
    return chosen[:count]


def _of_step(step: RunStep, count: int) -> list[Sample]:
    rows = [one for one in SamplesRecord(step.folder.samples).read() if "prompt" in one and "answer" in one]
    last = max((int(one[STEP]) for one in rows), default=0)
    samples = []
    for one in [one for one in rows if one[STEP] == last][:count]:
        prompt = [("", str(one["prompt"]))]
        answer = Answer(step.name, str(one["answer"]), _length(one.get("tokens"), one.get("finished")))
        samples.append(Sample(_title("", prompt), prompt, [answer]))
    return samples


def _title(kind: str, prompt: Sequence[tuple[str, str]]) -> str:
    text = " ".join(prompt[-1][1].split()) if prompt else ""
    short = text if len(text) <= _LONGEST_TITLE else f"{text[: _LONGEST_TITLE - 3]}..."
    return f"{kind}: {short}" if kind else short


def _preferring(answers: Mapping[str, SampledAnswer]) -> dict[str, list[str]]:
    """Policy -> the models that give its answer the unique highest score."""
    preferring: dict[str, list[str]] = {}
    for key, label in _SCORES:
        scores = {policy: value for policy, one in answers.items() if (value := one.scores.get(key)) is not None}
        best = [policy for policy, value in scores.items() if value == max(scores.values())]
        if len(best) == 1 < len(scores):
            preferring.setdefault(best[0], []).append(label)
    return preferring


def _known(answer: SampledAnswer, preferring: Sequence[str]) -> str:
    scores = [f"{label} {number(value)}" for key, label in _SCORES if (value := answer.scores.get(key)) is not None]
    known = ", ".join([*([length] if (length := _length(answer.tokens, answer.finished)) else []), *scores])
    return f"{known}; preferred by: {', '.join(preferring)}" if preferring else known


def _length(tokens: Any, is_finished: Any) -> str:
    cut = ", truncated" if is_finished is False else ""
    return f"{tokens} tokens{cut}" if tokens is not None else ""
