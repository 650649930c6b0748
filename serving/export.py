"""Export a policy as a folder that plain transformers loads: a merged model, or the adapter for its base.

Reads a policy artifact and, for an adapter, the weights of its base; writes weights, tokenizer with chat template,
configs, a model card and `export.json`. Before publishing, the folder is loaded with transformers alone and compared
with the policy on built-in questions: log-probabilities (nats) of each token of the policy's greedy answers and of
built-in answers, the greedy answers, and the prompt ids. Answers are compared as ids, since the two tokenizers decode
invalid bytes differently.
"""

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message, as_dicts, with_system
from llamachat.chat_format.format import fit
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.errors import ArtifactError, LlamachatError, UsageError
from llamachat.models.hub import LICENCE_FILES, weights_folder
from llamachat.models.loading import ADAPTER_WEIGHTS, Policy, device_of, find_trunk, load_policy
from llamachat.models.reward_model import PLAIN_CLASS
from llamachat.rollout.engine import Sampling
from llamachat.runs.artifacts import Artifact, library_versions
from llamachat.runs.atomic import incoming_folder, write_json
from llamachat.runs.outputs import check_output
from serving.context import longest_dialog, open_engine
from serving.merging import read_adapter, write_weights
from serving.model_card import Facts, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Format = Literal["merged", "adapter"]
Onto = Literal["quantized", "original"]
NOTE = "export.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Tolerance of a token's log-probability, in nats. Merging rounds a weight once more, by up to 2^-9 of its size in bf16,
# where logits between 16 and 32 are 1/8 apart: two such steps. fp16 steps are 8 times finer. In fp32 only the order of
# sums differs. A single token of a small model may differ more, since rounding accumulates over layers (1.4 nats with
# SmolLM2-135M in 4 bits, whose bf16 itself is 0.3 from fp32); then the mean decides, at half of this.
TOLERANCE = {"bfloat16": 0.25, "float16": 0.03, "float32": 0.001}

QUESTIONS = (
    ("Hello, who are you?", "I am a language model, and I answer questions."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three things that one can see in a forest.", "Trees, birds and mushrooms."),
    ("How do I boil an egg?", "Put it into boiling water and take it out after eight minutes."),
    ("Write one sentence about the sea.", "The sea was grey that morning, and nobody was on the beach."),
)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=32, seed=0)


class ExportError(LlamachatError):
    """The exported model does not match the policy."""


@dataclass(frozen=True, slots=True)
class Request:
    """An export: what to write, and where."""

    artifact: Artifact
    out: Path
    format: Format = "merged"
    onto: Onto | None = None  # what a QLoRA policy is merged onto; default: quantized
    shard_gb: float = 5.0
    should_overwrite: bool = False
    may_differ: bool = False
    dtype: str | None = None  # of a reward model's weights; a policy keeps its training dtype

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
        read = [self.artifact.path, *([Path(base)] if (base := self.artifact.manifest.details.get("base")) else [])]
        check_output(self.out, read, overwrite=self.should_overwrite, marker=NOTE)

    @property
    def method(self) -> str:
        """How the policy was tuned: full, lora or qlora."""
        return str(self.artifact.manifest.details.get("method"))


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy's result for one question: ids and log-probabilities of its greedy and the built-in answer."""

    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    builtin_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely the exported model matches the policy."""

    max_logprob_difference: float  # of a token's log-probability, in nats
    mean_logprob_difference: float
    tokens: int
    questions: int
    equal_prompts: int  # questions with identical prompt ids from the exported chat template
    equal_greedy_answers: int  # questions with the same greedy answer


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """What an export needs from the policy after it is unloaded."""

    name: str
    dtype: torch.dtype  # training dtype, ignoring 4-bit weights
    answers: list[Answer]
    chat_format: ChatFormat
    max_tokens: int
    system: str | None


def take_snapshot(artifact: Artifact) -> PolicySnapshot:
    """Load the policy, sample its answers to the built-in questions, and free its memory."""
    log.info("asking %s the questions that the export is compared on", artifact.path)
    policy = load_policy(artifact.path, device="auto")
    embedding: Any = policy.model.get_input_embeddings()  # embeddings have the training dtype
    snapshot = PolicySnapshot(
        policy.name, embedding.weight.dtype, answers_of(policy), policy.chat_format, policy.max_tokens, policy.system
    )
    del policy, embedding
    gc.collect()
    return snapshot


def export_policy(request: Request, snapshot: PolicySnapshot | None = None) -> Agreement:
    """Write the folder, compare it with the policy, and move it to its final path."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    snapshot = snapshot or take_snapshot(request.artifact)
    dtype = snapshot.dtype
    with written_folder(request, dtype) as (side, base):
        written: Any = "auto" if request.format == "merged" else dtype
        model = load_plain(request, side, base, AutoModelForCausalLM, dtype=written, compute=torch.bfloat16)
        agreement = compare(model, AutoTokenizer.from_pretrained(str(side)), snapshot.answers)
        _judge(request, agreement, dtype)
        note = {"policy": snapshot.name, **provenance_of(request, base, dtype), "tolerance": tolerance(dtype)}
        write_notes(request, side, base, note | asdict(agreement), model_card, name=snapshot.name)
    return agreement


@contextmanager
def written_folder(request: Request, dtype: torch.dtype) -> Iterator[tuple[Path, Path]]:
    """Folder with weights and tokenizer, published when the block ends, and the base's folder."""
    base = base_folder(request)
    with incoming_folder(request.out) as side:
        log.info("writing %s", request.out)
        if request.format == "adapter":
            write_adapter(request, side, base)
        else:
            write_merged(request, side, base, dtype)
        copy_tokenizer(request, side)
        log.info("reloading it with transformers only")
        yield side, base


def tolerance(dtype: torch.dtype) -> float:
    """Maximum difference of a token's log-probability that rounding explains, in nats."""
    return TOLERANCE[str(dtype).removeprefix("torch.")]


def base_folder(request: Request) -> Path:
    """The folder with the base weights."""
    if request.method == "full":
        return request.artifact.path
    return weights_folder(find_trunk(request.artifact, request.artifact.manifest.details)[0])


def write_merged(request: Request, side: Path, base: Path, dtype: torch.dtype) -> None:
    """Add a complete model: config, weights with the adapter merged, and the base's licence."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(str(base))
    config.rope_parameters = request.artifact.manifest.details.get("rope_parameters", config.rope_parameters)
    config.dtype, config.architectures, config.use_cache = dtype, ["LlamaForCausalLM"], True
    control = load_tokenizer(request.artifact.path).control
    ids = {"bos_token_id": control.bos, "eos_token_id": control.eos, "pad_token_id": control.pad}
    config.bos_token_id, config.eos_token_id, config.pad_token_id = ids.values()
    if request.artifact.manifest.kind == "reward_model":
        config.architectures, config.use_cache, config.num_labels = [PLAIN_CLASS], False, 1
    else:
        GenerationConfig(**ids).save_pretrained(side)
    config.save_pretrained(side)
    if request.onto == "original":
        log.warning(
            "--onto original: the model was trained and evaluated on its base in 4 bits. On the original weights it is "
            "another model, better or worse; measure it before you use it."
        )
    write_weights(
        base,
        side,
        adapter=None if request.method == "full" else read_adapter(request.artifact.path),
        dtype=dtype,
        is_nf4=request.method == "qlora" and request.onto != "original",
        shard_bytes=int(request.shard_gb * 1e9),
        device=device_of("auto"),
    )
    for file in side.glob("*.safetensors"):
        shutil.copymode(side / "config.json", file)  # safetensors makes files readable by their owner only
    for pattern in LICENCE_FILES:
        for file in base.glob(pattern):
            shutil.copyfile(file, side / file.name)


def copy_tokenizer(request: Request, side: Path) -> None:
    """Add the artifact's tokenizer, and its chat template also as the separate file that some programs expect."""
    for file in TOKENIZER_FILES:
        if (request.artifact.path / file).is_file():
            shutil.copyfile(request.artifact.path / file, side / file)
    config = json.loads((side / "tokenizer_config.json").read_text(encoding="utf-8"))
    (side / CHAT_TEMPLATE).write_text(config["chat_template"], encoding="utf-8")


def write_adapter(request: Request, side: Path, base: Path) -> None:
    """Add the adapter, with the public name of its base."""
    artifact = request.artifact
    shutil.copyfile(artifact.path / ADAPTER_WEIGHTS, side / ADAPTER_WEIGHTS)
    config = json.loads((artifact.path / "adapter_config.json").read_text(encoding="utf-8"))
    # A relative path is meaningless when the adapter is loaded from elsewhere.
    config["base_model_name_or_path"] = adapter_base(request, base)
    write_json(side / "adapter_config.json", config)


def adapter_base(request: Request, base: Path) -> str:
    """The public name of the adapter's base: its hub name, or its folder on this machine."""
    details = request.artifact.manifest.details
    return str(base.resolve()) if details["base_is_folder"] else str(details["base"])


def load_plain(
    request: Request, side: Path, base: Path, kind: Any, *, dtype: Any, compute: torch.dtype, **config: Any
) -> Any:
    """Load the written folder as a user of transformers would, with model class `kind`."""
    from transformers import AutoConfig, BitsAndBytesConfig

    # A model that does not fit on one GPU, such as a merged 13B on 24 GB, is partly placed on the CPU.
    arguments: dict[str, Any] = {"dtype": dtype, **({"device_map": "auto"} if torch.cuda.is_available() else {})}
    if request.format == "merged":
        return kind.from_pretrained(str(side), **arguments).eval()
    from peft import PeftModel

    arguments["config"] = AutoConfig.from_pretrained(str(base), **config)
    arguments["config"].rope_parameters = request.artifact.manifest.details["rope_parameters"]
    if request.method == "qlora":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return PeftModel.from_pretrained(kind.from_pretrained(str(base), **arguments), str(side)).eval()


def _judge(request: Request, agreement: Agreement, dtype: torch.dtype) -> None:
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
    # On weights other than those of training, the difference is the user's choice and was logged above.
    if agreement.max_logprob_difference > limit and request.onto != "original":
        if agreement.mean_logprob_difference > limit / 2:
            wrong.append(
                f"a token's log-probability differs by {agreement.max_logprob_difference:.3f} nats, and {limit:g} is "
                f"allowed, or more in few tokens, but the mean is {agreement.mean_logprob_difference:.3f}, over {limit / 2:g}"
            )
        else:
            log.warning(
                "%s: few tokens differ by more than %g nats, %.4f in the mean: weights rounded with the adapter in them are"
                " those that chat and the rollouts use, too. --format adapter keeps the adapter exact.",
                request.out,
                limit,
                agreement.mean_logprob_difference,
            )
    report_faults(request, wrong, agreement.max_logprob_difference)
    if agreement.equal_greedy_answers < agreement.questions:
        log.warning(
            "where two tokens are about equally likely, rounding decides; the rest of a greedy answer then differs"
        )


def report_faults(request: Request, faults: Sequence[str], difference: float) -> None:
    """Raise if the export differs by more than rounding explains; only warn if that is allowed and finite."""
    if faults and not (request.may_differ and math.isfinite(difference)):
        raise ExportError(
            f"{request.out}: {'; '.join(faults)}. The exported model has to give what the artifact gives, up to the "
            "rounding of its weights; nothing was written. Look for a base that changed since training; where the "
            "difference is known and small, write it all the same with --allow-difference."
        )
    for text in faults:
        log.warning("%s", text)


def provenance_of(request: Request, base: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Common content of `export.json`: the artifact and base, and how they were exported."""
    manifest = request.artifact.manifest
    is_adapter = request.format == "adapter"
    return {
        "fingerprint": manifest.fingerprint,
        "digest": request.artifact.digest,
        "format": request.format,
        "method": request.method,
        "onto": None if request.method != "qlora" or is_adapter else request.onto or "quantized",
        "base": manifest.details["base"],
        **({"adapter_base": adapter_base(request, base)} if is_adapter else {}),
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_notes(
    request: Request, side: Path, base: Path, note: Mapping[str, Any], card: Callable[[Facts], str], *, name: str
) -> None:
    """Add `export.json` with this content, and the model card made from it."""
    note = {**note, "versions": library_versions()}
    write_json(side / NOTE, note)
    (side / "README.md").write_text(card(Facts(request.artifact, name, base, note)), encoding="utf-8")


def answers_of(policy: Policy) -> list[Answer]:
    """The policy's answers to the built-in questions, as `llamachat chat` at temperature 0 gives them."""
    engine = open_engine(policy)
    limit = longest_dialog(policy, engine)
    answers = []
    for question, answer in QUESTIONS:
        messages = with_system([Message("user", question)], policy.system)
        if fit(policy.chat_format, messages, limit=limit, max_new_tokens=GREEDY.max_new_tokens) is None:
            continue
        prompt_ids = tuple(policy.chat_format.encode_prompt(messages))
        ((completion,),) = engine.generate([prompt_ids], samples_per_prompt=1, sampling=GREEDY)
        builtin_ids = _answer_ids(policy, messages, answer)[: max(1, limit - len(prompt_ids))]
        logprobs = [_logprobs(policy.model, prompt_ids, ids) for ids in (completion.token_ids, builtin_ids)]
        answers.append(Answer(messages, prompt_ids, completion.token_ids, builtin_ids, (*logprobs[0], *logprobs[1])))
    if not answers:
        raise ArtifactError(
            f"{policy.name}: none of the built-in questions fits into the {limit} tokens that it reads. An exported "
            "model is compared with the policy on them. Train with a larger base.max_tokens or a shorter base.system."
        )
    return answers


def compare(model: Any, tokenizer: "PreTrainedTokenizerBase", answers: Sequence[Answer]) -> Agreement:
    """Compare the log-probabilities and prompts of a transformers model and tokenizer with the policy's."""
    differences: list[float] = []
    equal_prompts = equal_greedy_answers = 0
    for answer in answers:
        logprobs = [
            value
            for ids in (answer.greedy_ids, answer.builtin_ids)
            for value in _logprobs(model, answer.prompt_ids, ids)
        ]
        differences += [abs(ours - theirs) for ours, theirs in zip(answer.logprobs, logprobs, strict=True)]
        prompt: Any = tokenizer.apply_chat_template(
            as_dicts(answer.messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        equal_prompts += tuple(prompt["input_ids"][0].tolist()) == answer.prompt_ids
        # As a user of transformers would generate it.
        ids = {name: prompt[name].to(model.device) for name in ("input_ids", "attention_mask")}
        generated = model.generate(**ids, do_sample=False, max_new_tokens=len(answer.greedy_ids))
        equal_greedy_answers += tuple(generated[0, ids["input_ids"].shape[1] :].tolist()) == answer.greedy_ids
    # NaN counts as infinite, so that `max` does not hide it.
    differences_N = torch.tensor(differences, dtype=torch.float64).nan_to_num(nan=float("inf"))
    return Agreement(
        max_logprob_difference=float(differences_N.max()),
        mean_logprob_difference=float(differences_N.mean()),
        tokens=len(differences),
        questions=len(answers),
        equal_prompts=equal_prompts,
        equal_greedy_answers=equal_greedy_answers,
    )


def _answer_ids(policy: Policy, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
    dialog = [*messages, Message("assistant", answer)]
    example = policy.chat_format.encode_dialog(dialog, train_on=TrainOn.LAST_ANSWER)
    return tuple(token for token, is_in_loss in zip(example.input_ids, example.loss_mask, strict=True) if is_in_loss)


@torch.no_grad()
def _logprobs(model: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[float]:
    """Log-probability (nats) of each token of the answer after the prompt."""
    ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    logits_TV: Tensor = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits[0]
    logprobs_RV = torch.log_softmax(logits_TV[len(prompt_ids) - 1 : -1].float(), dim=-1)
    return logprobs_RV.gather(1, torch.tensor(answer_ids, device=model.device).unsqueeze(1)).squeeze(1).tolist()
