"""Load and save Llama models: the base, its adapter, a published policy. The only module that calls transformers.

Reads model folders and Hub names (safetensors only, no remote code), writes the weight files of an artifact. A policy
artifact's manifest contains `policy_details` in `details`; `load_policy` reads the same keys.
transformers loads a checkpoint without a language-model head with a random one and a warning; here missing or wrongly
shaped weights are an error.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from llamachat import distributed
from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import BASES_THAT_WORK, Tokenizer, load_tokenizer
from llamachat.config.gpus import ALLOCATOR_SHARE, USABLE
from llamachat.config.section import from_home
from llamachat.config.sections import Base, RopeScaling, Tuning, is_hub_name, split_revision
from llamachat.errors import ArtifactError, ConfigError, UsageError, first_line
from llamachat.models import nf4
from llamachat.models.files import check_model_folder
from llamachat.models.hub import tokenizer_folder
from llamachat.models.varlen_attention import can_use_varlen_attention, use_varlen_attention
from llamachat.models.weights import COMPUTED, file_weights, trunk_digest
from llamachat.runs.artifacts import MANIFEST, Artifact, read_artifact

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamachat.models.scoring_head import ScoringLlama

    LanguageModel = LlamaForCausalLM | PeftModel

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ONLY_ADAPTER = "default"  # PEFT's name for an unnamed adapter: the one that is trained and saved
SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VALUES_PER_WEIGHT = 1024  # included in the digest in an adapter's manifest
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_POSITIONS = 1 << 22  # their rotary tables take 2 GiB in a 7B model
SCALED_BY_FACTOR = ("linear", "dynamic")  # types of rotary scaling


@dataclass(frozen=True, slots=True)
class Policy:
    """A chat model ready for sampling, in evaluation mode."""

    model: "LanguageModel"
    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_tokens: int  # of a whole dialog, as in training
    system: str | None  # the system text of its training, for conversations without one
    name: str


def load_base(
    base: Base,
    *,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    is_nf4: bool = False,
) -> "LlamaForCausalLM":
    """Load the model that `base` names, or one of the same family from `source`, for training; with `is_nf4` in
    4 bits."""
    location = find_model(str(source or base.model), where="base.model")
    config = load_config(location, where="base.model")
    scale_rope(config, base.rope_scaling, max_tokens=base.max_tokens)
    dtype = dtype or dtype_of(base.dtype)
    return load_llama(location, config, dtype=dtype, attention=base.attention, device=device_of(device), is_nf4=is_nf4)


def attach_adapter(
    model: "LlamaForCausalLM | ScoringLlama", tuning: Tuning, *, seed: int, head: str | None = None
) -> "PeftModel":
    """Add LoRA to the frozen model; initial weights depend only on `seed` and leave the logits unchanged.

    The module named `head`, if any, is trained in full.

    The adapter has the model's dtype: PEFT's fp32 default makes a bf16 forward pass 2.6 times slower. The optimizer
    keeps an fp32 master copy.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    assert tuning.method != "full", "the caller attaches adapters where the recipe asks for them"
    targets: list[str] = list(SEVEN_PROJECTIONS) if tuning.targets == "all-linear" else _known_targets(tuning.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        modules_to_save=None if head is None else [head],
        r=tuning.rank,
        lora_alpha=cast(int, tuning.alpha),  # annotated int but only used as a factor: 12.5 works too
        lora_dropout=tuning.dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng(devices=gpus()):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    nf4.cast_adapter(adapted)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    copied = [name for name in trained if f".{head}.modules_to_save." in name]
    is_right = all(".lora_" in name for name in trained if name not in copied) and len(copied) == (head is not None)
    assert trained and is_right, "the trunk is frozen, adapter and head are not"
    return adapted


def load_adapter(model: "LlamaForCausalLM | ScoringLlama", folder: Path, *, is_trainable: bool) -> "PeftModel":
    """Load an adapter folder onto its base in the base's dtype; adapters trained with PEFT elsewhere also work."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
        # The base recorded in the folder is ignored: the caller supplies it. PEFT would load through the first GPU,
        # wherever the model is.
        adapted = PeftModel.from_pretrained(
            model,
            str(folder),
            config=config,
            is_trainable=is_trainable,
            autocast_adapter_dtype=False,
            torch_device=str(model.device),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder}: the adapter does not fit the base '{model.name_or_path}' ({first_line(error)}). An adapter "
            "needs the model that it was trained on. Name that model as the base, or train the adapter again."
        ) from error
    nf4.cast_adapter(adapted)
    return adapted


def save_policy(
    model: "LanguageModel | ScoringLlama", folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the weights so that `AutoModelForCausalLM`, or PEFT for an adapter, loads them unchanged.

    `weights` are the gathered weights of a sharded model (`distributed.full_weights`).
    """
    from peft import PeftModel

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # "auto" would ask the Hub whether the base's vocabulary changed. Adapters of other roles do not belong to the
        # policy.
        model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=[ONLY_ADAPTER])
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card template
        # PEFT writes sets in hash order, which differs between runs.
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text())
        ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}
        file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n")
        return
    was_caching = model.config.use_cache
    model.config.use_cache = True
    try:
        with _quietly():
            model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    finally:
        model.config.use_cache = was_caching


def policy_details(
    model: "LanguageModel | ScoringLlama", *, base: str, chat_format: str, max_tokens: int, system: str | None
) -> dict[str, Any]:
    """The manifest's details about a policy's model; `base` is the folder or Hub name of the trunk."""
    from peft import PeftModel

    is_adapter = isinstance(model, PeftModel)
    details: dict[str, Any] = {
        "method": "lora" if is_adapter else "full",
        "base": base,
        "chat_format": chat_format,
        "max_tokens": max_tokens,
        "system": system,
    }
    if is_adapter:  # an adapter's folder has no config.json that could store it
        trunk = cast("LlamaForCausalLM", model.get_base_model())
        details["base_is_folder"] = Path(str(trunk.name_or_path)).is_dir()
        details["rope_parameters"] = rope_parameters(trunk.config)
        details["trunk"] = _sampled_digest(trunk)
        compute = nf4.compute_dtype(trunk)
        if compute is not None:
            details |= {"method": "qlora", "quantization": nf4.quantization_details(compute)}
    return details


def _sampled_digest(trunk: "LlamaForCausalLM | ScoringLlama") -> str:
    """The digest that matches a policy to its base; for a 4-bit trunk, of the weights before quantization."""
    return nf4.source_digest(trunk) or trunk_digest(trunk, values_per_weight=VALUES_PER_WEIGHT)


def load_policy(
    path: Path | str, *, dtype: str = "auto", device: str = "cpu", attention: str = "auto", is_trainable: bool = False
) -> Policy:
    """Load the policy of an artifact, fully tuned or an adapter, or a plain Llama model from a folder or the Hub.

    `dtype` auto is the one it was saved in. A plain model uses the Llama 2 format and its full context.
    """
    if is_plain_model(path):
        chat_format, _ = load_proved_format(tokenizer_folder(from_home(str(path))))
        location = find_model(str(path), where="policy")
        config = load_config(location, where="policy")
        model: Any = load_llama(
            location, config, dtype=saved_dtype(config, dtype), attention=attention, device=device_of(device)
        )
        model = model.requires_grad_(is_trainable).train(is_trainable)
        return Policy(model, **reading_of_plain(location, config, chat_format))
    artifact = read_artifact(Path(path), kind="policy")
    details = checked_details(artifact)
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device_of(device)}
    how["is_trainable"] = is_trainable
    load = load_full if details["method"] == "full" else load_adapted
    return Policy(load(artifact, details, load_llama, **how).train(is_trainable), **reading_of(artifact, details))


def is_plain_model(path: Path | str) -> bool:
    """Whether this is a transformers model folder or a Hub model, not a llamachat artifact."""
    folder = Path(from_home(str(path)))
    has_files = (folder / "config.json").is_file() and not (folder / MANIFEST).is_file()
    return has_files or (not folder.exists() and is_hub_name(str(path)))


def reading_of(artifact: Artifact, details: Mapping[str, Any]) -> dict[str, Any]:
    """How a policy or reward model reads dialogs: the fields of `Policy` and `RewardModel` without the weights."""
    tokenizer, step = load_tokenizer(artifact.path), artifact.manifest.step
    run = artifact.path.resolve().parents[len(Path(step).parts)].name
    return {
        "tokenizer": tokenizer,
        "chat_format": load_chat_format(details["chat_format"], tokenizer),
        "max_tokens": details["max_tokens"],
        "system": details.get("system"),
        "name": f"{run}/{step}" if run else step,  # distinguishes policies for the reader
    }


def reading_of_plain(location: str, config: "LlamaConfig", chat_format: ChatFormat) -> dict[str, Any]:
    """`reading_of` for a model that is not an artifact: no system text, full context."""
    return {
        "tokenizer": chat_format.tokenizer,
        "chat_format": chat_format,
        "max_tokens": context_length(config),
        "system": None,
        "name": Path(location).name,
    }


def find_model(name: str, *, where: str, near: Path | None = None, may_be_hub: bool = True) -> str:
    """Resolve `name` to a folder, relative to here or to `near` and its parents, or else to a Hub name."""
    path = Path(from_home(name))
    candidates = [path]
    if near is not None and not path.is_absolute():
        candidates += [parent / path for parent in near.resolve().parents]
    for candidate in candidates:
        if candidate.is_dir():
            return str(candidate)
    if may_be_hub and is_hub_name(name):
        return name
    looked = "" if len(candidates) == 1 else " and in the folders above the artifact"
    raise (ConfigError if near is None else ArtifactError)(
        f"{where}: no folder '{name}' (searched in {Path.cwd()}{looked}). A base is a folder with config.json "
        "and *.safetensors, or a hub name (owner/model). Correct the path; it is relative to the working directory."
    )


def load_full(
    artifact: Artifact,
    details: Mapping[str, Any],
    load: Callable[..., Any],
    *,
    dtype: str,
    is_trainable: bool,
    **how: Any,
) -> Any:  # the model returned by `load`
    """Load the model of an artifact that contains all of its weights."""
    del details
    config = load_config(str(artifact.path), where=str(artifact.path))
    model = load(str(artifact.path), config, dtype=saved_dtype(config, dtype), **how)
    return model.requires_grad_(is_trainable)


def load_adapted(
    artifact: Artifact,
    details: Mapping[str, Any],
    load: Callable[..., Any],
    *,
    dtype: str,
    is_trainable: bool,
    **how: Any,
) -> "PeftModel":
    """Load the adapter of an artifact onto the trunk that it was trained on."""
    location, where = find_trunk(artifact, details)
    config = load_config(location, where=where)
    config.rope_parameters = details["rope_parameters"]
    chosen = adapter_dtype(artifact.path) if dtype == "auto" else dtype_of(dtype)
    trunk = load(location, config, dtype=chosen, is_nf4=details["method"] == "qlora", **how)
    check_trunk(trunk, artifact, details, where=where)
    return load_adapter(trunk, artifact.path, is_trainable=is_trainable)


def find_trunk(artifact: Artifact, details: Mapping[str, Any]) -> tuple[str, str]:
    """The location of the weights under an adapter, and the file that records it."""
    where = f"{artifact.path}/manifest.json: details.base"
    may_be_hub = not details["base_is_folder"]
    return find_model(details["base"], where=where, near=artifact.path, may_be_hub=may_be_hub), where


def check_trunk(
    trunk: "LlamaForCausalLM | ScoringLlama", artifact: Artifact, details: Mapping[str, Any], *, where: str
) -> None:
    """Reject a trunk whose digest differs from the one recorded when the adapter was trained; not checked in another
    dtype."""
    is_comparable = details["method"] == "qlora" or trunk.dtype == adapter_dtype(artifact.path)
    if is_comparable and _sampled_digest(trunk) != details["trunk"]:
        raise ArtifactError(
            f"{where}: '{trunk.name_or_path}' has other weights than those that the adapter was trained on. On another model an "
            "adapter silently gives wrong answers and scores. Restore the model that it was trained on, or train it "
            "again."
        )


def load_config(location: str, *, where: str) -> "LlamaConfig":
    from transformers import AutoConfig, LlamaConfig

    try:
        name, revision = split_revision(location)
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: '{location}' has no readable config.json ({first_line(error)}). A base is a model folder or a "
            "hub name. Correct the name; for a gated model such as Llama 2, accept its licence on its page and log in "
            "with `hf auth login`; without a network, copy the model to this machine and name its folder."
        ) from error
    if not isinstance(config, LlamaConfig) or config.model_type != "llama":
        raise ConfigError(
            f"{where}: '{location}' has the architecture '{config.model_type}', but chat format and adapters are those "
            f"of Llama models. Use another base. {BASES_THAT_WORK}"
        )
    return config


def load_llama(
    location: str,
    config: "LlamaConfig",
    *,
    dtype: torch.dtype,
    attention: str,
    device: str,
    is_nf4: bool = False,
    kind: "type[LlamaForCausalLM | ScoringLlama] | None" = None,
    may_lack: Collection[str] = (),
) -> Any:  # a model of the class `kind`
    """Load a folder or Hub name as a language model or as `kind`; only weights in `may_lack` may be missing."""
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils import is_flash_attn_2_available

    how: dict[str, Any] = {}
    has_flash = device.startswith("cuda") and dtype != torch.float32 and is_flash_attn_2_available()
    fastest = "flash_attention_2" if has_flash else "sdpa"
    if Path(location).is_dir():
        check_model_folder(Path(location))
    if is_nf4:
        nf4.check_shape(config, where=f"base: '{location}'")
        # Quantized on the target device, one weight at a time: the 16-bit model is never fully in memory.
        how = {"quantization_config": nf4.quantization_config(dtype), "device_map": {"": device}}
    try:
        with _quietly():
            load: Any = (kind or LlamaForCausalLM).from_pretrained  # its types omit that it returns a pair
            name, revision = split_revision(location)
            model, report = load(
                name,
                revision=revision or "main",
                config=config,
                dtype=dtype,
                attn_implementation=fastest if attention == "auto" else attention,
                use_safetensors=True,
                output_loading_info=True,
                **how,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"base: '{location}' cannot be loaded with attention '{attention}' ({first_line(error)}). Weights must be "
            "*.safetensors (pickled ones can run code), and flash_attention_2 needs its package and a GPU. Convert "
            "the weights, or set base.attention to auto."
        ) from error
    _check_weights(report, location, may_lack)
    if attention == "auto" and not has_flash and can_use_varlen_attention(config, dtype, torch.device(device)):
        use_varlen_attention(model)
    if device == "cpu":
        _use_fast_layers(model)
    if is_nf4:
        nf4.close_cpu_trap(model)
        source = trunk_digest(nf4.model_folder(location), values_per_weight=VALUES_PER_WEIGHT)
        nf4.remember_source(model, source)
    model.config.use_cache = False
    # A config may use EOS as the pad, whose embedding row would then not be trained. Our padding has no gradient.
    model.get_input_embeddings().padding_idx = None
    # Ignore the checkpoint's sampling defaults; some cannot even be saved again.
    # `write_tokenizer` writes the tokenizer's own ids when the model is published.
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return model if is_nf4 else model.to(torch.device(device))


def _use_fast_layers(model: Any) -> None:
    from llamachat.models.final_states import trim_last_layer  # these load transformers
    from llamachat.models.norms import use_fast_norms

    use_fast_norms(model)
    trim_last_layer(model)


def _check_weights(report: Mapping[str, Any], location: str, may_lack: Collection[str]) -> None:
    """Reject a model with weights that no file contains; name the files' weights that the model does not use."""
    lacking = sorted(set(report["missing_keys"]) - set(may_lack))
    lacking += sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise ConfigError(
            f"base: '{location}' lacks {len(lacking)} weights of a Llama language model ({lacking[0]}, ...). They would "
            "be random numbers. Give a whole causal language model with the shapes of its config.json."
        )
    unused = sorted(key for key in report["unexpected_keys"] if key.startswith("model.") and not key.endswith(COMPUTED))
    if unused:
        log.warning(
            "warning: base: '%s' holds %d weights that do not belong to its config.json (%s, ...); they are ignored.",
            location,
            len(unused),
            unused[0],
        )


def checked_details(artifact: Artifact) -> Mapping[str, Any]:
    details = artifact.manifest.details
    required = {"method", "base", "chat_format", "max_tokens"}
    if details.get("method") in ("lora", "qlora"):
        required |= {"base_is_folder", "rope_parameters", "trunk"}
    missing = sorted(required - details.keys())
    if missing or details["method"] not in ("full", "lora", "qlora"):
        fault = f"lacks {', '.join(missing)}" if missing else f"has the method '{details['method']}'"
        raise ArtifactError(
            f"{artifact.path}/manifest.json: details {fault}. It says how a model was tuned (full, lora or qlora), on which "
            "base, and its chat format and length. Make the artifact again with this version."
        )
    if details["method"] == "qlora":
        nf4.check_details(details, where=f"{artifact.path}/manifest.json")
    return details


def adapter_dtype(folder: Path) -> torch.dtype:
    return next(weight.dtype for _, weight in file_weights(folder / ADAPTER_WEIGHTS))


def _known_targets(targets: Sequence[str]) -> list[str]:
    unknown = [target for target in targets if target not in SEVEN_PROJECTIONS]
    if unknown or not targets:
        raise ConfigError(
            f"tuning.targets: {', '.join(unknown) or 'nothing'}. An adapter sits on the projections of a layer: "
            f"{', '.join(SEVEN_PROJECTIONS)}. Name some of them, or write all-linear."
        )
    return list(targets)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide transformers' table of weights, which we check ourselves, and from then on its progress bars, which would
    mix with ours: a step loads a model before it saves one."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def context_length(config: "LlamaConfig") -> int:
    """The model's maximum number of positions, prompt and answer together, in tokens."""
    rope = rope_parameters(config)
    factor = float(rope["factor"]) if rope["rope_type"] in SCALED_BY_FACTOR else 1.0
    positions = config.max_position_embeddings * factor
    if not 1 <= positions <= MOST_POSITIONS:
        raise ConfigError(
            f"base.model: its config.json gives {positions:g} positions (max_position_embeddings, times the factor of the"
            f" rope scaling). Tables of all of them are kept, and no Llama model has more than {MOST_POSITIONS}. Correct"
            " config.json or base.rope_scaling.factor."
        )
    return int(positions)


def rope_parameters(config: "LlamaConfig") -> dict[str, Any]:
    """Type, base wavelength and scaling of the rotary embedding, with transformers' names."""
    config.standardize_rope_params()
    return dict(config.rope_parameters or {})


def scale_rope(config: "LlamaConfig", scaling: RopeScaling | None, *, max_tokens: int) -> None:
    """Set linear interpolation (Chen et al., arXiv:2306.15595) or dynamic NTK, and check `max_tokens` with the context.

    If the config is already scaled (an artifact with a scaled base), the new scaling replaces the old one instead of
    being multiplied with it.
    """
    if scaling is not None:
        theta = rope_parameters(config)["rope_theta"]
        config.rope_parameters = {"rope_type": scaling.type, "factor": scaling.factor, "rope_theta": theta}
    context = context_length(config)
    if max_tokens > context:
        raise ConfigError(
            f"base.max_tokens: {max_tokens} tokens, but the model has {context} positions. A longer dialog would be "
            f"read at positions the model never saw. Set base.max_tokens to {context} or less, or lengthen the context "
            "with base.rope_scaling."
        )


def device_of(name: str) -> str:
    """Resolve auto to the GPU, if there is one (its own in each of several processes); else return `name`."""
    if name != "auto":
        _check_device(name)
        return name
    if not distributed.use_gpus():
        return "cpu"
    return "cuda" if distributed.count() == 1 else f"cuda:{torch.cuda.current_device()}"


def _check_device(name: str) -> None:
    """Raise UsageError if PyTorch has no device of this name."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device: '{name}' is not a device that PyTorch can use here ({first_line(error)}). Models are loaded to it."
            " Write auto, cpu, or cuda:N."
        ) from error


def gpus() -> list[int]:
    """Indices of the GPUs whose random state our seeding must not change."""
    return list(range(torch.cuda.device_count()))


def free_bytes(device: torch.device) -> int:
    """Usable memory of the device. On a GPU: what is free, up to the share that plans give to tensors; on a CPU:
    what the system can allocate without swapping.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Memory used according to the driver includes cached blocks of torch's allocator, which can be reused.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free - round((1 - USABLE / (1 + ALLOCATOR_SHARE["sampling"])) * total))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: use half of the installed memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name."""
    if name not in DTYPES:
        raise ConfigError(
            f"dtype: '{name}' is not one of {', '.join(DTYPES)}. It is the number format of the weights. Name one of them."
        )
    return DTYPES[name]


def saved_dtype(config: "LlamaConfig", name: str) -> torch.dtype:
    """The dtype of this name; for auto the one that the weights were saved in."""
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return saved if name == "auto" else dtype_of(name)
