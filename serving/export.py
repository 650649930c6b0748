"""A policy as a folder that plain transformers loads: one merged model, or the adapter beside its base.

Reads a policy artifact and, for an adapter, the weights of its base; writes weights, tokenizer with chat template,
configs, a model card and `export.json`. The folder is loaded again with transformers alone and held against the policy
before it gets its name. It appears whole or not at all.
"""

import gc
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamachat.errors import LlamachatError, UsageError
from llamachat.runs.artifacts import Artifact, library_versions
from llamachat.runs.atomic import incoming_folder, write_json

if TYPE_CHECKING:
    import torch

    from llamachat.chat_format import ChatFormat
    from serving.agreement import Agreement, Answer

log = logging.getLogger(__name__)

Format = Literal["merged", "adapter"]
Onto = Literal["quantized", "original"]
NOTE = "export.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Of one token's log-probability, in nats. A merged weight is rounded once more than weight and adapter apart, by up to
# 2^-9 of its size in bf16, and logits between 16 and 32 are 1/8 apart there: two such steps. In fp16 steps are 8 times
# finer. In fp32 only the order of the sums differs.
TOLERANCE = {"bfloat16": 0.25, "float16": 0.03, "float32": 0.001}


class ExportError(LlamachatError):
    """The exported folder does not say what the policy says."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to write where."""

    artifact: Artifact
    out: Path
    format: Format = "merged"
    onto: Onto | None = None  # of a QLoRA policy: what it is merged onto; quantized where nothing is said
    shard_gb: float = 5.0
    should_overwrite: bool = False
    may_differ: bool = False
    dtype: str | None = None  # of a reward model's weights; a policy keeps the number format of its training

    def __post_init__(self) -> None:
        if not self.shard_gb > 0:
            raise UsageError(
                f"--shard-gb: {self.shard_gb} is no size. A file of weights holds some. Give 5, or leave it."
            )
        if self.format == "adapter" and self.method == "full":
            raise UsageError(
                f"--format adapter: {self.artifact.path} is tuned in all its weights. Only a LoRA or QLoRA model has "
                "an adapter. Export it with --format merged."
            )
        if self.onto is not None and not (self.method == "qlora" and self.format == "merged"):
            raise UsageError(
                f"--onto {self.onto}: it chooses the weights that a QLoRA policy is merged onto, and this is a "
                f"'{self.method}' policy in the format '{self.format}'. Leave it out."
            )
        if self.dtype is not None and (self.artifact.manifest.kind == "policy" or self.format == "adapter"):
            raise UsageError(
                f"--dtype {self.dtype}: it is for merged reward models, whose scores move by rounding. A policy and an "
                "adapter keep the number format of their training. Leave it out."
            )
        if self.out.exists():
            self._check_replaceable()

    @property
    def method(self) -> str:
        """How the policy was tuned: full, lora or qlora."""
        return str(self.artifact.manifest.details.get("method"))

    @property
    def merges_onto_nf4(self) -> bool:
        return self.method == "qlora" and self.format == "merged" and self.onto != "original"

    def _check_replaceable(self) -> None:
        is_ours = (self.out / NOTE).is_file() or (self.out.is_dir() and not any(self.out.iterdir()))
        if not is_ours:
            raise UsageError(
                f"--out: '{self.out}' is there, and no export made it. What it holds would be deleted. Name a new folder."
            )
        if not self.should_overwrite:
            raise UsageError(
                f"--out: '{self.out}' is there. An export is a folder of its own. Name a new one, or replace this with "
                "--overwrite."
            )


@dataclass(frozen=True, slots=True)
class Asked:
    """What an export needs to know of the policy when that is no longer in memory."""

    name: str
    dtype: "torch.dtype"  # of training, 4 bits aside
    answers: "list[Answer]"
    chat_format: "ChatFormat"
    max_tokens: int
    system: str | None


def ask_policy(artifact: Artifact) -> Asked:
    """Load the policy and ask it the built-in questions; afterwards its memory is free again."""
    from llamachat.models.loading import load_policy
    from serving.agreement import answers_of

    log.info("asking %s the questions that the export is held against", artifact.path)
    policy = load_policy(artifact.path, device="auto")
    embedding: Any = policy.model.get_input_embeddings()  # the first in the number format of training
    asked = Asked(
        policy.name, embedding.weight.dtype, answers_of(policy), policy.chat_format, policy.max_tokens, policy.system
    )
    del policy, embedding
    gc.collect()
    return asked


def export_policy(request: Request, asked: Asked | None = None) -> "Agreement":
    """Write the folder, hold it against the policy, and give it its name."""
    asked = asked or ask_policy(request.artifact)
    dtype = asked.dtype
    with incoming_folder(request.out) as side:
        base = base_folder(request)
        log.info("writing %s", request.out)
        write = write_adapter if request.format == "adapter" else _write_merged
        write(request, side, base, dtype)
        copy_tokenizer(request, side)
        log.info("loading it again with transformers alone")
        agreement = _load_and_compare(request, side, base, dtype, asked.answers)
        _judge(request, agreement, dtype)
        _write_notes(request, side, base, dtype, agreement, name=asked.name)
    return agreement


def tolerance(dtype: "torch.dtype") -> float:
    """The largest difference of a token's log-probability that rounding explains, in nats."""
    return TOLERANCE[str(dtype).removeprefix("torch.")]


def base_folder(request: Request) -> Path:
    """The folder with the weights that are not the adapter's."""
    from llamachat.models.hub import weights_folder
    from llamachat.models.loading import find_model

    details = request.artifact.manifest.details
    if request.method == "full":
        return request.artifact.path
    where = f"{request.artifact.path}/manifest.json: details.base"
    location = find_model(
        details["base"], where=where, near=request.artifact.path, may_be_hub=not details["base_is_folder"]
    )
    return weights_folder(location)


def _write_merged(request: Request, side: Path, base: Path, dtype: "torch.dtype") -> None:
    import torch
    from transformers import AutoConfig, GenerationConfig

    from llamachat.chat_format.tokenizer import BOS_ID, EOS_ID, UNK_ID
    from serving.merging import read_adapter, write_weights

    config = AutoConfig.from_pretrained(str(base))
    config.rope_parameters = request.artifact.manifest.details.get("rope_parameters", config.rope_parameters)
    config.dtype, config.architectures, config.use_cache = dtype, ["LlamaForCausalLM"], True
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS_ID, EOS_ID, UNK_ID
    config.save_pretrained(side)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=UNK_ID).save_pretrained(side)
    if request.onto == "original":
        log.warning(
            "--onto original: the policy was trained and evaluated on its base in 4 bits. On the original weights it is "
            "another model, better or worse; measure it before you use it."
        )
    write_weights(
        base,
        side,
        adapter=None if request.method == "full" else read_adapter(request.artifact.path),
        dtype=dtype,
        is_nf4=request.merges_onto_nf4,
        shard_bytes=int(request.shard_gb * 1e9),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    finish_folder(side, base)


def finish_folder(side: Path, base: Path) -> None:
    """Give the weights the mode of other files, and add the licence of the base."""
    from llamachat.models.hub import LICENCE_FILES

    for file in side.glob("*.safetensors"):
        shutil.copymode(side / "config.json", file)  # safetensors leaves them to their owner alone
    for pattern in LICENCE_FILES:
        for file in base.glob(pattern):
            shutil.copyfile(file, side / file.name)


def copy_tokenizer(request: Request, side: Path) -> None:
    """Add the tokenizer of the artifact; its chat template also as the file that some programs look for."""
    for file in TOKENIZER_FILES:
        if (request.artifact.path / file).is_file():
            shutil.copyfile(request.artifact.path / file, side / file)
    config = json.loads((side / "tokenizer_config.json").read_text(encoding="utf-8"))
    (side / CHAT_TEMPLATE).write_text(config["chat_template"], encoding="utf-8")


def write_adapter(request: Request, side: Path, base: Path, dtype: "torch.dtype") -> None:
    """Add the adapter, with the name of its base as others know it."""
    from llamachat.models.loading import ADAPTER_WEIGHTS

    del dtype
    artifact = request.artifact
    shutil.copyfile(artifact.path / ADAPTER_WEIGHTS, side / ADAPTER_WEIGHTS)
    config = json.loads((artifact.path / "adapter_config.json").read_text(encoding="utf-8"))
    # A relative folder means nothing to who loads it from elsewhere.
    config["base_model_name_or_path"] = adapter_base(request, base)
    write_json(side / "adapter_config.json", config)


def adapter_base(request: Request, base: Path) -> str:
    """How others name the base of the adapter: its hub name, or its folder on this machine."""
    details = request.artifact.manifest.details
    return str(base.resolve()) if details["base_is_folder"] else str(details["base"])


def _load_and_compare(
    request: Request, side: Path, base: Path, dtype: "torch.dtype", answers: "list[Answer]"
) -> "Agreement":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from serving.agreement import compare

    # More than one GPU holds, as a merged 13B on 24 GB, goes in part to the CPU.
    arguments: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    disable_progress_bar()
    details = request.artifact.manifest.details
    if request.format == "adapter":
        from peft import PeftModel

        config = AutoConfig.from_pretrained(str(base))
        config.rope_parameters = details["rope_parameters"]
        if request.method == "qlora":
            arguments["quantization_config"] = nf4_config(torch.bfloat16)
        trunk = AutoModelForCausalLM.from_pretrained(str(base), config=config, dtype=dtype, **arguments)
        model = PeftModel.from_pretrained(trunk, str(side))
    else:
        model = AutoModelForCausalLM.from_pretrained(str(side), dtype="auto", **arguments)
    return compare(model.eval(), AutoTokenizer.from_pretrained(str(side)), answers)


def nf4_config(compute: "torch.dtype") -> Any:
    """The quantisation of a QLoRA base, as a user of transformers asks for it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _judge(request: Request, agreement: "Agreement", dtype: "torch.dtype") -> None:
    limit = tolerance(dtype)
    log.info(
        "log-probabilities of %d tokens differ by at most %.4f nats from the policy's (mean %.4f; rounding explains %g)",
        agreement.tokens,
        agreement.max_logprob_difference,
        agreement.mean_logprob_difference,
        limit,
    )
    log.info("equal greedy answers: %d of %d", agreement.equal_greedy_answers, agreement.questions)
    wrong = []
    if agreement.equal_prompts < agreement.questions:
        wrong.append(f"{agreement.questions - agreement.equal_prompts} prompts have other token ids")
    # On other weights than those of training the difference is the user's choice, and told.
    if agreement.max_logprob_difference > limit and request.onto != "original":
        wrong.append(
            f"a token's log-probability differs by {agreement.max_logprob_difference:.3f} nats, and {limit:g} is allowed"
        )
    may_pass = request.may_differ and math.isfinite(agreement.max_logprob_difference)
    if wrong and not may_pass:
        raise ExportError(
            f"{request.out}: {'; '.join(wrong)}. The exported model has to say what the policy says, up to the rounding "
            "of its weights; nothing was written. Look for a base that changed since training; where the difference is "
            "known and small, write it all the same with --allow-difference."
        )
    for text in wrong:
        log.warning("%s", text)
    if agreement.equal_greedy_answers < agreement.questions:
        log.warning(
            "where two tokens are about equally likely, rounding decides; a greedy answer then goes on otherwise"
        )


def _write_notes(
    request: Request, side: Path, base: Path, dtype: "torch.dtype", agreement: "Agreement", *, name: str
) -> None:
    from serving.model_card import Facts, model_card

    manifest = request.artifact.manifest
    onto = None if request.method != "qlora" or request.format != "merged" else request.onto or "quantized"
    note: Mapping[str, Any] = {
        "policy": name,
        "fingerprint": manifest.fingerprint,
        "digest": request.artifact.digest,
        "format": request.format,
        "method": request.method,
        "onto": onto,
        "base": manifest.details["base"],
        **({"adapter_base": adapter_base(request, base)} if request.format == "adapter" else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": tolerance(dtype),
        **asdict(agreement),
        "versions": library_versions(),
    }
    write_json(side / NOTE, note)
    facts = Facts(artifact=request.artifact, name=name, base=base, note=note)
    (side / "README.md").write_text(model_card(facts), encoding="utf-8")
