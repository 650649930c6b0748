"""A policy as a GGUF file for llama.cpp, LM Studio or Ollama.

The adapter is merged as `--format merged` does it, llama.cpp's own converter writes the file, and its quantizer makes
it smaller. Then the file is held against the policy twice: its tokenizer by its header, and, where the folder has a
built llama-server, by what that says: ids of prompts, log-probabilities, greedy answers. One thing surprises: greedy
texts alone would say little, since one token of two equally likely ones may come out otherwise; so each token of
llama.cpp is also held against the likeliest one of the merged model after the same tokens.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamachat.errors import UsageError
from llamachat.models.hub import LICENCE_FILES
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import incoming_folder, write_json
from serving.export import (
    CHAT_TEMPLATE,
    NOTE,
    TOLERANCE,
    Asked,
    ExportError,
    Request,
    ask_policy,
    base_folder,
    export_policy,
)
from serving.llama_cpp import LlamaCpp, serving
from serving.model_card import plain_name

if TYPE_CHECKING:
    from serving.llama_conversation import Heard

log = logging.getLogger(__name__)

MODELFILE = "Modelfile"
_KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # the converter's word for a number format


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """What to write where."""

    folder: Request  # for the merged folder that the converter reads, and the place of the result
    llama_cpp: Path
    form: Literal["gguf", "ollama"] = "gguf"
    quantize: str | None = None  # the weights as they are where nothing is said

    def __post_init__(self) -> None:
        if self.artifact.manifest.kind != "policy":
            raise UsageError(
                f"--format {self.form}: {self.artifact.path} is a reward model. llama.cpp and Ollama write answers, and "
                "it scores them. Export it with --format merged."
            )
        LlamaCpp(self.llama_cpp, self.quantize or "f32")
        rope = self.artifact.manifest.details.get("rope_parameters", {})
        if rope.get("rope_type") == "dynamic" and not self.folder.may_differ:
            raise UsageError(
                f"--format {self.form}: the policy's context was lengthened by base.rope_scaling of the type dynamic, "
                "which llama.cpp does not have. In dialogs longer than the base's own context it would answer otherwise, "
                "and no short question shows that. Train with the type linear, or write it with --allow-difference."
            )
        if self.form == "ollama":
            from serving.ollama import check_system

            check_system(self.artifact.manifest.details.get("system") or "")

    @property
    def artifact(self) -> Artifact:
        return self.folder.artifact

    @property
    def out(self) -> Path:
        return self.folder.out


@dataclass(frozen=True, slots=True)
class ServedAgreement:
    """How far what llama-server says of a file is from the policy."""

    questions: int
    equal_prompts: int  # questions that reach the model as the same ids, one BOS in front
    proof_texts: int
    equal_proof_texts: int
    equal_greedy_answers: int
    furthest_behind: float  # nats by which a token of a greedy answer is less likely than the merged model's choice
    tokens: int  # of these answers, those whose log-probability llama-server told
    max_logprob_difference: float  # of one of them, in nats


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    file: Path
    name: str
    quantization: str
    served: ServedAgreement | None  # None: no llama-server was there to ask


def export_gguf(request: GgufRequest) -> Exported:
    """Write the folder with the GGUF file, hold that against the policy, and give the folder its name."""
    asked = ask_policy(request.artifact)
    name = plain_name(asked.name)
    own = _KINDS[str(asked.dtype).removeprefix("torch.")]
    quantization = request.quantize or own
    llama_cpp = LlamaCpp(request.llama_cpp, quantization)
    with incoming_folder(request.out) as side:
        merged = side / "merged"
        export_policy(replace(request.folder, out=merged), asked)
        _prepare(merged, asked)
        exact = own if llama_cpp.is_quantized_after else quantization
        files = {exact: side / f"{name}-{exact}.gguf"}
        log.info("converting it with %s", llama_cpp.folder)
        llama_cpp.convert(merged, files[exact], kind=exact, name=asked.name)
        _require_tokenizer(files[exact], merged, asked)
        if llama_cpp.is_quantized_after:
            files[quantization] = side / f"{name}-{quantization}.gguf"
            said = llama_cpp.quantize(files[exact], files[quantization])
            for line in re.findall(r"\d+ of \d+ tensor\(s\) required fallback quantization", said):
                log.warning("%s: %s, since their rows do not divide into its blocks", quantization, line)
        served = _hold(request, llama_cpp, side, files, asked)
        file = files[quantization]
        for other in set(files.values()) - {file}:
            other.unlink()
        _finish(request, side, file, quantization, asked, served)
    return Exported(request.out / file.name, name, quantization, served.get(quantization))


def _prepare(merged: Path, asked: Asked) -> None:
    """What the converter is to read: a tokenizer.model, the chat template without marks, the lengthened context."""
    from transformers import LlamaConfig

    from llamachat.models.loading import context_length, rope_parameters

    plain = asked.chat_format.plain_chat_template
    (merged / CHAT_TEMPLATE).write_text(plain, encoding="utf-8")
    _change(merged / "tokenizer_config.json", chat_template=plain)
    config = LlamaConfig.from_pretrained(str(merged))
    if (
        rope_parameters(config)["rope_type"] == "linear"
    ):  # llama.cpp serves no more positions than this, whatever the factor
        _change(merged / "config.json", max_position_embeddings=context_length(config))
    if asked.chat_format.tokenizer.sentencepiece_model is None:
        from serving.sentencepiece_file import sentencepiece_model

        tokenizer_json = (merged / "tokenizer.json").read_text(encoding="utf-8")
        (merged / "tokenizer.model").write_bytes(sentencepiece_model(asked.chat_format, tokenizer_json))


def _change(file: Path, **values: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | values)


def _require_tokenizer(file: Path, merged: Path, asked: Asked) -> None:
    from llamachat.chat_format import load_chat_format
    from llamachat.chat_format.tokenizer import load_tokenizer
    from serving.gguf_header import read_header, tokenizer_faults

    converted = load_chat_format(asked.chat_format.name, load_tokenizer(merged))
    try:
        faults = tokenizer_faults(read_header(file), converted)
    except (ValueError, ArithmeticError, KeyError) as error:
        faults = [f"its header cannot be read ({error})"]
    if faults:
        raise ExportError(
            f"{file.name}: {'; '.join(faults)}. The file has to give the policy's own token ids, one BOS and the stop "
            "token; nothing was written. Take a newer llama.cpp."
        )


def _hold(
    request: GgufRequest, llama_cpp: LlamaCpp, side: Path, files: Mapping[str, Path], asked: Asked
) -> dict[str, ServedAgreement]:
    """What llama-server says of each file, held against the merged model; refuses an exact file that says otherwise."""
    from serving.llama_conversation import converse

    program = llama_cpp.server
    if program is None:
        log.warning(
            "not held against the policy by its answers: %s has no built llama-server. Only the header was read. Build it: %s",
            llama_cpp.folder,
            llama_cpp.how_to_build_the_server(),
        )
        return {}
    heard = {}
    for kind, file in files.items():
        log.info("asking llama-server the same questions of %s", file.name)
        log_file = side / "llama-server.log"
        with serving(program, file, context=asked.max_tokens, log_file=log_file) as server:
            heard[kind] = converse(server, asked)
        log_file.unlink()
    found = _compare(side / "merged", heard, asked)
    for kind, agreement in found.items():
        _judge(request, kind, agreement, asked)
    return found


def _compare(merged: Path, heard: "Mapping[str, Heard]", asked: Asked) -> dict[str, ServedAgreement]:
    import torch
    from transformers import AutoModelForCausalLM

    from serving.agreement import held_against

    arguments: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(str(merged), dtype="auto", **arguments).eval()
    found = {}
    for kind, said in heard.items():
        behind, differences, equal = [], [], 0
        for answer, (ids, logprobs) in zip(asked.answers, said.answers, strict=True):
            expected, distances = held_against(model, answer.prompt_ids, ids)
            behind += distances
            if logprobs:
                differences += [abs(ours - theirs) for ours, theirs in zip(expected, logprobs, strict=True)]
            equal += ids == answer.greedy_ids
        found[kind] = ServedAgreement(
            questions=len(asked.answers),
            equal_prompts=said.equal_prompts,
            proof_texts=said.proof_texts,
            equal_proof_texts=said.equal_proof_texts,
            equal_greedy_answers=equal,
            furthest_behind=_largest(behind),
            tokens=len(differences),
            max_logprob_difference=_largest(differences),
        )
    return found


def _largest(values: Sequence[float]) -> float:
    return max((value if math.isfinite(value) else math.inf for value in values), default=0.0)


def _judge(request: GgufRequest, kind: str, found: ServedAgreement, asked: Asked) -> None:
    formats = {short: dtype for dtype, short in _KINDS.items()}
    log.info(
        "%s: %d of %d greedy answers are the policy's; a token is at most %.4f nats behind the merged model's likeliest, "
        "and log-probabilities of %d tokens differ by at most %.4f nats",
        kind,
        found.equal_greedy_answers,
        found.questions,
        found.furthest_behind,
        found.tokens,
        found.max_logprob_difference,
    )
    wrong = []
    if found.equal_prompts < found.questions or found.equal_proof_texts < found.proof_texts:
        wrong.append(
            f"{found.questions - found.equal_prompts} of {found.questions} prompts and "
            f"{found.proof_texts - found.equal_proof_texts} of {found.proof_texts} texts of the tokenizer proof come to "
            "other token ids"
        )
    if kind in formats:  # with fewer bits the difference is the user's choice, and told
        limit = max(TOLERANCE[str(asked.dtype).removeprefix("torch.")], TOLERANCE[formats[kind]])
        if not max(found.max_logprob_difference, found.furthest_behind) <= limit:
            wrong.append(
                f"a token's log-probability differs by {found.max_logprob_difference:.3f} nats, and {limit:g} is allowed"
            )
    if wrong and not request.folder.may_differ:
        raise ExportError(
            f"{request.out}: served by llama.cpp as {kind}, {'; '.join(wrong)}. The file has to say what the policy says, "
            "up to rounding; nothing was written. Take a newer llama.cpp; where the difference is known and small, write "
            "it all the same with --allow-difference."
        )
    for text in wrong:
        log.warning("%s", text)


def _finish(
    request: GgufRequest,
    side: Path,
    file: Path,
    quantization: str,
    asked: Asked,
    served: Mapping[str, ServedAgreement],
) -> None:
    """The card, the note and the licences in place of the merged folder; for Ollama its Modelfile."""
    from serving.model_card import Facts, model_card

    merged = side / "merged"
    note = json.loads((merged / NOTE).read_text(encoding="utf-8"))
    held = {kind: asdict(agreement) for kind, agreement in served.items()}
    note |= {"format": request.form, "file": file.name, "quantization": quantization, "llama_cpp": held}
    if request.form == "ollama":
        from serving.ollama import modelfile

        text = modelfile(file.name, asked.chat_format, system=asked.system, max_tokens=asked.max_tokens)
        (side / MODELFILE).write_text(text, encoding="utf-8")
    write_json(side / NOTE, note)
    facts = Facts(request.artifact, asked.name, base_folder(request.folder), note)
    (side / "README.md").write_text(model_card(facts), encoding="utf-8")
    for pattern in LICENCE_FILES:
        for licence in merged.glob(pattern):
            shutil.copyfile(licence, side / licence.name)
    shutil.rmtree(merged)
