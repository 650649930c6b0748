"""The inputs of a step's run, and the workload of its estimate."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sft
from context_distillation.config import Config as ContextDistillationConfig
from context_distillation.estimate import num_kept
from evaluation.report.estimate import Workload as ReportWorkload
from gatt.config import Config as GattConfig
from llamachat import distributed
from llamachat.config.gpus import Gpu
from llamachat.config.layers import merged
from llamachat.config.loading import from_plain
from llamachat.config.sections import DataSource, Split
from llamachat.memory.estimates import Estimate, Shape
from llamachat.memory.role_bytes import PROMPT_TOKENS, Lengths
from llamachat.memory.sampling_estimate import Workload as SamplingWorkload
from llamachat.runs.artifacts import MANIFEST, Artifact, read_artifact
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs, Tune
from pipelines.execution.resolve import Taken
from pipelines.planning.data_size import HUB_TOKENS, DataSize, measure_data
from pipelines.planning.measured import answer_tokens
from pipelines.planning.placing import place_roles
from pipelines.recipe.recipe import Recipe, Step, resolve_steps
from pipelines.recipe.stages import POLICY
from ppo.estimate import Workload as PpoWorkload
from rejection_sampling.config import Config as RejectionSamplingConfig
from rejection_sampling.estimate import num_winners
from reward.config import Config as RewardConfig
from reward.estimate import Workload as RewardWorkload
from sft.config import Config as SftConfig
from sft.estimate import Workload as SftWorkload

# Tokens of both sequences of a pair for each token of its record, where the prompt stands once: 1.3 to 1.6 for the bundled
# pairs (measured). Of a set that is not here both are assumed: the paper's Table 6 has 150 to 800 tokens an answer.
TOKENS_OF_A_PAIR = 1.4
TOKENS_OF_A_HUB_PAIR = 500.0


def stage_inputs(
    recipe: Recipe,
    step: Step,
    taken: Taken,
    *,
    folder: StepFolder,
    identity: dict[str, Any],
    fingerprint: str,
    deadline: float | None = None,
) -> StepInputs:
    """Everything that the step's stage may read besides its own section."""
    which: Any = step.product.makes.which  # one of the three reward models, or None: the stage's products say which
    inputs = StepInputs(
        step=step.name,
        folder=folder,
        identity=identity,
        fingerprint=fingerprint,
        run=recipe.run,
        base=recipe.base,
        tuning=step.tuning,
        data=recipe.data,
        tracking=recipe.tracking,
        rollout=step.rollout,
        scoring=recipe.scoring,
        deadline=deadline,
        policy=taken.policy,
        reward_models=taken.reward_models,
        which=which,
        sft_policy=taken.sft_policy,
        pooled=taken.pooled,
        surveyed=tuple(taken.surveyed.values()),
        recipe=recipe.model_dump(mode="json"),
    )
    return replace(inputs, tune=_tuner(recipe, inputs)) if step.stage.tunes else inputs


def _tuner(recipe: Recipe, inputs: StepInputs) -> Tune:
    """Supervised tuning on the dialogs that a step has made, in the step's folder."""

    def tune(
        dialogs: Artifact, *, over: Mapping[str, Any], from_base: bool = False, sft_share: float = 0.0
    ) -> Artifact:
        tuned, deadline = inputs.folder.tuned, inputs.deadline
        if (tuned / MANIFEST).is_file():
            return read_artifact(tuned, "policy", reader=inputs.step)
        if deadline is not None and distributed.broadcast_object(time.monotonic() > deadline):
            deadline = None  # what was sampled when the command's hours were over is learnt, not one step of it
        policy = None if from_base else inputs.policy
        of_dialogs = replace(inputs, deadline=deadline, policy=policy, dialogs=dialogs, sft_share=sft_share)
        return sft.run(_tuning_section(recipe, over), of_dialogs)

    return tune


def _tuning_section(recipe: Recipe, over: Mapping[str, Any]) -> SftConfig:
    """The section sft with the values that a step's own section puts over it."""
    return from_plain(SftConfig, merged(recipe.sft.model_dump(mode="json"), over))


def stage_estimate(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> Estimate:
    """What the stage says that the step costs, with a base of this shape on this card (None: two CPU cores)."""
    return step.stage.package.estimate(step.config, _WORKLOADS[step.stage.command](recipe, step, shape, gpu))


def _sft_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> SftWorkload:
    size = measure_data(recipe.data.sft)
    return SftWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        dialogs=round(size.records * train_share(recipe.data.split)) if size else None,
        tokens_per_dialog=min(size.tokens_per_record, recipe.base.max_tokens) if size else 0.0,
        gpu=gpu,
    )


def _reward_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> RewardWorkload:
    assert isinstance(step.config, RewardConfig)
    pairs, tokens = _reward_mix(recipe, step.config, step.product.makes.which) or (None, 0.0)
    return RewardWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        pairs=None if pairs is None else round(pairs),
        tokens_per_pair=tokens / pairs if pairs else 0.0,
        gpu=gpu,
    )


def _all_prompts(recipe: Recipe) -> DataSize | None:
    """Those of `data.prompts` and `data.adversarial`; without any, those that dialogs and pairs begin with."""
    data = recipe.data
    return _prompts_of(recipe, (*data.prompts, *data.adversarial), (*data.sft, *data.helpfulness, *data.safety))


def _prompts_of(recipe: Recipe, *keys: tuple[DataSource, ...]) -> DataSize | None:
    """The prompts that a sampling step asks: of the first keys that have any."""
    for key in keys:
        found = _measured((key,), hub_tokens=HUB_TOKENS)
        if found is None or found.records:
            return found
    return DataSize(0.0, 0.0)


def _lengths(recipe: Recipe, step: Step, prompts: DataSize | None) -> Lengths:
    """Of prompts as the files have them, and of answers as an earlier policy gave them."""
    prompt = prompts.tokens_per_record if prompts and prompts.records else PROMPT_TOKENS
    answer, whose = answer_tokens(recipe, step) or (None, "")
    return Lengths(prompt, answer, whose)


def _rs_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> SamplingWorkload:
    assert isinstance(step.config, RejectionSamplingConfig)
    prompts = _all_prompts(recipe)
    asked = _on_train_side(recipe, prompts)
    lengths = _lengths(recipe, step, prompts)
    learnt = num_winners(step.config, asked)
    return _sampling_workload(recipe, step, shape, gpu, asked=asked, learnt=learnt, lengths=lengths)


def _distill_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> SamplingWorkload:
    assert isinstance(step.config, ContextDistillationConfig)
    # What is marked is_safety among other prompts is not counted: nobody knows without reading them all.
    data = recipe.data
    prompts = _prompts_of(recipe, data.adversarial, data.prompts or data.safety)
    asked = _on_train_side(recipe, prompts)
    lengths = _lengths(recipe, step, prompts)
    learnt = num_kept(step.config, asked)
    return _sampling_workload(recipe, step, shape, gpu, asked=asked, learnt=learnt, lengths=lengths)


def _on_train_side(recipe: Recipe, records: DataSize | None) -> int | None:
    return None if records is None else round(records.records * train_share(recipe.data.split))


def _sampling_workload(
    recipe: Recipe,
    step: Step,
    shape: Shape,
    gpu: Gpu | None,
    *,
    asked: int | None,
    learnt: int | None,
    lengths: Lengths,
) -> SamplingWorkload:
    """Of a step that samples answers to so many prompts and tunes on so many dialogs."""
    placing = place_roles(recipe, step, shape)
    prompt, answer = lengths.of(recipe.base, step.rollout)
    dialogs = SftWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        dialogs=learnt,
        tokens_per_dialog=prompt + answer,
        gpu=gpu,
    )
    own: Any = step.config  # has values over the section sft, as all sections of steps that tune
    return SamplingWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        rollout=step.rollout,
        prompts=asked,
        tuned=sft.estimate(_tuning_section(recipe, own.sft), dialogs),
        sharing=placing.sharing,
        beside=placing.beside,
        gpu=gpu,
        lengths=lengths,
    )


def _gatt_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> SamplingWorkload:
    assert isinstance(step.config, GattConfig)
    lengths, dialogs = _lengths(recipe, step, None), step.config.dialogs
    work = _sampling_workload(recipe, step, shape, gpu, asked=None, learnt=dialogs, lengths=lengths)
    return work if step.config.ranks_by_reward else replace(work, sharing=0, beside={})


def _ppo_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> PpoWorkload:
    placing = place_roles(recipe, step, shape)
    return PpoWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        rollout=step.rollout,
        is_continued=placing.is_continued,
        sharing=placing.sharing,
        beside=placing.beside,
        gpu=gpu,
        lengths=_lengths(recipe, step, _all_prompts(recipe)),
    )


def _eval_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> SamplingWorkload:
    placing = place_roles(recipe, step, shape)
    return SamplingWorkload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        rollout=step.rollout,
        prompts=sum(other.product.makes == POLICY for other in resolve_steps(recipe)),  # each policy is asked them all
        tuned=Estimate(),
        sharing=placing.sharing,
        beside=placing.beside,
        gpu=gpu,
        lengths=_lengths(recipe, step, _all_prompts(recipe)),
    )


def _report_workload(recipe: Recipe, step: Step, shape: Shape, gpu: Gpu | None) -> ReportWorkload:
    return ReportWorkload(steps=len(resolve_steps(recipe)) - 1)


def _reward_mix(recipe: Recipe, config: RewardConfig, which: str | None) -> tuple[float, float] | None:
    """Pairs of the model's mix, and tokens of all that it learns from; None where some of it is not counted."""
    data, kept = recipe.data, train_share(recipe.data.split)
    if which == "judge":
        own, others, share, kept = (data.helpfulness, data.safety, data.open), (), 0.0, data.split.judge
    elif which == "helpfulness":
        own, others, share = (data.helpfulness,), (data.safety, data.open), config.other_share
    else:
        own, others, share = (data.safety,), (data.helpfulness, data.open), config.helpfulness_share
    in_record = TOKENS_OF_A_HUB_PAIR / TOKENS_OF_A_PAIR
    measured = [_measured(sources, hub_tokens=in_record) for sources in (own, others)]
    labels = _measured((data.labels,), hub_tokens=HUB_TOKENS) if which == "safety" else DataSize(0.0, 0.0)
    if measured[0] is None or measured[1] is None or labels is None:
        return None
    of_own = measured[0].records * kept
    of_others = min(measured[1].records * kept, of_own * share / (1 - share))
    longest = 2 * recipe.base.max_tokens
    tokens = of_own * min(longest, TOKENS_OF_A_PAIR * measured[0].tokens_per_record)
    tokens += of_others * min(longest, TOKENS_OF_A_PAIR * measured[1].tokens_per_record)
    return of_own + of_others, tokens + labels.records * kept * min(longest / 2, labels.tokens_per_record)


def _measured(parts: tuple[tuple[DataSource, ...], ...], *, hub_tokens: float) -> DataSize | None:
    """The size of several keys of `data`; no records where none of them has a source."""
    sources = [source for part in parts for source in part]
    return measure_data(sources, hub_tokens=hub_tokens) if sources else DataSize(0.0, 0.0)


def train_share(split: Split) -> float:
    """The share of the conversations that is trained on."""
    return 1.0 - split.test - split.validation - split.judge


_WORKLOADS: Mapping[str, Callable[[Recipe, Step, Shape, Gpu | None], Any]] = {
    "sft": _sft_workload,
    "rm": _reward_workload,
    "rs": _rs_workload,
    "gatt": _gatt_workload,
    "distill": _distill_workload,
    "ppo": _ppo_workload,
    "eval": _eval_workload,
    "report": _report_workload,
}
