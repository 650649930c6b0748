"""The command `export`: writes a policy or a reward model for other programs."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamachat.errors import UsageError
from pipelines.cli.launch import TINY, ConfigOption, reported
from pipelines.cli.talk import named_artifacts

if TYPE_CHECKING:
    from serving.export import Request
    from serving.gguf import GgufRequest
    from serving.hub import Destination

Form = Literal["merged", "adapter", "gguf", "ollama"]
Quantization = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip
Onto = Literal["quantized", "original"]

OutOption = Annotated[Path, typer.Option("--out", help="The folder to write.", metavar="DIR")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ARTIFACT",
        help="Policy or reward model; by default the policy that the evaluation recommends, or the last policy.",
    ),
]
FormOption = Annotated[
    Form,
    typer.Option(
        "--format", help="What to write: a complete model, an adapter for PEFT, or one file for llama.cpp or Ollama."
    ),
]
LlamaCppOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        help="For gguf and ollama: a clone of llama.cpp, which must be built if --quantize needs it.",
        metavar="DIR",
        envvar="LLAMA_CPP",
    ),
]
QuantizeOption = Annotated[
    Quantization | None,
    typer.Option(
        "--quantize", help="For gguf and ollama: quantize the weights to this type; by default they are not quantized."
    ),
]
OntoOption = Annotated[
    Onto | None,
    typer.Option(
        "--onto",
        help="Base that a QLoRA policy is merged into: the one of the training (4 bits, dequantized), or the published one.",
    ),
]
ShardOption = Annotated[float, typer.Option("--shard-gb", help="Maximum size of a weight file, in GB (10^9 bytes).")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in DIR.")]
DifferenceOption = Annotated[
    bool, typer.Option("--allow-difference", help="Keep an export that differs from the policy by more than rounding.")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Number format of a merged reward model; by default float32 if an adapter is merged."),
]
HubOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", help="Upload the folder to the Hugging Face Hub afterwards.", metavar="USER/NAME"),
]
PrivateOption = Annotated[
    bool, typer.Option("--private/--no-private", help="Whether a new repository on the hub is private.")
]


@reported
def export(
    out: OutOption,
    words: Words = None,
    config: ConfigOption = TINY,
    form: FormOption = "merged",
    llama_cpp: LlamaCppOption = None,
    quantize: QuantizeOption = None,
    onto: OntoOption = None,
    shard_gb: ShardOption = 5.0,
    overwrite: OverwriteOption = False,
    allow_difference: DifferenceOption = False,
    dtype: DtypeOption = None,
    push_to_hub: HubOption = None,
    private: PrivateOption = True,
) -> None:
    """Export a policy or reward model. The export is reloaded and its log-probabilities are checked before it
    is published.

    merged: a folder for transformers and vLLM. adapter: the LoRA adapter for PEFT, which names its base.

    gguf: one file for llama.cpp, LM Studio and others, with tokenizer and chat template; ollama: the same file and a
    Modelfile. Both need the extra gguf and --llama-cpp (or LLAMA_CPP): a clone of
    https://github.com/ggml-org/llama.cpp, whose converter runs in llamachat's Python. f32, f16, bf16 and q8_0 need
    no build; the other types need llama-quantize from it:
    `cmake -B build && cmake --build build --config Release --target llama-quantize`.

    --push-to-hub needs a token with write access (`hf auth login` or HF_TOKEN). Only the exported files are uploaded.
    docs/serving.md shows how to serve each format.
    """
    from llamachat.runs.artifacts import check_content, read_artifact
    from llamachat.runs.outputs import check_output
    from serving.export import NOTE, Request

    _check_words(form, llama_cpp, quantize)
    check_output(out, [config], overwrite=overwrite, marker=NOTE)
    (path,) = named_artifacts(words or [], config, command="export", most=1, kinds=("policy", "reward_model"))
    artifact = read_artifact(path)
    check_content(artifact)
    request = Request(
        artifact,
        out,
        format="adapter" if form == "adapter" else "merged",
        onto=onto,
        shard_gb=shard_gb,
        should_overwrite=overwrite,
        may_differ=allow_difference,
        dtype=dtype,
    )
    to_gguf = None
    if (form == "gguf" or form == "ollama") and llama_cpp is not None:
        from serving.gguf import GgufRequest

        to_gguf = GgufRequest(request, llama_cpp, form, quantize)
    destination = _destination(request, push_to_hub, private)
    print(_export(request) if to_gguf is None else _export_gguf(to_gguf))
    if destination is not None:
        print(destination.push(out))


def _check_words(form: Form, llama_cpp: Path | None, quantize: Quantization | None) -> None:
    is_gguf = form in ("gguf", "ollama")
    if quantize is not None and not is_gguf:
        raise UsageError(
            f"--quantize {quantize}: only GGUF files are quantized, and the format is {form}. Add --format gguf, or remove it."
        )
    if is_gguf and llama_cpp is None:
        raise UsageError(
            f"--format {form}: --llama-cpp is missing. llama.cpp's own converter writes the file. Get it with `git clone "
            "https://github.com/ggml-org/llama.cpp`, and pass the path of its folder."
        )


def _destination(request: "Request", name: str | None, is_private: bool) -> "Destination | None":
    from serving.hub import Destination

    if name is None:
        return None
    details = request.artifact.manifest.details
    if request.format == "adapter" and details["base_is_folder"]:
        raise UsageError(
            f"--push-to-hub: the adapter's base is a local folder, '{details['base']}'. Others could not load "
            "it. Export with --format merged."
        )
    return Destination.checked(name, is_private=is_private)


def _export(request: "Request") -> str:
    if request.artifact.manifest.kind == "reward_model":
        from serving.reward_export import export_reward_model

        scored = export_reward_model(request)
        return f"{request.out}: largest difference in a score {scored.max_score_difference:.2g}"
    from serving.export import export_policy

    agreement = export_policy(request)
    return f"{request.out}: largest difference in a token's log-probability {agreement.max_logprob_difference:.4f} nats"


def _export_gguf(request: "GgufRequest") -> str:
    from serving.gguf import export_gguf

    file, difference = export_gguf(request)
    text = f"{file}: weights differ from the merged model's by at most {difference:.2%} of a tensor's size"
    if request.form == "gguf":
        return text
    name = file.stem.rpartition("-")[0]
    return f"{text}\nNow: ollama create {name} -f {quote(str(file.parent / 'Modelfile'))} && ollama run {name}"
