"""Safety context distillation (Llama 2, arXiv:2307.09288, section 4.2.4): adversarial prompts, a policy and a safety
model -> dialogs of safer answers -> a policy tuned on them.

Each prompt is answered with and without safety preprompts. If the safety model, which does not see the preprompt,
scores the preprompted answer higher, the policy is trained on it, without the preprompt. Writes the step folder's
sampling/, metrics.jsonl, samples.jsonl, dialogs/, figures/, summary.json and, through the tuning, artifact/. A killed
step resumes after its last complete batch. If `max_hours` ends sampling early, the answers sampled so far are used;
batches are interchangeable.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from zlib import crc32

from context_distillation.choosing import (
    Choice,
    Groups,
    batch_figures,
    choose,
    draw_scores,
    left_out,
    score_lists,
    step_figures,
)
from context_distillation.config import Config
from context_distillation.prompts import FORMS, AdversarialPrompt, Form, adversarial_prompts, check_preprompts
from context_distillation.refusals import MOMENTS, refusal_figures, refusal_table
from llamachat.answers.dialog_step import (
    BatchResult,
    DialogStep,
    batch_costs,
    check_choice,
    counted,
    dialog_line,
    step_costs,
)
from llamachat.answers.evaluation import comparison_table
from llamachat.answers.groups import Group, batches_of, scored_groups
from llamachat.answers.session import AnswerSession, open_session
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import ConfigError, DataError
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.models import named_models
from llamachat.scoring.standardising import Constants
from llamachat.tracking.tracker import Tracker

log = logging.getLogger(__name__)

_SHOWN = 4  # prompts per batch whose plain and best distilled answers are logged

# Maximum answers to a prompt, in units of samples_per_prompt: two preprompted forms and as many plain answers.
_MOST_WAYS = len(FORMS) + 1


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample, choose and publish the dialogs; tune on them; compare; finish the step."""
    step = dialog_step(config, inputs)
    return step.run(
        make_dialogs=lambda: make_dialogs(config, step),
        compare=lambda tuned: compare(config, step, tuned),
        sft=config.sft,
        sft_share=config.sft_share,
    )


def dialog_step(config: Config, inputs: StepInputs) -> DialogStep:
    return DialogStep(inputs, section="context_distillation", prefix="distill", max_hours=config.max_hours)


def make_dialogs(config: Config, step: DialogStep) -> Artifact:
    """Sample, choose and publish the dialogs; cached answers are not sampled again."""
    inputs = step.inputs
    check_settings(config, inputs)
    session = _open(config, inputs, inputs.policy)
    check_preprompts(config, session.chat_format)
    _, constants = step.first_evaluation(session)
    _answer_borderline("start", config, step, session)
    with step.record() as tracker:
        sampled = Distillation(config, step, session, constants)
        figures = sampled.sample(tracker)
        kept = [choice for choice in sampled.choices if choice.is_kept]
        if not kept:
            raise DataError(
                f"{inputs.step}: no distilled answer can be trained on ({counted(step.dropped)}). Raise "
                "context_distillation.samples_per_prompt or rollout.max_new_tokens, or write other preprompts."
            )
        log.info("kept %d of %d distilled answers; %s", len(kept), len(sampled.choices), counted(step.dropped))
        lists = score_lists(sampled.groups, sampled.choices)
        draw_scores(lists, sampled.choices, inputs.folder.figures / "safety_scores.png")
        step.end_sampling(tracker, figures)
    return step.publish(
        [_dialog_line(choice, inputs.step) for choice in kept],
        [_dialog_line(choice, inputs.step) for choice in sampled.held_out if choice.is_kept],
        details={"preprompts": list(config.preprompts)},
        dropped=session.prompts.dropped,
    )


def compare(config: Config, step: DialogStep, tuned: Artifact) -> dict[str, float]:
    """Compare the tuned with the previous policy on adversarial and borderline prompts; return figures, draw plots."""
    session = _open(config, step.inputs, tuned)
    start, final, figures = step.compare(session)
    borderline = {moment: _answer_borderline(moment, config, step, session) for moment in MOMENTS}
    figures |= refusal_figures(borderline, {"start": start.texts, "final": final.texts})
    log.info("adversarial prompts:\n%s\n%s", comparison_table("distill", figures), refusal_table(figures))
    if not borderline["start"]:
        log.info("data.borderline is empty, or borderline_prompts is 0: false refusals are not counted.")
    if figures["distill/test/difference/reward_safety"] <= 0:
        log.warning(
            "%s: the tuned policy's answers to adversarial test prompts are no safer than before. More samples_per_prompt,"
            " other preprompts or more epochs (context_distillation.sft) may help, or a better safety model.",
            step.inputs.step,
        )
    return figures


def check_settings(config: Config, inputs: StepInputs) -> None:
    """Raise without a safety model, and on sampling settings that leave nothing to choose from."""
    if "safety" not in named_models(inputs.scoring, inputs.reward_models):
        raise ConfigError(
            f"{inputs.step}: there is no safety reward model, which decides which distilled answers are trained on."
            " Train one (`make rm`, with data.safety), or name one: scoring.safety=FOLDER_OR_HUB_NAME."
        )
    check_choice(
        inputs,
        "context_distillation",
        temperature=config.temperature,
        samples=config.samples_per_prompt,
        otherwise="give a context_distillation.temperature",
    )


def _open(config: Config, inputs: StepInputs, policy: Artifact | None) -> AnswerSession:
    held_out = (config.validation_prompts, config.test_prompts)
    return open_session(inputs, policy=policy, held_out=held_out, only_safety=True)


def _answer_borderline(moment: str, config: Config, step: DialogStep, session: AnswerSession) -> list[str]:
    """The policy's answers to borderline prompts at this moment; the session must have the policy unless cached."""

    def make() -> list[str]:
        by_file = session.answer_borderline(config.borderline_prompts)
        return [response.text for of_file in by_file.values() for response in of_file]

    return step.cache.get_or_make(f"borderline-{moment}", make)


def _dialog_line(choice: Choice, step: str) -> str:
    """The published JSON line: the prompt without the preprompt, and the distilled answer."""
    origin = {
        "round": step,
        "id": choice.prompt.name,
        "is_safety": True,
        "way": choice.form,
        "score": round(choice.score, 6),
        "original_score": round(choice.original_score, 6),
    }
    return dialog_line(choice.prompt.messages, choice.text, origin)


@dataclass(slots=True)
class Distillation:
    """Samples answers to each prompt in all forms, batch by batch, and selects among them."""

    config: Config
    step: DialogStep
    session: AnswerSession
    constants: Constants
    groups: list[Groups] = field(default_factory=list)  # of the training prompts
    choices: list[Choice] = field(default_factory=list)  # theirs
    held_out: list[Choice] = field(default_factory=list)

    def sample(self, tracker: Tracker) -> dict[str, float]:
        """Sample all batches that are not cached; return the step's figures."""
        config, splits, count = self.config, self.session.prompts, self.config.samples_per_prompt * _MOST_WAYS
        drawn = splits.drawn(config.prompts, seed=self.step.inputs.run.seed)
        prompts = self._with_preprompts(drawn, self.step.dropped)
        validation = self._with_preprompts(splits.validation[: config.validation_prompts], Counter())
        log.info(
            "%d adversarial prompts, %d of them with a known category (and twice as many plain answers); %d answers per "
            "form at temperature %g",
            len(prompts),
            sum(prompt.category is not None for prompt in prompts),
            config.samples_per_prompt,
            self.session.sampling(0, temperature=config.temperature).temperature,
        )
        train = batches_of(prompts, count)
        rows = self.step.make_batches(
            tracker, train, batches_of(validation, count), make=self._make, read=self._read, unit="prompts"
        )
        for name, scores in score_lists(self.groups, self.choices).items():
            tracker.histogram(len(train), f"safety/{name}", scores)
        return step_figures(self.groups, self.choices) | step_costs(rows)

    def _with_preprompts(self, prompts: Sequence[EncodedPrompt], dropped: Counter[str]) -> list[AdversarialPrompt]:
        inputs = self.step.inputs
        # Reward models read the prompt without the preprompt.
        longest = inputs.base.max_tokens - inputs.rollout.max_new_tokens - 1
        return adversarial_prompts(prompts, self.config, self.session.chat_format, max_tokens=longest, dropped=dropped)

    def _make(self, number: int, batch: Sequence[AdversarialPrompt]) -> dict[str, Any]:
        started, tokens = time.monotonic(), 0
        by_prompt: list[Groups] = [{} for _ in batch]
        place = number * _MOST_WAYS
        for form in FORMS:
            by_count: dict[int, list[int]] = {}
            for index, prompt in enumerate(batch):
                count = prompt.num_answers(form, samples_per_prompt=self.config.samples_per_prompt)
                by_count.setdefault(count, []).append(index)
            by_count.pop(0, None)
            for count, indices in sorted(by_count.items()):
                groups = self._answers([batch[index] for index in indices], form, count, place)
                for index, group in zip(indices, groups, strict=True):
                    by_prompt[index][form] = group
                tokens += sum(sum(group.tokens) for group in groups)
                place += 1
        costs = batch_costs(started, tokens)
        stored = [{form: asdict(group) for form, group in groups.items()} for groups in by_prompt]
        return {"groups": stored, "figures": costs}

    def _answers(self, batch: Sequence[AdversarialPrompt], form: Form, count: int, number: int) -> list[Group]:
        """Sample and score `count` answers to each prompt in this form; scores ignore the preprompt."""
        encoded = [prompt for one in batch if (prompt := one.form(form)) is not None]
        # Steps of one recipe answer the same prompts in the same order, with different seeds.
        seed = crc32(self.step.inputs.step.encode()) + number
        sampling = self.session.sampling(seed, temperature=self.config.temperature)
        responses = self.session.sample(encoded, sampling, samples_per_prompt=count)
        by_prompt = [
            [replace(response, prompt=one.original) for response in responses[place * count : (place + 1) * count]]
            for place, one in enumerate(batch)
        ]
        return scored_groups(self.session, by_prompt, self.constants)

    def _read(self, batch: Sequence[AdversarialPrompt], values: Mapping[str, Any], is_held_out: bool) -> BatchResult:
        groups: list[Groups] = [
            {form: Group(**group) for form, group in by_form.items()} for by_form in values["groups"]
        ]
        keeps_all, margin = self.config.keep == "all", self.config.margin
        choices = [
            choose(prompt.original, group, keeps_all=keeps_all, margin=margin)
            for prompt, group in zip(batch, groups, strict=True)
        ]
        headline = f"kept {sum(choice.is_kept for choice in choices)} of {len(choices)}"
        if is_held_out:
            self.held_out += choices
            return BatchResult({}, [], headline)
        self.groups += groups
        self.choices += choices
        self.step.dropped.update(left_out(choices))
        return BatchResult(values["figures"] | batch_figures(groups, choices), _shown(choices), headline)


def _shown(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Plain and best distilled answers to some prompts, to be logged as samples."""
    return [
        {
            "prompt": choice.prompt.messages[-1].content,
            "original": choice.original,
            "distilled": choice.text,
            "way": choice.form,
            "safety_original": round(choice.original_score, 4),
            "safety_distilled": round(choice.score, 4),
            "refused": choice.refused or "",
        }
        for choice in choices[:_SHOWN]
    ]
