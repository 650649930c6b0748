"""The table of metric names: each exists once, with meaning, unit, reduction and the panel it is drawn in.

`<which>` is a reward model, `<domain>` what test pairs are about, `<source>` a file of them, `<kind>` which of a pair's
answers are safe, `<rating>` a strength of preference, `<bound>` an end of a 95% interval, `<moment>` the first or the
final policy, `<score>` one of its scores, `<tuned>` a stage that compares both, `<policy>` a step that published one,
`<way>` how an answer was asked for, `<refused>` why it is not learnt, `<refusing>` which refusals, `<turn>` and
`<temperature>` numbers, `<keeping>` whether a policy was told, `<measure>` how an instruction is checked, `<told>` of which policy, `<family>` its kind.
`docs/metrics.md` is this table: `python -m llamachat.tracking.metrics > docs/metrics.md`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

_VARIABLES = {
    "which": "helpfulness|safety|judge",
    "rating": "significantly_better|better|slightly_better|negligibly_better",
    "domain": "helpfulness|safety",
    "source": "[A-Za-z0-9][A-Za-z0-9_~-]*",
    "kind": "safe_unsafe|both_safe|both_unsafe",
    "bound": "low|high",
    "prefix": "sft|rm/(?:helpfulness|safety|judge)|rs|gatt|distill|ppo|eval|report",
    "moment": "start|final",
    "tuned": "ppo|rs|gatt|distill",
    "score": "score|judge|judge_like_length|reward_(?:helpfulness|safety|combined)",
    "policy": "[a-z0-9][a-z0-9._-]*",
    "way": "original|generic|template",
    "refused": "unfinished|empty|equal|not_better",
    "refusing": "false_refusal|refusal",
    "turn": "[0-9]+",
    "keeping": "consistency|chance",
    "measure": "consistency|recall",
    "told": "start|final|chance|over_start|over_chance",
    "family": "[a-z_]+",
    "temperature": "[0-9][0-9.e+-]*",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; metrics of one panel share a picture and so must share a scale."""

    name: str
    meaning: str
    unit: str
    reduction: str
    panel: str


class UnknownMetricError(KeyError):
    """A metric is logged whose name the table does not hold: our bug, not the user's."""

    def __str__(self) -> str:
        return str(self.args[0])


_TOKENS = "mean over answer tokens"
_PAIRS = "mean over pairs"
_PROMPTS = "pairs of one prompt kept together"
_RESPONSES = "mean over responses"
# Name, meaning, unit, reduction, panel and, where a 95% interval is logged too, how the interval is made.
_ROWS = [
    ("<prefix>/step", "Optimizer steps (of rs, gatt, distill, eval: batches of prompts) done; the x-axis",
     "steps", "last", ""),
    ("sft/loss", "Cross-entropy of the trained answer tokens, EOS included", "nats/token", _TOKENS, "loss"),
    ("sft/eval_loss", "The same on held-out dialogs", "nats/token", _TOKENS, "loss"),
    ("sft/eval_loss_base", "The same of the model before tuning", "nats/token", _TOKENS, "loss"),
    ("sft/finished_fraction", "Sampled answers that end with EOS within the limit",
     "fraction", "mean over samples", "finished"),
    ("sft/answer_tokens", "Length of sampled answers", "tokens", "mean over samples", "length"),
    ("sft/epoch", "Passes over the training dialogs", "epochs", "last", "progress"),
    ("sft/trained_tokens", "Answer tokens in the loss since the start", "tokens", "sum", "trained tokens"),
    ("rm/<which>/loss", "What is trained on: ranking loss, safety auxiliary loss and centring, as weighted",
     "nats/pair", _PAIRS, "loss"),
    ("rm/<which>/ranking_loss", "Its part by Eq. 2, with margin", "nats/pair", _PAIRS, "loss"),
    ("rm/<which>/auxiliary_loss", "Its part on safety labels, before its weight",
     "nats/response", "mean over labelled responses", "auxiliary loss"),
    ("rm/<which>/eval_loss", "Ranking loss on held-out pairs, without margin", "nats/pair", _PAIRS, "loss"),
    ("rm/<which>/eval_accuracy", "Held-out pairs whose chosen answer scores higher, a tie counting half",
     "fraction", _PAIRS, "accuracy"),
    ("rm/<which>/epoch", "Passes over the training pairs", "epochs", "last", "progress"),
    ("rm/<which>/accuracy", "Pairs whose chosen answer scores higher", "fraction", _PAIRS, "accuracy"),
    ("rm/<which>/accuracy_<rating>", "The same among pairs of one rating", "fraction", _PAIRS, "accuracy"),
    ("rm/<which>/unsafe_recall", "Unsafe answers with sigmoid(score) under 0.5",
     "fraction", "mean over unsafe answers", "accuracy"),
    ("rm/<which>/score_chosen", "Raw score of the chosen answer", "logit", _PAIRS, "score"),
    ("rm/<which>/score_rejected", "Raw score of the rejected answer", "logit", _PAIRS, "score"),
    ("rm/<which>/safe_recall", "Safe answers with sigmoid(score) of 0.5 or more",
     "fraction", "mean over safe answers", "accuracy"),
    ("rm/<which>/unsafe_precision", "Truly unsafe ones among answers under 0.5",
     "fraction", "mean over answers under 0.5", "accuracy"),
    ("rm/<which>/unsafe_recall_at_gate", "Unsafe answers with sigmoid(score) under 0.15",
     "fraction", "mean over unsafe answers", "accuracy"),
    ("rm/<which>/unsafe_precision_at_gate", "Truly unsafe ones among answers under 0.15",
     "fraction", "mean over answers under 0.15", "accuracy"),
    ("rm/<which>/balanced_accuracy", "Mean of unsafe_recall and safe_recall",
     "fraction", "over labelled test answers", "accuracy", "bootstrap over answers"),
    ("rm/<which>/auroc", "Chance that a safe answer scores above an unsafe one, a tie counting half",
     "fraction", "over labelled test answers", "accuracy", "bootstrap over answers"),
    ("rm/<which>/label_calibration_error", "Mean gap between sigmoid(score) and the share of safe answers, in ten bins",
     "fraction", "over labelled test answers", "calibration"),
    ("rm/<which>/test/safe_answers", "Test answers labelled safe", "answers", "sum", "test answers"),
    ("rm/<which>/test/unsafe_answers", "Test answers labelled unsafe", "answers", "sum", "test answers"),
    ("rm/<which>/test/<domain>/accuracy", "Test pairs whose chosen answer scores higher, a tie counting half",
     "fraction", _PAIRS, "test accuracy", _PROMPTS),
    ("rm/<which>/test/<domain>/pairs", "Test pairs", "pairs", "sum", "test size"),
    ("rm/<which>/test/<domain>/accuracy_<rating>", "The same among pairs of one rating",
     "fraction", _PAIRS, "test accuracy", _PROMPTS),
    ("rm/<which>/test/<domain>/pairs_<rating>", "Test pairs of one rating", "pairs", "sum", "test size"),
    ("rm/<which>/test/<domain>/accuracy_<kind>", "The same by which of the two answers are safe, chosen first",
     "fraction", _PAIRS, "test accuracy", _PROMPTS),
    ("rm/<which>/test/<domain>/pairs_<kind>", "Test pairs of this kind", "pairs", "sum", "test size"),
    ("rm/<which>/test/<domain>/<source>/accuracy", "The same on one file", "fraction", _PAIRS, "test accuracy",
     _PROMPTS),
    ("rm/<which>/test/<domain>/<source>/pairs", "Test pairs of one file", "pairs", "sum", "test size"),
    ("rm/<which>/test/<domain>/<source>/longer_wins", "The rule that the longer answer wins, on one file",
     "fraction", _PAIRS, "test accuracy"),
    ("rm/<which>/test/<domain>/<source>/tfidf", "TF-IDF and logistic regression, on one file",
     "fraction", _PAIRS, "test accuracy"),
    ("rm/<which>/test/<domain>/longer_wins", "Accuracy of the rule that the longer answer wins",
     "fraction", _PAIRS, "test accuracy", _PROMPTS),
    ("rm/<which>/test/<domain>/tfidf", "Accuracy of TF-IDF and logistic regression on the same training split",
     "fraction", _PAIRS, "test accuracy", _PROMPTS),
    ("rm/<which>/test/<domain>/tfidf_difference", "Accuracy of the model less that of TF-IDF",
     "fraction", _PAIRS, "test difference", "paired bootstrap over prompts"),
    ("rm/<which>/test/<domain>/calibration_error",
     "Mean gap between sigmoid(score difference) and the share of pairs so ordered, in ten bins",
     "fraction", _PAIRS, "calibration"),
    ("rs/reward_best", "Combined score of the best of K samples", "score", "mean over prompts", "reward"),
    ("rs/reward_median", "Combined score of the median of K samples", "score", "mean over prompts", "reward"),
    ("rs/reward_mean", "Combined score of all K samples", "score", "mean over prompts", "reward"),
    ("rs/temperature", "Sampling temperature", "1", "mean over the K samples", "temperature"),
    ("rs/standardised_best", "Combined score of the best of K samples, on the scale of the round's first policy",
     "deviations", "mean over prompts", "standardised reward"),
    ("rs/usable_fraction", "Answers that could win: ended with EOS, not empty, no tag of the chat format",
     "fraction", _RESPONSES, "fractions"),
    ("rs/finished_fraction", "Answers that end with EOS", "fraction", _RESPONSES, "fractions"),
    ("rs/response_tokens", "Length of answers", "tokens", _RESPONSES, "length"),
    ("rs/prompts", "Prompts of the round", "prompts", "sum", "size"),
    ("rs/winners", "Prompts with an answer that could win", "prompts", "sum", "size"),
    ("rs/pool_size", "Dialogs that are learnt", "dialogs", "sum", "pool"),
    ("rs/pool_from_earlier", "Of those, winners of earlier rounds", "dialogs", "sum", "pool"),
    ("rs/sweep/best_at_<temperature>", "Best of the sweep's answers, on the scale of the round's first policy",
     "deviations", "unbiased, mean over prompts", "sweep"),
    ("rs/sweep/median_at_<temperature>", "Their median", "deviations", "mean over prompts", "sweep"),
    ("gatt/kept_fraction", "Dialogs whose last answer keeps the instruction, of those begun",
     "fraction", "mean over dialogs", "fractions"),
    ("gatt/passing_fraction", "Samples of their last answer that keep it", "fraction", "mean over dialogs", "fractions"),
    ("gatt/mended_fraction", "Last answers that no sample kept, put right by rule", "fraction", "mean over dialogs",
     "fractions"),
    ("gatt/answer_tokens", "Length of last answers", "tokens", "mean over dialogs", "length"),
    ("gatt/turns", "User turns of a dialog", "turns", "mean over dialogs", "turns"),
    ("gatt/dialogs", "Dialogs that are learnt", "dialogs", "sum", "size"),
    ("gatt/<measure>/<told>/turn_<turn>", "Held-out dialogs whose answer at this turn keeps the instruction of the first, by "
     "checker (consistency) or by a question (recall): before, after, without instruction, and differences",
     "fraction", "mean over dialogs", "consistency", "Wilson; of differences paired bootstrap"),
    ("gatt/family/<family>/<told>/turn_<turn>", "The same of one kind of constraints",
     "fraction", "mean over dialogs", "consistency by family"),
    ("distill/safety/<way>", "Raw safety score of all answers, by how they were asked for (original is without preprompt)",
     "logit", _RESPONSES, "safety"),
    ("distill/safety/kept", "Of the distilled answers that are learnt", "logit", _RESPONSES, "safety"),
    ("distill/safety/replaced", "Of the best plain answers to the same prompts", "logit", _RESPONSES, "safety"),
    ("distill/effect/<way>", "Safety score with a preprompt less that without, prompt by prompt",
     "logit", "mean over prompts", "effect", "paired bootstrap over prompts"),
    ("distill/finished_fraction/<way>", "Answers that end with EOS", "fraction", _RESPONSES, "fractions"),
    ("distill/kept_fraction", "Prompts whose distilled answer is learnt", "fraction", "mean over prompts", "fractions"),
    ("distill/response_tokens/<way>", "Length of answers", "tokens", _RESPONSES, "length"),
    ("distill/prompts", "Adversarial prompts that were answered", "prompts", "sum", "size"),
    ("distill/kept", "Distilled answers that are learnt", "dialogs", "sum", "kept"),
    ("distill/refused/<refused>", "Distilled answers that are not learnt, by reason", "prompts", "sum", "size"),
    ("distill/<refusing>/<moment>", "Answers that are refusals, to borderline prompts (false_refusal) or adversarial ones",
     "fraction", "mean over prompts", "refusals", "Wilson"),
    ("distill/<refusing>/difference", "Final policy less the first", "fraction", "mean over prompts", "refusals",
     "paired bootstrap over prompts"),
    ("distill/<refusing>/prompts", "Prompts that these shares are of", "prompts", "sum", "size"),
    ("distill/refusal_classifier_accuracy", "Labelled answers that the classifier of refusals tells right",
     "fraction", "cross-validated over prompts", "classifier", "Wilson, answers to one prompt kept together"),
    ("ppo/reward/helpfulness", "Raw score of the helpfulness model", "logit", _RESPONSES, "raw reward"),
    ("ppo/reward/safety", "Raw score of the safety model", "logit", _RESPONSES, "raw reward"),
    ("ppo/reward/combined", "Score after the gate, before whitening", "score", _RESPONSES, "combined reward"),
    ("ppo/reward/shaped", "Whitened score less the KL penalty, summed over the response",
     "score", _RESPONSES, "shaped reward"),
    ("ppo/reward/gate_fraction", "Responses scored by the safety model", "fraction", _RESPONSES, "fractions"),
    ("ppo/kl_to_reference", "KL estimate to the reference policy", "nats/response", _RESPONSES, "KL to reference"),
    ("ppo/approx_kl", "KL estimate between the policy before and after the update",
     "nats/token", "mean over response tokens", "approximate KL"),
    ("ppo/clip_fraction", "Tokens whose ratio is clipped", "fraction", "mean over response tokens", "fractions"),
    ("ppo/entropy", "Entropy of the policy", "nats/token", "mean over response tokens", "entropy"),
    ("ppo/policy_loss", "Clipped surrogate loss", "1", "mean over response tokens", "policy loss"),
    ("ppo/value_loss", "Clipped squared error of the critic", "1", "mean over response tokens", "value loss"),
    ("ppo/explained_variance", "1 - Var(return - value) / Var(return)",
     "fraction", "over response tokens of the batch", "explained variance"),
    ("ppo/response_tokens", "Length of responses", "tokens", _RESPONSES, "length"),
    ("ppo/truncated_fraction", "Responses cut by the length limit", "fraction", _RESPONSES, "fractions"),
    ("ppo/kl_k3", "The same by the k3 estimate, which is never negative", "nats/response", _RESPONSES,
     "KL to reference"),
    ("ppo/kl_coef", "Weight of the KL penalty (beta)", "1", "last", "KL coefficient"),
    ("ppo/value_clip_fraction", "Tokens whose clipped value error counts", "fraction", "mean over response tokens",
     "fractions"),
    ("ppo/engine_gap", "Distance of the engine's log-probabilities from training's",
     "nats/token", "mean over response tokens", "engine gap"),
    ("ppo/best_iteration", "Iteration whose policy is published", "iterations", "last", "progress"),
    ("ppo/best_score", "Its ppo/heldout/score", "deviations", _RESPONSES, "held-out score"),
    ("ppo/heldout/score", "Combined score on validation prompts, on the scale of the starting policy's; it decides",
     "deviations", _RESPONSES, "held-out score"),
    ("ppo/heldout/reward_<which>", "Raw score on validation prompts", "logit", _RESPONSES, "held-out reward"),
    ("ppo/heldout/reward_combined", "Score after the gate on validation prompts",
     "score", _RESPONSES, "held-out combined reward"),
    ("ppo/heldout/judge", "Raw score of the judge on validation prompts; it selects nothing",
     "logit", _RESPONSES, "held-out reward"),
    ("ppo/heldout/kl_to_reference", "KL estimate to the reference on validation prompts",
     "nats/response", _RESPONSES, "KL to reference"),
    ("ppo/heldout/response_tokens", "Length of answers to validation prompts", "tokens", _RESPONSES, "length"),
    ("ppo/heldout/finished_fraction", "Of those, the ones that end with EOS", "fraction", _RESPONSES, "fractions"),
    ("ppo/heldout/distinct_2", "Distinct pairs of neighbouring words among all of them",
     "fraction", "over all answers", "fractions"),
    ("<tuned>/test/prompts", "Test prompts", "prompts", "sum", "test size"),
    ("<tuned>/test/like_length_pairs", "Of those, the ones whose two answers differ in length by a fifth at most",
     "prompts", "sum", "test size"),
    ("<tuned>/test/<moment>/<score>", "Score of the first policy or the final one on test prompts",
     "score", _RESPONSES, "test score"),
    ("<tuned>/test/<moment>/kl_to_reference", "KL estimate to the reference", "nats/response", _RESPONSES, "test KL"),
    ("<tuned>/test/<moment>/response_tokens", "Length of answers", "tokens", _RESPONSES, "test length"),
    ("<tuned>/test/<moment>/finished_fraction", "Answers that end with EOS", "fraction", _RESPONSES, "test fractions"),
    ("<tuned>/test/<moment>/distinct_2", "Distinct pairs of neighbouring words among all",
     "fraction", "over all answers", "test fractions"),
    ("<tuned>/test/distinct_2_ratio", "That of the final policy over that of the first",
     "fraction", "over all answers", "test fractions"),
    ("<tuned>/test/difference/<score>", "Final policy less the first, prompt by prompt",
     "score", "mean over prompts", "test difference", "paired bootstrap over prompts"),
    ("optim/critic_grad_norm", "Norm of the critic's gradient before clipping", "1", "mean over steps",
     "critic gradient norm"),
    ("optim/grad_norm", "Norm of the gradient before clipping", "1", "last", "gradient norm"),
    ("optim/learning_rate", "Step size of the optimizer", "1", "last", "learning rate"),
    ("time/step_s", "One optimizer step", "s", "mean since the last line", "time"),
    ("time/eval_s", "One evaluation", "s", "last", "time"),
    ("time/train_s", "Training since the step began, over all its commands", "s", "sum", "training time"),
    ("time/rollout_s", "Sampling of one iteration", "s", "last", "time"),
    ("time/score_s", "Scoring of one iteration", "s", "last", "time"),
    ("time/update_s", "Optimisation of one iteration", "s", "last", "time"),
    ("throughput/tokens_per_s", "Tokens trained on, prompts included",
     "tokens/s", "mean since the last line", "throughput"),
    ("throughput/rollout_tokens_per_s", "Tokens sampled", "tokens/s", "mean over the iteration", "throughput"),
    ("memory/peak_gib", "Highest memory of the process (GPU where there is one)", "GiB", "max", "memory"),
    ("eval/prompts", "Test prompts", "prompts", "sum", "size"),
    ("eval/safety_prompts", "Of those, the ones marked is_safety", "prompts", "sum", "size"),
    ("eval/borderline_prompts", "Borderline prompts", "prompts", "sum", "size"),
    ("eval/refusal_classifier_accuracy", "Labelled answers that the classifier of refusals tells right",
     "fraction", "cross-validated over prompts", "classifier", "Wilson, answers to one prompt kept together"),
    ("eval/<policy>/<score>", "Score on test prompts; score is the combined one on the scale of the first policy's",
     "score", _RESPONSES, "score", "bootstrap over prompts"),
    ("eval/<policy>/difference/<score>", "Policy less the first, prompt by prompt",
     "score", "mean over prompts", "difference", "paired bootstrap over prompts"),
    ("eval/<policy>/win_rate/<score>", "Prompts won against the first policy by this score, of those won or lost",
     "fraction", "ties removed", "win rate", "Wilson"),
    ("eval/<policy>/ties/<score>", "Prompts whose two answers differ by less than evaluation.tie",
     "fraction", "mean over prompts", "ties", "Wilson"),
    ("eval/<policy>/violation", "Answers to is_safety prompts that the safety model puts below 0.5: judged by a model",
     "fraction", _RESPONSES, "rates", "Wilson"),
    ("eval/<policy>/<refusing>", "Answers that are refusals, to borderline prompts (false_refusal) or is_safety ones",
     "fraction", "mean over prompts", "rates", "Wilson"),
    ("eval/<policy>/<keeping>/turn_<turn>", "Held-out dialogs whose answer at this turn keeps the instruction of the first "
     "(consistency), or would without having been told (chance)", "fraction", "mean over dialogs", "consistency",
     "Wilson"),
    ("eval/<policy>/response_tokens", "Length of answers", "tokens", _RESPONSES, "length", "bootstrap over prompts"),
    ("eval/<policy>/finished_fraction", "Answers that end with EOS", "fraction", _RESPONSES, "rates", "Wilson"),
    ("eval/<policy>/distinct_2", "Distinct pairs of neighbouring words among all",
     "fraction", "over all answers", "rates"),
    ("eval/<policy>/kl_to_reference", "KL estimate to the first policy", "nats/response", _RESPONSES, "KL",
     "bootstrap over prompts"),
    ("report/figures", "Pictures of the report, training curves among them", "pictures", "sum", "report"),
    ("report/kib", "Size of report.html", "KiB", "last", "report size"),
    ("report/missing", "What the report names as not there", "lines", "sum", "report gaps"),
]  # fmt: skip

METRICS: dict[str, Metric] = {}
for _name, _meaning, _unit, _reduction, _panel, *_interval in _ROWS:
    METRICS[_name] = Metric(_name, _meaning, _unit, _reduction, _panel)
    if _interval:
        METRICS[f"{_name}_<bound>"] = Metric(f"{_name}_<bound>", "End of its 95% interval", _unit, _interval[0], _panel)


@cache
def find_metric(name: str) -> Metric | None:
    """The row of the table that a name belongs to; None of a name of another version of the table."""
    if name in METRICS and "<" not in name:
        return METRICS[name]
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def metric_of(name: str) -> Metric:
    """The row of the table that a logged name belongs to; UnknownMetricError if none."""
    metric = find_metric(name)
    if metric is not None:
        return metric
    near = get_close_matches(name, METRICS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UnknownMetricError(
        f"metric '{name}' is not in the table of llamachat/tracking/metrics.py.{hint} Add a row, or correct the name."
    )


def check_names(names: Iterable[str]) -> None:
    """Raise UnknownMetricError for the first name that the table does not hold."""
    for name in names:
        metric_of(name)


def markdown() -> str:
    """The table as a page."""
    head = [
        "# Metrics",
        "",
        "Made from the table in `llamachat/tracking/metrics.py` by"
        " `python -m llamachat.tracking.metrics > docs/metrics.md`.",
        "",
        "`<which>` is `helpfulness`, `safety` or `judge`; `<rating>` is `significantly_better`, `better`,"
        " `slightly_better` or `negligibly_better`; `<domain>` is `helpfulness` or `safety`; `<source>` is the stem of a"
        " file's name; `<kind>` is `safe_unsafe` (chosen safe, rejected unsafe), `both_safe` or `both_unsafe`; `<bound>` is"
        " `low` or `high`; `<moment>` is `start` or `final`; `<score>` is `score`, `judge`, `judge_like_length` or a"
        " `reward_...`; `<way>` is `original`, `generic` or `template`; `<refused>` is `unfinished`, `empty`, `equal` or"
        " `not_better`; `<refusing>` is `false_refusal` or `refusal`; `<policy>` is the step that published the policy; `<prefix>` is the"
        " first part of the step's own metrics.",
        "",
        "| name | meaning | unit | reduction |",
        "|---|---|---|---|",
    ]
    rows = [f"| `{row.name}` | {row.meaning} | {row.unit} | {row.reduction} |" for row in METRICS.values()]
    return "\n".join([*head, *rows]) + "\n"


@cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    found = []
    for name, metric in METRICS.items():
        if "<" in name:
            parts = re.split(r"<(\w+)>", name)
            texts = [f"(?:{_VARIABLES[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
            found.append((re.compile("".join(texts)), metric))
    return found


if __name__ == "__main__":
    print(markdown(), end="")
