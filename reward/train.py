"""Reward models (Llama 2, arXiv:2307.09288, section 3.2.2): preferences and a chat policy -> a model that scores
answers.

Reads the preferences and labels of `data` and a policy (or the base); writes the step folder's metrics.jsonl,
checkpoints/, summary.json, curves.png, figures/ and artifact/. A rating is only used as a margin; the order of a pair
decides which answer is better.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from llamachat import distributed
from llamachat.chat_format import TrainOn
from llamachat.chat_format.dialog import Message, with_system
from llamachat.data.records import first_user_turn
from llamachat.models.loading import policy_details
from llamachat.models.reward_model import (
    RewardStart,
    build_reward_model,
    reward_trunk_digest,
    save_reward_model,
)
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.tracking.tracker import Tracker
from llamachat.training.publishing import publish_model, sources_of
from llamachat.training.session import resume
from reward.config import Config
from reward.evaluation import ScoredPair, ScoredResponse, evaluate, tfidf_differences
from reward.pairs import TESTED, Examples, load_examples
from reward.presentation import draw_figures, draw_probe
from reward.probe import Probe, probe
from reward.ranking import Ranking, pair_scores, plan_training, response_scores

log = logging.getLogger(__name__)

# Metrics whose last value is written to summary.json, in addition to the figures on test pairs.
SUMMARY = ("loss", "accuracy", "eval_loss", "eval_accuracy", "eval_contrast_accuracy", "epoch")


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, evaluate and publish. After a kill, the same call resumes from the newest complete checkpoint."""
    assert inputs.which is not None
    resumed = resume(inputs, "reward", config)
    start = build_reward_model(inputs.base, inputs.tuning, policy=inputs.policy, seed=inputs.run.seed, device="auto")
    by_sequence = start.device.type == "cpu"
    if by_sequence:
        use_sequence_attention(start.model, trains_together=True)
    examples = load_examples(
        config,
        inputs.data,
        start.chat_format,
        which=inputs.which,
        system=inputs.base.system,
        max_tokens=inputs.base.max_tokens,
        seed=inputs.run.seed,
    )
    batches = plan_training(config, inputs, examples, device=start.device, branches=by_sequence)
    log.info(
        "%d training pairs and %d labelled responses, %d pairs held out, %d and %d of them contrast pairs; %d optimizer"
        " steps of %d pairs",
        len(examples.train),
        len(examples.labels),
        len(examples.validation),
        sum(example.domain == "contrast" for example in examples.train),
        sum(example.domain == "contrast" for example in examples.validation),
        batches.plan.num_steps,
        config.pairs_per_step,
    )
    head_VD = start.language_head() if config.language_weight > 0 else None
    ranking = Ranking(config, inputs.step, inputs.which, start.model, start.chat_format, examples, batches, head_VD)
    with resumed.session(ranking, prefix=inputs.step, unit="pair") as session:
        best = session.train()
        figures = session.finish([*map(ranking.metric, SUMMARY), "memory/peak_gib"], best)
        started = time.monotonic()
        figures |= measure_on_tests(ranking, inputs.folder, session.tracker)
        probed = probe_model(ranking, inputs, session.tracker)
        figures |= probed.figures
        figures["time/eval_s"] = time.monotonic() - started
        # Written before the artifact, which marks the step as finished: a resumed command would skip it.
        session.tracker.summary(figures)
        return publish_reward_model(
            start,
            inputs,
            dropped=examples.dropped,
            safety_labels=num_safety_labels(config, inputs, examples),
            notes=session.notes(best) | {"probe": {"is_fit": probed.is_fit, "verdict": probed.verdict}},
        )


def measure_on_tests(ranking: Ranking, folder: StepFolder, tracker: Tracker) -> dict[str, float]:
    """Figures on test pairs and labelled answers, with baselines trained on pairs of the same domain; draws plots."""
    which, examples = ranking.which, ranking.examples
    if not examples.test:
        log.warning("rm/%s: no test pairs (data.split.test), so its accuracy on unseen pairs is unknown", which)
        return {}
    pairs, responses = score_tests(ranking.model, examples)
    # Only pairs of the model's own domain: the rest of its mix would weaken the baseline.
    domains = TESTED if which == "judge" else (which,)
    own = [example for example in examples.train if example.domain in domains]
    baseline = tfidf_differences([pair.preference for pair in own], [pair.preference for pair in examples.test])
    evaluation = evaluate(which, pairs, responses, baseline=baseline)
    for picture in draw_figures(evaluation, folder.figures):
        tracker.figure(picture.stem, picture)
    return evaluation.figures


def probe_model(ranking: Ranking, inputs: StepInputs, tracker: Tracker) -> Probe:
    """Probe the model on held-out dialogs and safety pairs; logs the verdict and draws the plot."""
    system, longest = inputs.base.system, inputs.base.max_tokens

    def score(dialogs: Sequence[tuple[Message, ...]]) -> list[float | None]:
        encoded = [
            ranking.chat_format.encode_dialog(with_system(messages, system), train_on=TrainOn.LAST_ANSWER).input_ids
            for messages in dialogs
        ]
        short = [ids for ids in encoded if len(ids) <= longest]
        scores = iter(response_scores(ranking.model, short).tolist())
        return [next(scores) if len(ids) <= longest else None for ids in encoded]

    harmful = [example.preference for example in ranking.examples.test if example.domain == "safety"]
    result = probe(ranking.which, ranking.examples.dialogs, harmful, score)
    log.log(logging.INFO if result.is_fit else logging.WARNING, "rm/%s: %s", ranking.which, result.verdict)
    if result.rows:
        picture = draw_probe(result, inputs.folder.figures)
        tracker.figure(picture.stem, picture)
    return result


def score_tests(model: nn.Module, examples: Examples) -> tuple[list[ScoredPair], list[ScoredResponse]]:
    """Test pairs with scores, and each labelled test answer once, including those of labelled pairs."""
    chosen_B, rejected_B = pair_scores(model, examples.test)
    pairs: list[ScoredPair] = []
    responses: dict[tuple[int, ...], ScoredResponse] = {}
    for example, chosen, rejected in zip(examples.test, chosen_B.tolist(), rejected_B.tolist(), strict=True):
        assert example.domain in ("helpfulness", "safety"), "other sets are trained on, not tested with"
        preference = example.preference
        pairs.append(
            ScoredPair(
                domain=example.domain,
                source=example.source,
                prompt=first_user_turn(preference),
                chosen=chosen,
                rejected=rejected,
                chosen_tokens=example.chosen_tokens,
                rejected_tokens=example.rejected_tokens,
                rating=preference.rating,
                chosen_is_safe=preference.chosen_is_safe,
                rejected_is_safe=preference.rejected_is_safe,
            )
        )
        labels = (preference.chosen_is_safe, preference.rejected_is_safe)
        for ids, score, is_safe in zip((example.chosen, example.rejected), (chosen, rejected), labels, strict=True):
            if is_safe is not None:
                responses[ids] = ScoredResponse(
                    score=score, is_safe=is_safe, source=example.source, prompt=first_user_turn(preference)
                )
    scores_N = response_scores(model, [label.ids for label in examples.test_labels]).tolist()
    for label, score in zip(examples.test_labels, scores_N, strict=True):
        responses[label.ids] = ScoredResponse(
            score=score, is_safe=label.is_safe, source=label.source, prompt=label.prompt
        )
    return pairs, list(responses.values())


def num_safety_labels(config: Config, inputs: StepInputs, examples: Examples) -> int:
    """Number of safety labels trained on per epoch, of single answers and of pairs, with repetitions."""
    if inputs.which != "safety" or config.safety_auxiliary_weight == 0:
        return 0
    of_pairs = (
        is_safe
        for pair in examples.train
        for is_safe in (pair.preference.chosen_is_safe, pair.preference.rejected_is_safe)
    )
    return len(examples.labels) + sum(is_safe is not None for is_safe in of_pairs)


def publish_reward_model(
    start: RewardStart, inputs: StepInputs, *, dropped: Mapping[str, int], safety_labels: int, notes: Mapping[str, Any]
) -> Artifact:
    """Publish the step's model; raises if the trunk has changed or the tokenizer does not round-trip."""
    if start.frozen_digest is not None:
        assert reward_trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter is never written"
    details = policy_details(
        start.model,
        base=start.trunk,
        chat_format=inputs.base.chat_format,
        max_tokens=inputs.base.max_tokens,
        system=inputs.base.system,
    )
    return publish_model(
        inputs,
        "reward_model",
        partial(save_reward_model, start.model, weights=distributed.full_weights(start.model)),
        chat_format=start.chat_format,
        # Without safety labels sigmoid(score) is not a probability, and a threshold on it is meaningless.
        details=details | {"which": inputs.which, "safety_labels": safety_labels},
        notes=notes,
        read=sources_of(inputs),
        dropped=dropped,
    )
