"""Commands that query a policy or a reward model: chat, sample, pairs, score, benchmark."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamachat.errors import UsageError
from llamachat.tables import plural
from pipelines.cli.launch import (
    TINY,
    AllowUnproved,
    ConfigOption,
    MaxNewTokens,
    OverwriteOutOption,
    Seed,
    Temperature,
    TopK,
    TopP,
    reported,
    state_is_kept,
)

if TYPE_CHECKING:
    from llamachat.rollout.engine import Sampling
    from llamachat.runs.artifacts import Kind

log = logging.getLogger(__name__)

KeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="Separate file to write: which policy gave which answer.", metavar="FILE"),
]
PageOption = Annotated[
    Path | None,
    typer.Option("--page", help="File to write: an HTML page to rate the pairs by keyboard, offline.", metavar="FILE"),
]


@reported
def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARTIFACT",
            help="Up to two policies; by default the policy that the evaluation of the recipe's run recommends, or the last policy.",
        ),
    ] = None,
    config: ConfigOption = TINY,
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Ask this one question and exit.", metavar="TEXT")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System text; '' for none.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
) -> None:
    """Chat with a policy, or with two side by side."""
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
    """Give `input` line editing and history, and let it read several pasted lines as one message."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:  # a Python built without readline still reads lines
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def named_artifacts(
    words: list[str], config: Path, *, command: str, most: int, kinds: "tuple[Kind, ...]" = ("policy",)
) -> list[Path]:
    """The artifacts that a command names, checked to exist before the seconds that loading takes."""
    from llamachat.config.section import from_home
    from llamachat.runs.artifacts import read_artifact
    from llamachat.runs.choice import is_run
    from pipelines.recipe.recipe import load

    overrides = [word for word in words if "=" in word and not Path(from_home(word)).exists()]
    artifacts = [Path(from_home(word)) for word in words if word not in overrides]
    if len(artifacts) > most or (artifacts and overrides):
        number = "one artifact" if most == 1 else "one artifact or two"
        raise UsageError(
            f"{command}: found {' '.join(words)}. It takes {number}, or, with KEY=VALUE only, the policy of the "
            f"recipe's run. Name at most {'one' if most == 1 else 'two artifacts'}."
        )
    if not artifacts:
        artifacts = [Path(load(config, overrides).run.dir)]
    artifacts = [recommended(path) if is_run(path) else path for path in artifacts]
    opened = [read_artifact(path) for path in artifacts]
    # The first kind is looked up in a run folder, and an error names it as the required one.
    return [
        artifact.path if artifact.manifest.kind in kinds else read_artifact(path, kinds[0], reader=command).path
        for path, artifact in zip(artifacts, opened, strict=True)
    ]


def recommended(run: Path) -> Path:
    """The policy of a run that its evaluation recommends; a log line says why, and how to choose another one."""
    from llamachat.runs.choice import recommended_policy

    choice = recommended_policy(run)
    if choice is None:
        return run  # a missing file is reported where it is read
    policy, why = choice
    step = policy.manifest.step
    log.info("%s: %s. To use another policy, name its step: %s/STEP", step, why, run)
    return policy.path


@reported
def sample(
    policy: Annotated[Path, typer.Option("--policy", help="Policy to sample from.", metavar="ARTIFACT")],
    prompts: Annotated[Path, typer.Option("--in", help="File of prompts, dialogs or preferences.", metavar="FILE")],
    out: Annotated[
        Path, typer.Option("--out", help="File to write: the records with their completions.", metavar="FILE")
    ],
    samples: Annotated[int, typer.Option("-n", help="Number of answers to each prompt.", metavar="K")] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Maximum batch size; by default as large as memory allows.", min=1),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            "--dtype", help="Number format; in float32 an answer never depends on its batch; auto is the policy's own."
        ),
    ] = "auto",
    overwrite: OverwriteOutOption = False,
) -> None:
    """Sample a policy's answers to a file of prompts."""
    from llamachat.runs.artifacts import read_artifact
    from llamachat.runs.outputs import check_output

    artifact = read_artifact(policy, "policy", reader="sample")
    check_output(out, [prompts, artifact.path], overwrite=overwrite)
    sampling = _sampling(temperature, top_p, top_k, max_new_tokens, seed)
    from llamachat.models.loading import load_policy
    from serving.sample import sample_file

    loaded = load_policy(artifact.path, dtype=dtype, device="auto")
    done = sample_file(
        loaded,
        prompts,
        out,
        samples_per_prompt=samples,
        sampling=sampling,
        rows_per_batch=batch_size,
        overwrite=overwrite,
    )
    log.info(
        "%s: %s to %s, %d finished",
        out,
        plural(done.completions, "answer"),
        plural(done.prompts, "prompt"),
        done.finished,
    )


@reported
def score(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Reward model: an artifact, a step folder, or a model folder.")
    ],
    answers: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Dialogs, preferences, or prompts with completions.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write: the records with their scores; by default they are printed to standard output.",
            metavar="FILE",
        ),
    ] = None,
    message: Annotated[
        list[str] | None,
        typer.Option(
            "-m", "--message", help="Score one answer instead of FILE: -m QUESTION -m ANSWER.", metavar="TEXT"
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Number format; in 16 bits a score has about 3 significant digits."),
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="Device to run on: auto, cpu, cuda or cuda:1.")] = "auto",
    allow_unproved: AllowUnproved = False,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Score answers with a reward model. Scores are raw, before the sigmoid."""
    if (answers is None) == (not message) or (message and out is not None):
        raise UsageError(
            "score: it takes MODEL and either FILE or -m QUESTION -m ANSWER (without --out). It scores the answers in FILE, "
            "or this one answer. Pass one of the two."
        )
    from llamachat.config.section import from_home
    from llamachat.runs.outputs import check_output

    if out is not None:
        check_output(out, [path for path in (answers, model) if path is not None], overwrite=overwrite)
    from llamachat.models.reward_model import load_reward_model
    from serving.score import score_file, score_turns

    loaded = load_reward_model(from_home(model), dtype=dtype, device=device, allow_unproved=allow_unproved)
    if message:
        print(score_turns(loaded, message))
        return
    assert answers is not None, "one of the two is set"
    done, text = score_file(loaded, answers, out, overwrite=overwrite)
    if out is None:
        _write(text)
    log.info("%s: scored %s of %s", answers, plural(done.answers, "answer"), plural(done.records, "record"))
    if done.accuracy is not None:
        log.info("%s: accuracy %.4f", plural(done.pairs, "pair"), done.accuracy)


def _sampling(temperature: float, top_p: float, top_k: int | None, max_new_tokens: int, seed: int) -> "Sampling":
    from llamachat.rollout.engine import Sampling

    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@reported
def pairs(
    policies: Annotated[
        list[Path],
        typer.Option("--policy", help="One or several policies that answer.", metavar="ARTIFACT"),
    ],
    prompts: Annotated[Path, typer.Option("--in", help="File of prompts, dialogs or preferences.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="File to write: the pairs, for people to rate.", metavar="FILE")],
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="One or several sampling temperatures; by default 1.0.", metavar="T..."),
    ] = None,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Read only the first N prompts.", metavar="N", min=1)
    ] = None,
    key: KeyOption = None,
    page: PageOption = None,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Sample two answers to each prompt, from different policies or temperatures, for people to rate (3.2.1)."""
    from llamachat.runs.artifacts import read_artifact
    from llamachat.runs.outputs import check_output

    artifacts = [read_artifact(path, "policy", reader="pairs") for path in policies]
    places = [artifact.path.resolve() for artifact in artifacts]
    _check_different(policies, places)
    for option, place in (("--out", out), ("--key", key), ("--page", page)):
        if place is not None:
            check_output(place, [prompts, *places], option=option, overwrite=overwrite)
    from serving.pairs import Request, counted, pair_file, variant_of

    request = Request(
        temperatures=tuple(dict.fromkeys(temperatures or [1.0])),
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
        key=key,
        page=page,
        overwrite=overwrite,
    )
    variants = [variant_of(artifact, str(path)) for artifact, path in zip(artifacts, policies, strict=True)]
    done = pair_file(variants, prompts, out, request)
    log.info("%s: %s for %s", out, plural(done.pairs, "pair"), plural(done.prompts, "prompt"))
    if page is not None:
        log.info("%s: open it in a browser; `s` saves the rated file, which a source of format rated_pairs reads", page)
    if done.shortened:
        log.info("oldest turns dropped to fit the context of a policy: %s", plural(done.shortened, "prompt"))
    if done.redrawn:
        log.info("answers sampled again: %s", counted(done.redrawn))
    if done.left_out:
        log.warning("prompts left out: %s", counted(done.left_out))


def _check_different(policies: list[Path], places: list[Path]) -> None:
    if len(set(places)) < len(places):
        raise UsageError(
            f"--policy: {' '.join(map(str, policies))} contains the same policy twice. Two answers need two different policies. "
            "Name each once; a single policy can answer at two temperatures, or be sampled twice."
        )


@reported
def benchmark(
    models: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT", help="Policies to compare, or reward models (then the probe).")
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Benchmark sets: coconot, gsm8k, ifeval, mt_bench, truthfulqa, xstest; by default all (mt_bench only with --judge).",
            metavar="NAME[,NAME]",
        ),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option("--judge", help="Reward model that compares answers to MT-Bench's questions.", metavar="ARTIFACT"),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use only the first N questions of each file.", min=1)
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", help="Preference pairs to measure reward models on; may be repeated.", metavar="FILE"),
    ] = None,
) -> None:
    """Evaluate policies on public benchmarks, or reward models on the probe, in one table (docs/benchmarks.md)."""
    from llamachat.runs.artifacts import read_artifact

    rewarding = {str(path): read_artifact(path, reader="benchmark") for path in models}
    if all(artifact.manifest.kind == "reward_model" for artifact in rewarding.values()):
        if sets or judge or limit:
            raise UsageError(
                f"--set, --judge, --limit: {' '.join(rewarding)} are reward models, which answer no questions. Remove these"
                " options; --pairs FILE adds preference pairs."
            )
        from evaluation.report.benchmarks import table_text
        from reward.benchmark import measure_reward_models

        with state_is_kept():
            print(table_text(measure_reward_models(rewarding, pairs or [])))
        return
    if pairs:
        raise UsageError("--pairs: pairs measure reward models, but policies were passed. Name reward models only.")
    artifacts = {str(path): read_artifact(path, "policy", reader="benchmark") for path in models}
    judge_artifact = None if judge is None else read_artifact(judge, "reward_model", reader="benchmark --judge")
    from evaluation.benchmark.run import Request, chosen_sets, run_benchmark

    names = [name.strip() for listed in sets or () for name in listed.split(",")]
    request = Request(
        artifacts=artifacts,
        sets=chosen_sets(
            names, has_judge=judge is not None, num_policies=len({one.digest for one in artifacts.values()})
        ),
        max_new_tokens=max_new_tokens,
        limit=limit,
        judge=judge_artifact,
    )
    with state_is_kept():
        print(run_benchmark(request))
