"""Safety context distillation (Llama 2, arXiv:2307.09288, section 4.2.4): adversarial prompts, a policy and a safety model
-> dialogs of safer answers -> a policy tuned on them.

Each prompt is answered plainly and under safety preprompts; where the safety model puts the preprompted answer above the
plain one, as an answer to the prompt alone, it is learnt, and the preprompt is not. Writes the step folder's sampling/,
metrics.jsonl, samples.jsonl, dialogs/, figures/, summary.json and, through the tuning, artifact/. Killed at any moment,
the same call goes on: each batch of answers is written down whole before the next is sampled. Where `max_hours` ends the
sampling, what was sampled by then is learnt: no batch is better than another.
"""

import logging

from transformers.utils import logging as transformers_logging

from context_distillation.asking import check_preprompts
from context_distillation.choosing import Choice, score_lists
from context_distillation.config import Config
from context_distillation.false_refusals import MOMENTS, answer_borderline, refusal_figures, refusal_table
from context_distillation.figures import draw_scores
from context_distillation.sampling import Distilling
from llamachat.answers import making
from llamachat.answers.desk import Desk, open_desk
from llamachat.answers.evaluation import comparison, comparison_table
from llamachat.answers.pictures import draw_comparison
from llamachat.answers.store import Store
from llamachat.errors import ConfigError, DataError
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.models import named_models
from llamachat.tracking.curves import draw_curves
from llamachat.training.hours import open_hours

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample, choose and publish the dialogs; tune on them; compare; end the step."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    return making.run_parts(
        inputs,
        make=lambda: make_dialogs(config, inputs),
        over=config.sft,
        sft_share=config.sft_share,
        compare=lambda tuned: compare(config, inputs, tuned),
    )


def make_dialogs(config: Config, inputs: StepInputs) -> Artifact:
    """Everything up to the published dialogs; what was sampled before is not sampled again."""
    check_settings(config, inputs)
    folder = inputs.folder
    store = Store(folder.sampling)
    hours = open_hours(inputs.step, "context_distillation", config.max_hours, inputs.deadline, store.folder)
    desk = _open(config, inputs, inputs.policy)
    check_preprompts(config, desk.bank.chat_format)
    _, constants = making.first_evaluation(desk, store)
    answer_borderline("start", config, inputs, desk, store)
    with making.record(inputs, "distill", keeps_record=False) as tracker:
        distilling = Distilling(config, inputs, desk, constants, store, hours)
        figures = distilling.go(tracker)
        kept = [choice for choice in distilling.choices if choice.is_kept]
        left_out = making.counted(distilling.dropped)
        if not kept:
            raise DataError(
                f"{inputs.step}: no distilled answer can be learnt from ({left_out}). Raise "
                "context_distillation.samples_per_prompt or rollout.max_new_tokens, or write other preprompts."
            )
        log.info("%d of %d distilled answers are kept; %s", len(kept), len(distilling.choices), left_out)
        lists = score_lists(distilling.groups, distilling.choices)
        draw_scores(lists, distilling.choices, folder.figures / "safety_scores.png")
        tracker.sync()
        # Before the dialogs, which end this part: a command killed between the two would never come back to write it.
        tracker.summary(figures)
    return making.publish_dialogs(
        inputs,
        [_dialog_line(choice, inputs.step) for choice in kept],
        [_dialog_line(choice, inputs.step) for choice in distilling.held_out if choice.is_kept],
        dropped=dict(distilling.dropped) | desk.prompts.dropped,
        details={"dialogs": len(kept), "preprompts": list(config.preprompts)} | hours.details,
    )


def compare(config: Config, inputs: StepInputs, tuned: Artifact) -> None:
    """Final figures: the tuned policy against the one before on adversarial and borderline prompts, and the pictures."""
    folder = inputs.folder
    store = Store(folder.sampling)
    desk = _open(config, inputs, tuned)
    start, final = making.both_evaluations(desk, store)
    answer_borderline("final", config, inputs, desk, store)
    figures = comparison("distill", start, final)
    borderline = {moment: store.kept(f"borderline-{moment}", list) for moment in MOMENTS}
    figures |= refusal_figures(borderline, {"start": start.texts, "final": final.texts})
    log.info("adversarial prompts alone:\n%s\n%s", comparison_table("distill", figures), refusal_table(figures))
    if not borderline["start"]:
        log.info("data.borderline is empty, or borderline_prompts is 0: false refusals are not counted.")
    if figures["distill/test/difference/reward_safety"] <= 0:
        log.warning(
            "%s: the tuned policy's answers to adversarial test prompts are no safer than before. More samples_per_prompt,"
            " other preprompts or more epochs (context_distillation.sft) may help, or a better safety model.",
            inputs.step,
        )
    draw_curves(folder.metrics, folder.curves)
    draw_comparison(start, final, folder.figures / "test_scores.png")
    with making.record(inputs, "distill", keeps_record=True) as tracker:
        making.show_figures(tracker, folder)
        tracker.summary(figures)


def check_settings(config: Config, inputs: StepInputs) -> None:
    """Refuse a step without the model that decides, and sampling that leaves nothing to choose from."""
    if "safety" not in named_models(inputs.scoring, inputs.reward_models):
        raise ConfigError(
            f"{inputs.step}: there is no safety reward model, and it alone says which distilled answers are learnt. Train"
            " one (`make rm`, with data.safety), or name one: scoring.safety=FOLDER_OR_HUB_NAME."
        )
    is_greedy = config.temperature is None and inputs.rollout.temperature == 0
    if is_greedy and config.samples_per_prompt > 1:
        raise ConfigError(
            f"rollout.temperature: 0, but context_distillation.samples_per_prompt is {config.samples_per_prompt}. At "
            "temperature 0 all answers to a prompt are the same one, and there is nothing to choose. Set it to 1, or give "
            "a context_distillation.temperature."
        )


def _open(config: Config, inputs: StepInputs, policy: Artifact | None) -> Desk:
    held_out = (config.validation_prompts, config.test_prompts)
    return open_desk(
        making.setting_of(inputs),
        policy=policy,
        reward_models=inputs.reward_models,
        held_out=held_out,
        only_safety=True,
    )


def _dialog_line(choice: Choice, step: str) -> str:
    """The prompt as it came, without the preprompt, and the distilled answer."""
    origin = {
        "round": step,
        "id": choice.prompt.name,
        "is_safety": True,
        "way": choice.way,
        "score": round(choice.score, 6),
        "original_score": round(choice.original_score, 6),
    }
    return making.dialog_line(choice.prompt.messages, choice.text, origin)
