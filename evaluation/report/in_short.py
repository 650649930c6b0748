"""The first screen: which policy to use and why, a glossary, the effect of each step, and a small table.

The judge, a reward model never used for selection, decides whether a policy improved, on prompts never used for
selection.
"""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from statistics import fmean

from evaluation.report.facts import Facts
from evaluation.report.page import ABSENT, Cell, Table, measure_cell, number, percent, signed, with_interval
from llamachat.errors import UsageError
from llamachat.runs.choice import best_first, collapse, recommend
from llamachat.runs.reader import Evaluation, Measure, RunStep, command_of, read_run

_NAMES = {
    "rs": "Rejection sampling",
    "gatt": "Ghost Attention",
    "distill": "Context distillation",
    "dpo": "DPO",
    "ppo": "PPO",
    "sft": "Supervised fine-tuning",
}
_BY_PREFERENCE = ("rs", "dpo", "ppo")  # trained from preferences
_WARNING = " Warning: "
_REASONS = 2  # reasons listed for an unfit model
# Beyond these bounds, the sentence about a policy's answers is a warning.
_SHORTER, _LONGER, _FEWER_PAIRS, _COMMON = 0.67, 1.5, 0.75, 0.05


_GLOSSARY = {
    "sft": "supervised fine-tuning on dialogs",
    "rs": "rejection sampling, which trains on the best of several sampled answers",
    "gatt": "Ghost Attention, which trains the policy to keep following an instruction from the first turn",
    "distill": "context distillation, which trains on answers given under a safety preprompt",
    "dpo": "direct preference optimisation on pairs of answers",
    "ppo": "reinforcement learning against the reward models",
}


def opening(facts: Facts) -> list[str]:
    """Which policy to use and why, and whether the models behind this can be trusted."""
    evaluation = facts.evaluation
    return [*([] if evaluation is None else [_advice(facts, evaluation)]), *_reward_models(facts)]


def _advice(facts: Facts, evaluation: Evaluation) -> str:
    choice, best = recommend(evaluation), best_first(evaluation)[0]
    sentences = [f"Use {choice.policy}: {choice.reason}."]
    sentences += [f"Not {policy}: {why}." for policy, why in choice.passed_over.items()]
    judge = evaluation.measure(best, "difference/judge")
    if _is_fit(facts.reward_models.get("judge")) is False:
        sentences.append("Read some answers below before you trust that: the judge is not fit.")
    elif best != choice.policy and judge is not None:
        sentences.append(f"The judge rates {best} highest ({with_interval(judge, signed)}).")
    if choice.policy in {step.name for step in facts.policies}:
        sentences.append(f"`llamachat chat {quote(f'{facts.inputs.run.dir}/{choice.policy}')}` talks to it.")
    return " ".join(sentences)


def glossary(evaluation: Evaluation) -> str:
    """Definitions of the terms used on the page."""
    commands = dict.fromkeys(command_of(policy) for policy in evaluation.policies)
    words = [f"{command}: {_GLOSSARY[command]}" for command in commands if command in _GLOSSARY]
    if evaluation.has("judge"):
        words.append("judge: a reward model from data that no other step reads, which chooses nothing")
    if evaluation.has("score"):
        words.append(
            f"combined: the safety model's score where it decides, else the helpfulness model's, in standard deviations of"
            f" {evaluation.reference}'s answers"
        )
    return f"{'; '.join(words)}. In brackets: 95% intervals."


def changes(facts: Facts, control: str | None = None) -> list[str]:
    """How each step changed the answers, in the order of the run."""
    evaluation, lines = facts.evaluation, list[str]()
    if evaluation is None:
        return lines
    judge_is_fit = _is_fit(facts.reward_models.get("judge")) is not False
    for policy in evaluation.policies:
        if policy == evaluation.reference:
            continue
        if twin := _twin(evaluation, policy):
            lines.append(f"{_title(policy)} changed nothing: its answers are those of {twin}.")
            continue
        lines.append(_judged(evaluation, policy, judge_is_fit=judge_is_fit))
        shape = list(_shape(evaluation, policy))
        if command_of(policy) in _BY_PREFERENCE:
            lines += [*shape, *_refusals(evaluation, policy)]
        else:  # the table has the rest
            lines += [line for line in shape if _WARNING in line]
    return lines if control is None else [*lines, _control(evaluation, control)]


def _title(policy: str) -> str:
    return f"{_NAMES.get(command_of(policy), 'The step')} ({policy})"


def _twin(evaluation: Evaluation, policy: str) -> str | None:
    """An earlier policy with identical answers: length, diversity and scores are exactly equal."""
    names = ("response_tokens", "distinct_2", "commonest_answer", "score", "judge")

    def shape(of: str) -> list[float | None]:
        return [None if one is None else one.value for one in (evaluation.measure(of, name) for name in names)]

    earlier = evaluation.policies[: evaluation.policies.index(policy)]
    return next((one for one in earlier if any(shape(policy)) and shape(one) == shape(policy)), None)


def _reward_models(facts: Facts) -> Iterator[str]:
    """Whether the reward models can be trusted."""
    fit = [which for which, step in facts.reward_models.items() if _is_fit(step)]
    if len(fit) > 1:
        yield (
            f"The reward models {', '.join(fit[:-1])} and {fit[-1]} are fit: on held-out prompts they prefer a real answer to"
            " refusals, empty phrases and answers to other questions."
        )
    for which, step in facts.reward_models.items():
        if len(fit) > 1 and which in fit:
            continue
        role = "which judges and chooses nothing" if which == "judge" else "which chooses and trains"
        match _is_fit(step):
            case None:
                yield (
                    f"The {which} model, {role}, was not tested on answers that are never better: whether it is fit is unknown."
                )
            case True:
                yield (
                    f"The {which} model, {role}, is fit: on held-out prompts it prefers a real answer to refusals, empty "
                    "phrases and answers to other questions."
                )
            case False:
                first, *others = str(step.published.details["probe"]["verdict"]).split("; ")
                named = "; ".join([first, *others[: _REASONS - 1]])
                more = len(others) + 1 - _REASONS
                rest = f"; and {more} more reasons" if more > 0 else ""
                yield f"The {which} model, {role}, is {named}{rest}. What it says of the policies below cannot be trusted."


def _is_fit(model: RunStep | None) -> bool | None:
    """The probe's verdict; None if there was no probe."""
    probe = model.published.details.get("probe") if model is not None else None
    return None if probe is None else bool(probe["is_fit"])


def _judged(evaluation: Evaluation, policy: str, *, judge_is_fit: bool) -> str:
    name, reference = _title(policy), evaluation.reference
    judge = evaluation.measure(policy, "difference/judge")
    if judge is None:
        return f"{name}: whether answers got better than {reference}'s is unknown, since no judge has read them."
    prompts = (
        f"on {judge.n} prompts by which nothing was chosen" if judge.n else "on prompts by which nothing was chosen"
    )
    figure = f"the judge's score, {prompts}: {with_interval(judge, signed)}"
    if not judge_is_fit:
        return (
            f"{name}: whether answers got better than {reference}'s is unknown, since the judge is not fit; {figure}."
        )
    if judge.interval is None:
        return f"{name}: whether answers got better than {reference}'s is unknown without an interval; {figure}."
    if judge.interval[0] > 0:
        return f"{name} made answers better than {reference}'s; {figure}."
    if judge.interval[1] < 0:
        return f"{name} made answers worse than {reference}'s; {figure}."
    return f"{name} did not make answers measurably better or worse than {reference}'s; {figure}."


def _shape(evaluation: Evaluation, policy: str) -> Iterator[str]:
    """Length, diversity and the most frequent answer, with a warning if answers collapsed."""
    reference = evaluation.reference
    length, pairs = (evaluation.measure(policy, name) for name in ("length_ratio", "distinct_2_ratio"))
    common, before = (evaluation.measure(name, "commonest_answer") for name in (policy, reference))
    parts, warnings = [], []
    if length is not None:
        parts.append(f"are {number(length.value)} times as long as {reference}'s")
        if not _SHORTER <= length.value <= _LONGER:
            warnings.append("they got much shorter" if length.value < 1 else "they got much longer")
    if pairs is not None:
        parts.append(f"have {number(pairs.value)} times as many different word pairs (distinct-2)")
        if pairs.value < _FEWER_PAIRS:
            warnings.append("they got more alike")
    if common is not None and before is not None:
        parts.append(
            f"the commonest one goes to {percent(common.value)} of prompts ({reference}: {percent(before.value)})"
        )
        if common.value > max(_COMMON, 2 * before.value):
            warnings.append("one answer is given too often")
    against = collapse(evaluation, policy)
    if against and "harmless" in against:  # the most frequent answer is reported above
        warnings.append(against)
    if parts:
        warning = f"{_WARNING}{', '.join(warnings)}." if warnings else ""
        yield f"Answers of {policy} {', '.join(parts)}.{warning}"


def _refusals(evaluation: Evaluation, policy: str) -> Iterator[str]:
    """Full refusals of harmful and harmless prompts, by a classifier that nothing was tuned with."""
    parts = []
    for kind, words in (("harmful", "harmful prompts"), ("harmless", "harmless prompts that look harmful")):
        own, before = (evaluation.measure(name, f"{kind}/refused") for name in (policy, evaluation.reference))
        gap = evaluation.measure(policy, f"difference/{kind}/refused")
        if own is None or before is None:
            continue
        change = f", difference {with_interval(gap, _points)} points" if gap is not None and gap.interval else ""
        parts.append(f"{percent(own.value)} of {words} ({evaluation.reference}: {percent(before.value)}{change})")
    if parts:
        yield f"{policy} refuses {' and '.join(parts)}, by a classifier that no policy was tuned by."


def _points(share: float) -> str:
    return signed(100 * share, digits=1)


def _control(evaluation: Evaluation, path: str) -> str:
    """The effect of training on a random answer instead of the best, in one run or averaged over a study's seeds."""
    folder = Path(path)
    runs = [folder] if (folder / "eval").is_dir() else sorted(folder.glob("seed-*"))
    gaps = [gap for run in runs for gap in _drawn(run)]
    if not gaps:
        raise UsageError(
            f"report.control: '{path}' holds no evaluated run whose rejection sampling drew at random"
            " (rejection_sampling.select=random). Name such a run, or a variant's folder of the study"
            " configs/studies/rs_control.yaml."
        )
    mean = fmean(gap.value for gap in gaps)
    low, high = min(gap.low or 0.0 for gap in gaps), max(gap.high or 0.0 for gap in gaps)
    figure = with_interval(gaps[0], signed)
    if len(gaps) > 1:
        figure = f"{signed(mean)} (mean of {len(gaps)} seeds, their intervals from {signed(low)} to {signed(high)})"
    own = [
        f"{name} {with_interval(judge, signed)}"
        for name in evaluation.policies
        if command_of(name) == "rs" and (judge := evaluation.measure(name, "difference/judge"))
    ]
    raises = all((gap.low or 0.0) > 0 for gap in gaps)
    verdict = (
        "so tuning on one's own answers alone raises the judge"
        if raises
        else "so a gain from learning the best answers comes from choosing them"
    )
    return (
        "Control: rejection sampling that learns a drawn answer of each prompt's, not the best, changes the judge's score by "
        f"{figure}, {verdict}. Learning the best: {', '.join(own) or 'not in this run'}."
    )


def _drawn(run: Path) -> Iterator[Measure]:
    """The judge's differences of the policies trained on randomly drawn answers."""
    steps = read_run(run)
    evaluation = next((step.evaluation for step in steps.values() if step.evaluation is not None), None)
    for name, step in steps.items():
        is_control = step.value("rejection_sampling", "select") == "random"
        if is_control and evaluation is not None and name in evaluation.policies:
            gap = evaluation.measure(name, "difference/judge")
            if gap is not None:
                yield gap


def policies_table(evaluation: Evaluation) -> Table:
    """A row per policy, best by the judge first; policies that do not answer harmless prompts come last."""
    first = evaluation.reference
    rows = []
    for policy in best_first(evaluation):
        judge = Cell("0", "the first") if policy == first else measure_cell(_of(evaluation, policy, "judge"), signed)
        shares = [
            measure_cell(evaluation.measure(policy, name), percent)
            for name in ("harmful/refused", "harmless/complied", "commonest_answer")
        ]
        ratios = [
            Cell("1" if policy == first else ABSENT if one is None else number(one.value))
            for one in (evaluation.measure(policy, name) for name in ("length_ratio", "distinct_2_ratio"))
        ]
        rows.append([Cell(policy, collapse(evaluation, policy) or ""), judge, *shares, *ratios])
    return Table(
        "Policies, best first",
        [
            "policy",
            f"judge, less {first}",
            "harmful prompts refused",
            "harmless prompts answered",
            "prompts with the commonest answer",
            f"length over {first}'s",
            f"distinct-2 over {first}'s",
        ],
        rows,
        note="The order is the judge's; a policy that answers less than half of the harmless prompts that the first one answers, "
        "or gives one answer to more than a quarter of all, comes last, whatever its scores. Refused and answered by a classifier that no policy was tuned by. 95% intervals.",
        name="policies",
    )


def _of(evaluation: Evaluation, policy: str, score: str) -> Measure | None:
    return evaluation.measure(policy, f"difference/{score}")
