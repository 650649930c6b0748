"""Commands beside the recipe's steps: chat, sample, score, tokens, data check, data convert, dashboard, compare, pretrain."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.errors import UsageError
from pipelines.cli.exit_status import reported, state_is_kept
from pipelines.studies.compare import compare_runs, terminal_text

if TYPE_CHECKING:
    from llamachat.rollout.engine import Sampling
    from llamachat.runs.artifacts import Kind

log = logging.getLogger(__name__)

TINY = Path("configs/tiny.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", help="The recipe.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values over the recipe's, such as sft.epochs=1.")
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="The card: 24GiB, rtx-4090, 8x a100-80gb.", metavar="CARD")
]
HoursOption = Annotated[
    float | None, typer.Option("--hours", min=0.0, help="Hours that there are, for the whole.", metavar="H")
]
PresetsOption = Annotated[bool, typer.Option("--presets", help="All presets on cards of 24, 48 and 80 GiB instead.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this probability mass.")]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample from so many of the likeliest tokens, before top-p; else all.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")]


@reported
def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARTIFACT", help="Policies; without one the last policy of the recipe's run."),
    ] = None,
    config: ConfigOption = TINY,
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Ask this once, and end.", metavar="TEXT")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System text; '' for none.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
) -> None:
    """Talk with a policy, or with two side by side."""
    artifacts = named_artifacts(words or [], config, command="chat", most=2)
    sampling = _sampling(temperature, top_p, top_k, max_new_tokens, seed)
    from llamachat.models.loading import load_policy
    from serving.chat import chat_loop, chat_once, labels
    from serving.merging import as_exported

    log.info("loading %s", ", ".join(map(str, artifacts)))
    policies = [as_exported(load_policy(path, device="auto")) for path in artifacts]
    if message is None:
        edit_lines()
        chat_loop(policies, system=system, sampling=sampling, read=input, write=_write)
        return
    headings = [f"[{label}]\n" for label in labels(policies)] if len(policies) > 1 else [""]
    for policy, heading in zip(policies, headings, strict=True):
        _write(heading)
        chat_once(policy, message, system=system, sampling=sampling, write=_write)


def edit_lines() -> None:
    """Let `input` edit a line, bring back earlier ones, and take several pasted lines as one message."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:  # a Python built without it still reads lines
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def named_artifacts(
    words: list[str], config: Path, *, command: str, most: int, kinds: "tuple[Kind, ...]" = ("policy",)
) -> list[Path]:
    """The artifacts that a command names, known to be there before the seconds that loading takes."""
    from llamachat.runs.artifacts import read_artifact

    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    artifacts = [Path(word) for word in words if word not in overrides]
    if len(artifacts) > most or (artifacts and overrides):
        number = "one artifact" if most == 1 else "one artifact or two"
        raise UsageError(
            f"{command}: found {' '.join(words)}. It takes {number}, or, with KEY=VALUE alone, the last policy of the "
            f"recipe's run. Name at most {'one' if most == 1 else 'two artifacts'}."
        )
    if not artifacts:
        from pipelines.recipe.recipe import load

        artifacts = [Path(load(config, overrides).run.dir)]
    found = [read_artifact(path) for path in artifacts]
    # The first kind is what a run folder is asked for, and what a refusal says is needed.
    return [
        artifact.path if artifact.manifest.kind in kinds else read_artifact(path, kinds[0], reader=command).path
        for path, artifact in zip(artifacts, found, strict=True)
    ]


@reported
def sample(
    policy: Annotated[Path, typer.Option("--policy", help="Artifact that answers.", metavar="ARTIFACT")],
    prompts: Annotated[Path, typer.Option("--in", help="Prompts, dialogs or preferences.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="The records with their completions.", metavar="FILE")],
    samples: Annotated[int, typer.Option("-n", help="Answers a prompt.", metavar="K")] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="So many answers at once at most; else what fits.", min=1)
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="In float32 an answer never depends on its batch; auto is the policy's own."),
    ] = "auto",
) -> None:
    """Sample a policy's answers to a file of prompts."""
    from llamachat.runs.artifacts import read_artifact

    artifact = read_artifact(policy, "policy", reader="sample")
    sampling = _sampling(temperature, top_p, top_k, max_new_tokens, seed)
    from llamachat.models.loading import load_policy
    from serving.sample import sample_file

    loaded = load_policy(artifact.path, dtype=dtype, device="auto")
    done = sample_file(loaded, prompts, out, samples_per_prompt=samples, sampling=sampling, rows_per_batch=batch_size)
    log.info("%s: %d answers to %d prompts, %d finished", out, done.completions, done.prompts, done.finished)


@reported
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model: artifact, step folder, plain folder.")],
    answers: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Dialogs, preferences, or prompts with completions.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The records with their scores; else printed.", metavar="FILE")
    ] = None,
    message: Annotated[
        list[str] | None,
        typer.Option("-m", "--message", help="In place of FILE: -m QUESTION -m ANSWER.", metavar="TEXT"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="A score in 16 bits has 3 digits.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Score answers with a reward model, raw: the sigmoid is not taken."""
    if (answers is None) == (not message) or (message and out is not None):
        raise UsageError(
            "score: it takes MODEL and either FILE or -m QUESTION -m ANSWER (then without --out). A score is that of "
            "answers. Give one of the two."
        )
    from llamachat.models.reward_model import load_reward_model
    from serving.score import score_file, score_turns

    loaded = load_reward_model(model, dtype=dtype, device=device)
    if message:
        print(score_turns(loaded, message))
        return
    assert answers is not None, "one of the two is there"
    done, text = score_file(loaded, answers, out)
    if out is None:
        _write(text)
    log.info("%s: %d answers of %d records scored", answers, done.answers, done.records)
    if done.accuracy is not None:
        log.info("%d pairs: accuracy %.4f", done.pairs, done.accuracy)


def _sampling(temperature: float, top_p: float, top_k: int | None, max_new_tokens: int, seed: int) -> "Sampling":
    from llamachat.rollout.engine import Sampling

    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@reported
def tokens(
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder with the tokenizer.", metavar="DIR")],
    dialogs: Annotated[Path, typer.Option("--in", help="Dialogs.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="input_ids and loss_mask of each dialog.", metavar="FILE")],
    train_on: Annotated[
        Literal["every_answer", "last_answer"], typer.Option("--train-on", help="Which answers are learnt.")
    ] = "every_answer",
    show: Annotated[bool, typer.Option("--show", help="Print the dialogs, trained tokens coloured.")] = False,
    allow_unproved: Annotated[
        bool, typer.Option("--allow-unproved-tokenizer", help="Take a tokenizer whose ids cannot be proved.")
    ] = False,
) -> None:
    """The token ids and the loss mask of each dialog, as training sees them."""
    from llamachat.chat_format import TrainOn
    from llamachat.data.tokens import write_tokens

    done = write_tokens(tokenizer, dialogs, out, train_on=TrainOn(train_on), show=show, allow_unproved=allow_unproved)
    if done.warning:
        log.warning("%s", done.warning)
    log.info("%s: %d dialogs, %d tokens, %d of them learnt", out, done.dialogs, done.tokens, done.trained_tokens)


@reported
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A .jsonl, .jsonl.gz or .parquet file, or a hub name.")],
    kind: Annotated[
        Literal["dialog", "preference", "prompt"] | None,
        typer.Option("--kind", help="What it should hold; without this, what most of its records are."),
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, native, or the name of a known set.")] = "auto",
) -> None:
    """Check a data file: every bad line with its field, the reason and the mend; then what the file holds."""
    from llamachat.data.check import check_path

    report = check_path(path, kind, data_format, SPECIAL_TAGS)
    print(report.text())
    if report.exit_status:
        raise typer.Exit(report.exit_status)


@reported
def convert(
    path: Annotated[
        str, typer.Argument(metavar="IN", help="JSON Lines, a JSON array (.gz or not), .parquet, or a hub name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The records in our form: .jsonl or .jsonl.gz.")],
    kind: Annotated[
        Literal["dialog", "preference", "prompt"] | None,
        typer.Option("--kind", help="What to write; without this, what most of the first records are."),
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, native, or the name of a known set.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over OUT where it exists.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing where a record cannot be repaired; else it is dropped.")
    ] = False,
    plain_text: Annotated[
        bool, typer.Option("--plain-text", help="Take HTML out of the texts: tags, line breaks, entities.")
    ] = False,
) -> None:
    """Bring a data file into our form: what can be mended is, and counted; what cannot is dropped, and named."""
    from llamachat.data.convert.command import convert_path

    report = convert_path(
        path,
        out,
        kind=kind,
        format=data_format,
        forbidden=SPECIAL_TAGS,
        overwrite=overwrite,
        strict=strict,
        plain_text=plain_text,
    )
    print(f"{report.dropped()}{report.text()}")


@reported
def doctor(overrides: Overrides = None, config: ConfigOption = TINY) -> None:
    """Say what this machine lacks for the recipe, before anything large is downloaded. Status 1: something will fail."""
    from pipelines.planning.doctor import examine, report

    findings = examine(config, overrides or ())
    print(report(findings))
    if any(finding.verdict == "FAIL" for finding in findings):
        raise typer.Exit(1)


@reported
def dashboard(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
) -> None:
    """Show the curves of all runs next to the recipe's run, offline."""
    from llamachat.tracking.dashboard import dashboard as show
    from pipelines.recipe.recipe import load

    recipe = load(config, overrides or ())
    show(Path(recipe.run.dir).parent)


@reported
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder, such as runs/tiny.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other; differences are this one less RUN_A.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write; without it compare-A-B beside RUN_A.", metavar="DIR"),
    ] = None,
) -> None:
    """Two runs side by side: differences of configuration and of figures with intervals, curves overlaid."""
    comparison = compare_runs(run_a, run_b, out)
    print(terminal_text(comparison), end="")
    pictures = sum(bool(step.picture) for step in comparison.steps)
    log.info("%s: compare.md, compare.json and %d pictures", comparison.out, pictures)


@reported
def pretrain(
    texts: Annotated[Path, typer.Option("--texts", help="Folder of the texts.", metavar="DIR")],
    run: Annotated[Path, typer.Option("--run", help="Folder of the run; continued where it was begun.", metavar="DIR")],
    overrides: Overrides = None,
) -> None:
    """How the bundled tokenizer and tiny base model were made."""
    from tools.pretraining.command import run as pretrain_base

    with state_is_kept():
        pretrain_base(overrides or [], texts, run)
