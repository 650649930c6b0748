"""Estimates what a step of a recipe would cost, from the recipe, its data files and finished steps: one function per
stage.

Takes about a second: up to 64 MiB of each data file are read, the rest is extrapolated, and no weights are read.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from context_distillation import Config as ContextDistillationConfig
from dpo import Config as DpoConfig
from evaluation import Config as EvaluationConfig
from gatt import Config as GattConfig
from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.config.section import from_home
from llamachat.config.sections import DataSource
from llamachat.data.files import bounded_lines
from llamachat.errors import ArtifactError, LlamachatError
from llamachat.memory.estimates import BYTES, Estimate, Setup, Shape, shape_of
from llamachat.memory.role_bytes import PROMPT_TOKENS, Beside, Lengths, Seating, place_reward_models
from llamachat.pipes import regular_file
from llamachat.runs.artifacts import StepFolder, read_artifact
from llamachat.runs.reader import read_summary
from llamachat.scoring.models import MODELS, ModelName, RewardModelFacts, models_read
from llamachat.tables import duration
from pipelines.execution.run import tuning_section
from pipelines.planning.stage_costs import dpo_cost, ppo_cost, report_cost, reward_cost, sampling_cost, sft_cost
from pipelines.recipe.recipe import Recipe, Step
from pipelines.recipe.stages import POLICY
from ppo import Config as PpoConfig
from rejection_sampling import Config as RejectionSamplingConfig
from reward import Config as RewardConfig
from reward.config import HARMFUL_SHARES, MOST_HELD_OUT, MOST_PROBED
from sft import Config as SftConfig

LLAMA_2_PIECES = 32_000
HUB_TOKENS = 200.0  # per dialog of a set that is not local; ours, assumed
GROUPS = 50  # groups of similar length into which a file's records are divided
MOST_BYTES = 1 << 26  # read from one file; the rest is assumed to be similar
# Tokens in a batch per token of a pair's record, in which the prompt occurs once, and per token of the dialog of a
# contrast pair. A CPU computes the prompt of a pair, and the dialog of all its contrast pairs, once. Fitted to what the
# three reward models of the two bundled recipes read (within 7%). For a set that is not local the tokens of a pair are
# assumed: the paper's Table 6 has 150 to 800 tokens per answer.
TOKENS_OF_A_PAIR, TOKENS_OF_A_PAIR_ON_A_CPU = 1.55, 1.15
TOKENS_OF_A_CONTRAST_PAIR, TOKENS_OF_A_CONTRAST_PAIR_ON_A_CPU = 0.82, 0.28
TOKENS_OF_A_HUB_PAIR = 500.0
# Tokens of held-out and test pairs that are scored, per token of the same number of training pairs: an answer in
# several pairs is scored once (0.6 to 0.85, measured with two recipes).
HELD_OUT_TOKENS = 0.67
# Tokens of the probe per token of the dialogs that it is made from (15.6 to 21.3; on a CPU 3.9 to 5.7; measured).
TOKENS_OF_A_PROBE, TOKENS_OF_A_PROBE_ON_A_CPU = 18.0, 5.0
PROMPT_TOKENS_A_TOKEN = 1.25  # a prompt without its answer has a larger share of the chat format's tokens (measured)
TURN_TOKENS = 100.0  # in the turns before an answer in Ghost Attention; ours, assumed
# Bytes of a CPU process beyond its tensors: Python, the libraries, compiled kernels, and freed blocks that malloc
# keeps. The activations compensate for them, since they are computed for the longest row: partly in PPO. For a reward
# model, whose blocks vary in size, a share is added. Ours, measured on the bundled model and on SmolLM2-135M.
GIB_OF_A_PROCESS = {"sft": 1.65, "rm": 2.5, "gatt": 2.05, "distill": 2.05, "eval": 2.35}
GIB_OF_ANOTHER_PROCESS = 1.75
# dpo is assumed to equal ppo; not measured.
COVERED_BY_ACTIVATIONS = {"rm": -0.12, "gatt": 0.85, "distill": 0.85, "ppo": 0.4, "dpo": 0.4}
KEPT_BY_DISTILLATION = (
    0.5  # share of the distilled answers; ours, assumed: a new answer is better about half of the time
)


# -- the entry points


def estimate_step(recipe: Recipe, step: Step, gpu: Gpu | None = None) -> Estimate | None:
    """What the step would cost, on this card instead of the recipe's; None if the shape of the base is not known."""
    try:
        shape = shape_of(recipe.base.model)
        if shape is None:
            return None
        setup = Setup(shape, recipe.base, step.tuning, gpu or card(recipe))
        estimate = _COSTS[step.stage.command](_Work(recipe, step, setup), step.config)
    except (KeyError, ValueError):
        return None  # another architecture, invalid JSON or invalid targets: reported where it is loaded
    if setup.gpu is None:
        estimate = _in_a_process(estimate, step.stage.command)
    # The step's own hours bound all of its work, but only the sampling of rs and similar steps.
    hours = step.config.model_dump().get("max_hours")
    if hours is None or step.stage.tunes or estimate.seconds <= 3600 * hours:
        return estimate
    assumed = f"within {step.stage.section}.max_hours; otherwise {duration(estimate.seconds)} {estimate.assumed}"
    return replace(estimate, seconds=3600 * hours, assumed=assumed)


def _in_a_process(estimate: Estimate, command: str) -> Estimate:
    """The estimate of a step on a CPU, including its process's memory beyond tensors."""
    if not estimate.memory:
        return estimate
    activations = estimate.memory.get("activations", 0)
    covered = round(COVERED_BY_ACTIVATIONS.get(command, 1.0) * activations)
    own = max(0, round(GIB_OF_A_PROCESS.get(command, GIB_OF_ANOTHER_PROCESS) * 2**30) - covered)
    return replace(estimate, memory=estimate.memory | {"the process besides tensors": own})


def card(recipe: Recipe) -> Gpu | None:
    """The card that the recipe is meant for."""
    return parse_gpu(recipe.run.gpu) if recipe.run.gpu else None


# -- the stages


@dataclass(frozen=True, slots=True)
class _Work:
    """One step of a recipe, with the inputs of its estimate."""

    recipe: Recipe
    step: Step
    setup: Setup

    @property
    def train_share(self) -> float:
        """The share of the conversations in the training split."""
        split = self.recipe.data.split
        return 1.0 - split.test - split.validation - split.judge

    def lengths(self, prompts: "DataSize | None") -> Lengths:
        """Lengths of prompts, from the files, and of answers, as measured by an earlier policy."""
        prompt = prompts.tokens_per_record if prompts and prompts.records else PROMPT_TOKENS
        answer, whose = answer_tokens(self.recipe, self.step) or (None, "")
        return Lengths(prompt, answer, whose)

    def all_prompts(self) -> "DataSize | None":
        """The prompts of `data.prompts` and `data.adversarial`; without any, those of dialogs and pairs."""
        data = self.recipe.data
        return self.prompts((*data.prompts, *data.adversarial), (*data.sft, *data.helpfulness, *data.safety))

    def measured(self, sources: Sequence[DataSource], **more: Any) -> "DataSize | None":
        """The size of the sources in tokens of the base's tokenizer."""
        return measure_data(sources, vocabulary=self.setup.shape.vocabulary, **more)

    def prompts(self, *keys: Sequence[DataSource]) -> "DataSize | None":
        """The prompts of the first key that has any."""
        for sources in keys:
            size = self.measured(sources, prompts_only=True)
            if size is None or size.records:
                return size
        return DataSize(0.0, 0.0)

    def tuned(self, lengths: Lengths, dialogs: int | None) -> Estimate:
        """Cost of supervised tuning on this many dialogs, each a prompt and an answer, within a step that samples."""
        own: Any = self.step.config  # overrides the section sft, in every step that tunes
        tokens = sum(lengths.of(self.recipe.base, self.step.rollout))
        return sft_cost(tuning_section(self.recipe, own.sft), self.setup, dialogs=dialogs, tokens_per_dialog=tokens)

    def sampled(self, lengths: Lengths, *, answers: int | None, **more: Any) -> Estimate:
        """Cost of sampling this many answers and scoring them."""
        seating = seat_roles(self.recipe, self.step, self.setup.shape)
        return sampling_cost(self.setup, self.step.rollout, seating, lengths, answers=answers, **more)


def _sft(work: _Work, config: SftConfig) -> Estimate:
    size = work.measured(work.recipe.data.sft)
    return sft_cost(
        config,
        work.setup,
        dialogs=round(size.records * work.train_share) if size else None,
        tokens_per_dialog=min(size.tokens_per_record, work.recipe.base.max_tokens) if size else 0.0,
    )


def _reward(work: _Work, config: RewardConfig) -> Estimate:
    split = work.recipe.data.split
    split_share = split.judge if work.step.product.makes.which == "judge" else work.train_share
    pairs, tokens = _reward_mix(work, config, split_share) or (None, 0.0)
    _, held_out_tokens = _reward_mix(work, config, split.validation, is_held_out=True) or (0, 0.0)
    return reward_cost(
        config,
        work.setup,
        pairs=None if pairs is None else round(pairs),
        tokens_per_pair=tokens / pairs if pairs else 0.0,
        held_out_tokens=HELD_OUT_TOKENS * held_out_tokens,
        tested_tokens=_tested_tokens(work),
        eval_every=work.recipe.sections.tracking.eval_every,
    )


def _reward_mix(
    work: _Work, config: RewardConfig, split_share: float, *, is_held_out: bool = False
) -> tuple[float, float] | None:
    """The number of pairs in the model's mix for this share of the data, and the tokens of all that it reads; with
    `is_held_out`, of its own pairs and the held-out contrast pairs. None if the size of a source is unknown."""
    data, which = work.recipe.data, work.step.product.makes.which
    if which == "judge":
        own, others, share = (*data.helpfulness, *data.safety, *data.open), (), 0.0
    elif which == "helpfulness":
        own, others, share = data.helpfulness, (*data.safety, *data.open), config.other_share
    else:
        own, others, share = data.safety, (*data.helpfulness, *data.open), config.helpfulness_share
    in_record = TOKENS_OF_A_HUB_PAIR / TOKENS_OF_A_PAIR
    ours, pool = (work.measured(sources, hub_tokens=in_record) for sources in (own, others))
    labels = work.measured(data.labels if which == "safety" else ())
    dialogs = work.measured(data.sft)
    if ours is None or pool is None or labels is None or dialogs is None:
        return None
    longest = min(work.recipe.base.max_tokens, config.max_tokens or work.recipe.base.max_tokens)
    longest_contrast = min(longest, config.contrast.max_tokens or longest)
    on_cpu = work.setup.gpu is None
    in_pair = TOKENS_OF_A_PAIR_ON_A_CPU if on_cpu else TOKENS_OF_A_PAIR
    in_contrast_pair = TOKENS_OF_A_CONTRAST_PAIR_ON_A_CPU if on_cpu else TOKENS_OF_A_CONTRAST_PAIR
    own_kept, others_kept = ours.up_to(longest), pool.up_to(longest)
    of_own = own_kept.records * split_share
    of_others = 0.0 if is_held_out else min(others_kept.records * split_share, of_own * share / (1 - share))
    contrast = (of_own + of_others) * config.contrast.share / (1 - config.contrast.share) if dialogs.records else 0.0
    contrast = min(contrast, MOST_HELD_OUT) if is_held_out else contrast
    # Pairs that prefer a refusal of a harmful prompt are as long as the model's own pairs, up to the limit.
    of_harmful = contrast * HARMFUL_SHARES.get(which or "", 0.0)
    tokens = in_pair * (of_own * own_kept.tokens_per_record + of_others * others_kept.tokens_per_record)
    tokens += in_pair * of_harmful * ours.up_to(longest_contrast).tokens_per_record
    tokens += in_contrast_pair * (contrast - of_harmful) * dialogs.up_to(longest_contrast).tokens_per_record
    if not is_held_out:
        labels = labels.up_to(longest)
        tokens += labels.records * split_share * labels.tokens_per_record
    return of_own + of_others + contrast, tokens


def _tested_tokens(work: _Work) -> float:
    """Tokens of test pairs and of the probe that are scored."""
    data, on_cpu = work.recipe.data, work.setup.gpu is None
    in_record = TOKENS_OF_A_HUB_PAIR / TOKENS_OF_A_PAIR
    in_pair = HELD_OUT_TOKENS * (TOKENS_OF_A_PAIR_ON_A_CPU if on_cpu else TOKENS_OF_A_PAIR)
    pairs, dialogs = work.measured((*data.helpfulness, *data.safety), hub_tokens=in_record), work.measured(data.sft)
    tokens = data.split.test * pairs.records * in_pair * pairs.tokens_per_record if pairs else 0.0
    if dialogs:
        in_dialog = TOKENS_OF_A_PROBE_ON_A_CPU if on_cpu else TOKENS_OF_A_PROBE
        tokens += min(MOST_PROBED, data.split.validation * dialogs.records) * in_dialog * dialogs.tokens_per_record
    return tokens


def _rejection_sampling(work: _Work, config: RejectionSamplingConfig) -> Estimate:
    prompts = work.all_prompts()
    # If each prompt has a winner; those of earlier rounds are added.
    winners = _num_prompts(config.prompts, prompts, work.train_share)
    answers = None
    if winners is not None:
        answers = (winners + config.validation_prompts) * config.samples_per_prompt + 2 * config.test_prompts
        answers += len(config.sweep_temperatures) * config.sweep_prompts * config.sweep_samples
    lengths = work.lengths(prompts)
    tuned = work.tuned(lengths, winners)
    return work.sampled(lengths, answers=answers, samples_per_prompt=config.samples_per_prompt, tuned=tuned)


def _gatt(work: _Work, config: GattConfig) -> Estimate:
    answers = round(config.dialogs * (2 + config.turns) / 2 * config.samples_per_turn)
    answers += 3 * config.evaluation_dialogs * max(config.evaluation_turns)
    lengths = work.lengths(None)
    turns = replace(lengths, prompt=min(lengths.prompt, TURN_TOKENS))
    return work.sampled(turns, answers=answers, tuned=work.tuned(lengths, config.dialogs))


def _distillation(work: _Work, config: ContextDistillationConfig) -> Estimate:
    data = work.recipe.data
    # Prompts with is_safety among the others are not counted: that would need reading all of them.
    prompts = work.prompts(data.adversarial, data.prompts or data.safety)
    num_prompts = _num_prompts(config.prompts, prompts, work.train_share)
    answers = dialogs = None
    if num_prompts is not None:
        dialogs = round(num_prompts * (KEPT_BY_DISTILLATION if config.keep == "better" else 1.0))
        # As many plain answers as answers with a preprompt, and templates for all prompts at most.
        ways = 4 if config.uses_categories and config.categories else 2
        answers = (num_prompts + config.validation_prompts) * config.samples_per_prompt * ways
        answers += 2 * (config.test_prompts + config.borderline_prompts * len(data.borderline))
    lengths = work.lengths(prompts)
    tuned = work.tuned(lengths, dialogs)
    return work.sampled(lengths, answers=answers, samples_per_prompt=config.samples_per_prompt, tuned=tuned)


def _dpo(work: _Work, config: DpoConfig) -> Estimate:
    data, in_record = work.recipe.data, TOKENS_OF_A_HUB_PAIR / TOKENS_OF_A_PAIR
    size = work.measured((*data.helpfulness, *data.safety), hub_tokens=in_record)
    in_pair = TOKENS_OF_A_PAIR_ON_A_CPU if work.setup.gpu is None else TOKENS_OF_A_PAIR
    return dpo_cost(
        config,
        work.setup,
        pairs=round(size.records * work.train_share) if size else None,
        held_out_pairs=size.records * data.split.validation if size else 0.0,
        tokens_per_pair=min(2 * work.recipe.base.max_tokens, in_pair * size.tokens_per_record) if size else 0.0,
        eval_every=work.recipe.sections.tracking.eval_every,
    )


def _ppo(work: _Work, config: PpoConfig) -> Estimate:
    seating = seat_roles(work.recipe, work.step, work.setup.shape)
    return ppo_cost(config, work.setup, work.step.rollout, seating, work.lengths(work.all_prompts()))


def _evaluation(work: _Work, config: EvaluationConfig) -> Estimate:
    policies = sum(other.product.makes == POLICY for other in work.recipe.steps) or 1  # each answers all prompts
    borderline = config.borderline_prompts * len(work.recipe.data.borderline)
    one = config.test_prompts + borderline + config.dialogs * max(config.turns)
    answers = policies * (one + config.curve_prompts * config.curve_samples)
    answers += 2 * len(config.temperatures) * config.curve_prompts * config.curve_samples
    answers += config.dialogs * max(config.turns)
    return work.sampled(work.lengths(work.all_prompts()), answers=answers)


_COSTS: Mapping[str, Callable[[_Work, Any], Estimate]] = {
    "sft": _sft,
    "rm": _reward,
    "rs": _rejection_sampling,
    "gatt": _gatt,
    "distill": _distillation,
    "dpo": _dpo,
    "ppo": _ppo,
    "eval": _evaluation,
    "report": lambda work, config: report_cost(config, steps=len(work.recipe.steps) - 1),
}


# -- the number of records, and their length


class LengthGroup(NamedTuple):
    """Records with dialogs of similar length."""

    records: float
    tokens: float  # per record
    dialog: float  # tokens of the longer dialog of a pair, and of any other record


@dataclass(frozen=True, slots=True)
class DataSize:
    """The number of records, with weights applied, and the tokens per record."""

    records: float
    tokens_per_record: float
    groups: tuple[LengthGroup, ...] = field(default=(), compare=False)

    def up_to(self, most: float) -> "DataSize":
        """The records whose dialogs have at most this many tokens."""
        return _joined(group for group in self.groups if group.dialog <= most)


def measure_data(
    sources: Sequence[DataSource],
    *,
    hub_tokens: float = HUB_TOKENS,
    vocabulary: int = LLAMA_2_PIECES,
    prompts_only: bool = False,
) -> DataSize | None:
    """The size of the sources; None if one of them is not local and has no `limit`.

    `hub_tokens` is the assumed length of a record of a set that is not local; `vocabulary` is the size of the
    tokenizer's vocabulary; with `prompts_only`, only the prompts of pairs and the questions of dialogs count, not the
    answers.
    """
    groups: list[LengthGroup] = []
    for source in sources:
        size = _measure(source, hub_tokens, bytes_per_token(vocabulary), prompts_only=prompts_only)
        if size is None:
            return None
        groups += [group._replace(records=group.records * source.weight) for group in size.groups]
    return _joined(groups)


def _joined(groups: Iterable[LengthGroup]) -> DataSize:
    groups = tuple(groups)
    records = math.fsum(group.records for group in groups)
    tokens = math.fsum(group.records * group.tokens for group in groups)
    return DataSize(records, tokens / records if records else 0.0, groups)


def _with_mean_length(records: float, mean: float) -> DataSize:
    """The size of records of which only the mean length is known. Ours: lengths are distributed exponentially, and the
    longer dialog is as long as the record."""
    lengths = [-math.log((part + 0.5) / GROUPS) for part in range(GROUPS)]
    scale = mean * GROUPS / math.fsum(lengths)
    groups = (LengthGroup(records / GROUPS, scale * length, scale * length) for length in lengths)
    return DataSize(records, mean, tuple(groups))


def bytes_per_token(vocabulary: int) -> float:
    """Bytes of JSON lines of English dialogs per token of the chat format.

    Measured on the bundled data with three vocabularies of 4,096, 32,000 (Llama 2's) and 49,152 tokens: 3.6, 4.6, 4.9.
    """
    return max(1.0, 3.6 + 0.5 * math.log(vocabulary / 4096))


def _num_prompts(most: int | None, prompts: DataSize | None, train_share: float) -> int | None:
    """The number of prompts used from the training split, given an upper limit; None if neither is known."""
    there = None if prompts is None else round(prompts.records * train_share)
    return min((count for count in (most, there) if count is not None), default=None)


def _measure(source: DataSource, hub_tokens: float, in_token: float, *, prompts_only: bool) -> DataSize | None:
    path = regular_file(Path(source.path))
    if not path.is_file():
        return _with_mean_length(source.limit, hub_tokens) if source.limit is not None and not path.exists() else None
    share = (PROMPT_TOKENS_A_TOKEN if prompts_only else 1.0) / in_token
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        groups = _measure_lines(path, path.stat().st_mtime_ns, source.limit, prompts_only=prompts_only)
        return _joined(LengthGroup(records, share * record, share * dialog) for records, record, dialog in groups)
    size = _measure_parquet(path, source.limit) if path.suffix == ".parquet" else None
    return size and _with_mean_length(size[0], share * size[1])


@lru_cache(maxsize=256)  # the search for settings that fit calls this again and again
def _measure_lines(path: Path, changed_ns: int, limit: int | None, *, prompts_only: bool) -> tuple[LengthGroup, ...]:
    """The records in groups, with bytes instead of tokens."""
    lengths, num_read, whole = list[tuple[int, int]](), 0, 0.0
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else path.open("rb") as stream:
        for line in bounded_lines(cast(IO[bytes], stream)):
            if len(lengths) == limit:
                break
            num_read += len(line)
            lengths.append(_num_bytes(line, prompts_only=prompts_only))
            if num_read >= MOST_BYTES:
                position = raw.tell() if path.suffix == ".gz" else num_read
                whole = len(lengths) * max(1.0, path.stat().st_size / position)
                break
    count = len(lengths)
    records = min(whole or count, limit or math.inf)
    lengths.sort(key=itemgetter(1))
    parts = (lengths[count * part // GROUPS : count * (part + 1) // GROUPS] for part in range(GROUPS))
    return tuple(
        LengthGroup(records * len(part) / count, *(sum(column) / len(part) for column in zip(*part, strict=True)))
        for part in parts
        if part
    )


def _num_bytes(line: bytes, *, prompts_only: bool) -> tuple[int, int]:
    """Bytes of a record, or of its prompt (a dialog without its last answer), and of its longer dialog."""
    if not prompts_only and b'"chosen"' not in line:
        return len(line), len(line)  # no pair: the line is the dialog
    try:
        match json.loads(line):
            case {"prompt": prompt} | {"messages": [*prompt, {"role": "assistant"}]} | {"messages": prompt} if (
                prompts_only
            ):
                return _in_json(prompt), _in_json(prompt)
            case {"prompt": prompt, "chosen": chosen, "rejected": rejected}:
                return len(line), _in_json(prompt) + max(_in_json(chosen), _in_json(rejected))
            case _:
                return len(line), len(line)
    except (ValueError, RecursionError):
        return len(line), len(line)  # reported where it is read


def _in_json(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def _measure_parquet(path: Path, limit: int | None) -> tuple[float, float] | None:
    """The number of records, and the mean bytes per record."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return None  # reported where it is read
    num_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    rows = metadata.num_rows
    return min(rows, limit) if limit else rows, num_bytes / max(1, rows)


def answer_tokens(recipe: Recipe, step: Step) -> tuple[float, str] | None:
    """Mean tokens per answer of the nearest earlier policy that has measured them, and that policy's name."""
    for maker in recipe.makers(step).get(POLICY, ()):
        keys = (f"{maker.stage.command}/test/final/response_tokens", "sft/answer_tokens")
        for run in (recipe.run.dir, recipe.run.parent):
            figures: dict[str, float] = {}
            with suppress(ArtifactError):  # a broken file is reported where the step is read
                figures = read_summary(StepFolder(Path(run) / maker.name)) if run is not None else {}
            tokens = next((figures[key] for key in keys if key in figures), None)
            if tokens:
                return tokens, f"'{maker.name}'"
    return None


# -- where the models of a role bank would be placed


@dataclass(frozen=True, slots=True)
class _RewardModel:
    """A reward model, before it is loaded."""

    weights: tuple[str, bool]  # its trunk's place and whether that is in 4 bits, or its own place
    is_adapter: bool
    shape: Shape


def seat_roles(recipe: Recipe, step: Step, shape: Shape) -> Seating:
    """Where each model that the step reads would be placed, from the recipe and manifests alone; `shape` is the
    base's."""
    trunk, is_adapter = _trunk(recipe, step)
    seating = Seating(is_continued=step.tuning.method != "full" and is_adapter)
    width = BYTES[recipe.base.dtype]

    def share(name: str, model: _RewardModel, trunk: tuple[str, bool]) -> None:
        seating.sharing += 1

    def load(name: str, model: _RewardModel) -> tuple[str, bool] | None:
        is_4bit = model.weights[1]
        seating.beside[name] = Beside(model.shape, width=width, is_4bit=is_4bit, has_adapter=model.is_adapter)
        return model.weights if model.is_adapter else None

    place_reward_models(
        dict(_reward_models(recipe, step, shape)),
        (trunk, step.tuning.method == "qlora"),
        carries=lambda trunk, model: model.is_adapter and model.weights == trunk,
        share=share,
        load=load,
    )
    return seating


def _reward_models(recipe: Recipe, step: Step, shape: Shape) -> Iterator[tuple[str, _RewardModel]]:
    """The reward models that the scoring reads, and the judge; none if the step scores nothing."""
    if step.stage.scores_if and not getattr(step.config, step.stage.scores_if):
        return
    models: dict[str, _RewardModel] = {}
    for role, makers in recipe.makers(step).items():
        if role.which and makers:
            maker, is_full = makers[0], makers[0].tuning.method == "full"
            place = _place(recipe.folder(maker).artifact) if is_full else _trunk(recipe, maker)[0]
            models[role.which] = _RewardModel((place, maker.tuning.method == "qlora"), not is_full, shape)
    for name in MODELS:
        if (model_path := getattr(step.scoring, name)) is not None:
            models[name] = _named(model_path, shape)
    known: dict[ModelName, RewardModelFacts] = {name: RewardModelFacts(name, None) for name in MODELS if name in models}
    for name in (*models_read(step.scoring, known), "judge"):
        if name in models:
            yield name, models[name]


def _named(place: str, shape: Shape) -> _RewardModel:
    """A model that `scoring` names: one of ours, or a plain sequence classifier."""
    details = _details(place, "reward_model")
    if details.get("method") in ("lora", "qlora"):
        base = str(details["base"])
        return _RewardModel((_place(base), details["method"] == "qlora"), True, shape_of(base) or shape)
    return _RewardModel((_place(place), False), False, shape_of(str(details.get("path", place))) or shape)


def _trunk(recipe: Recipe, step: Step) -> tuple[str, bool]:
    """The place of the weights under a step's adapters, and whether the step starts from an adapter on them."""
    makers = recipe.makers(step).get(POLICY)
    if makers:
        is_full = makers[0].tuning.method == "full"
        return (_place(recipe.folder(makers[0]).artifact), False) if is_full else (_trunk(recipe, makers[0])[0], True)
    details = _details(recipe.base.policy, "policy") if recipe.base.policy else {}
    if details.get("method") in ("lora", "qlora"):
        return _place(details["base"]), True
    return _place(details.get("path", recipe.base.policy or recipe.base.model)), False


def _details(place: str, kind: Any) -> dict[str, Any]:
    """The manifest's details, and the artifact's own folder as `path`; empty if it is not an artifact.

    Errors in it are reported where it is read; the plan continues without it.
    """
    try:
        artifact = read_artifact(Path(from_home(place)), kind)
    except LlamachatError:
        return {}
    return artifact.manifest.details | {"path": str(artifact.path)}


def _place(name: Path | str) -> str:
    """One name for one folder; hub names stay unchanged."""
    path = Path(from_home(str(name)))
    return str(path.resolve()) if path.exists() or isinstance(name, Path) else str(name)
