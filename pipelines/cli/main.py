"""The `llamachat` command. Exit status: 0 done, 1 failed, 2 bad usage, configuration or data, 3 hours over with steps
left, 130 interrupted.

Logging is set up, and signals and the environment are read, only here. A command imports what it needs when it runs,
here and in the other modules of commands, so that `--help` and errors in the command line appear at once.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from shlex import join, quote
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from llamachat import __version__, distributed
from llamachat.errors import HOURS_ARE_OVER, INTERRUPTED, LlamachatError, UsageError
from pipelines.cli import data, runs, talk
from pipelines.cli.export import export
from pipelines.cli.help import PROGRAM_EXAMPLES, GroupedCommands, examples, examples_of
from pipelines.cli.launch import (
    TINY,
    ConfigOption,
    Overrides,
    QuickEnd,
    SeveralValues,
    die_with_parent,
    divide,
    end_despite_threads,
    missing_processes,
    reported,
    start,
    state_is_kept,
)
from pipelines.recipe.commands import STEP_COMMANDS

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

app = typer.Typer(
    name="llamachat",
    cls=GroupedCommands,
    help="Turn a base Llama-2 model into a chat model by the recipe of the Llama 2 paper.",
    epilog=examples(*PROGRAM_EXAMPLES),
    no_args_is_help=True,
    context_settings={"max_content_width": 110},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    cls=GroupedCommands,
    help="Check data files and convert them to the native format.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Delete the step's result and run it again.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", help="Train only these models: helpfulness, safety, judge.", metavar="MODEL[,MODEL]"),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; run nothing.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without `arguments` this is the process of the command, and ends."""
    if arguments is not None:
        return _main(arguments)
    end = QuickEnd()
    _warn_of_another_clone()
    end.status = status = _main(None)
    end_despite_threads(status)
    return status


def _main(arguments: Sequence[str] | None) -> int:
    try:
        number, num_missing = distributed.launched_index(), missing_processes()
        distributed.forget_other_launchers()
    except LlamachatError as error:
        print(f"llamachat: {error}", file=sys.stderr)
        return error.exit_status
    # Every one of several processes must die with the launcher.
    if os.environ.get("LLAMACHAT_DIE_WITH_PARENT") == "1" or distributed.are_launched():
        die_with_parent()
    # Names and texts may contain characters that the terminal's encoding lacks; they are escaped, as stderr does it.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    level = logging.INFO if number == 0 else logging.ERROR  # the other processes would log the same
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for library in ("accelerate", "httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that are not used here
    # It warns that the tokenizer's special tokens replace those in the model's configuration, which is intended.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    # Deprecation warnings of libraries: a user of a command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    # Before torch is loaded: threads that spin while they wait make a command five times slower on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A GPU's allocator caches freed blocks by size, and the rest of a block is unusable: up to 31% of what a
    # QLoRA training allocates. Expandable segments lose almost nothing.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    signals = list[int]()

    def interrupt(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.default_int_handler(number, frame)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    for one in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(one) != signal.SIG_IGN:  # as for a background job of a script, and under nohup
            before[one] = signal.signal(one, interrupt)
    try:
        if num_missing:
            die_with_parent()
            return start(num_missing, argv)
        app(argv, prog_name="llamachat", obj=argv if arguments is None else None)
    except SystemExit as done:
        if isinstance(done.code, str):
            print(f"llamachat: {done.code}", file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        if not signals:
            raise
        # A library that is interrupted during its import or its own error handling raises an error of its own.
        print("\nllamachat: interrupted.", file=sys.stderr)
        return INTERRUPTED
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return 0


def _warn_of_another_clone() -> None:
    """Say which code runs where an environment that several clones share was installed from another one."""
    is_child = os.environ.get("LLAMACHAT_DIE_WITH_PARENT") == "1" or os.environ.get("RANK", "0") != "0"
    here = Path("pipelines/cli/main.py")
    if not is_child and distributed.OWN_LAUNCH not in os.environ and here.is_file() and not here.samefile(__file__):
        print(
            f"llamachat: this runs the code in {Path(__file__).resolve().parents[2]}, not that in the current folder."
            " `make` and `python -m pipelines` run the latter.",
            file=sys.stderr,
        )


def _run(
    command: str,
    config: Path,
    overrides: list[str] | None,
    *,
    overwrite: bool,
    dry_run: bool,
    only: Sequence[str] = (),
    own: Sequence[str] | None = None,
) -> None:
    """Run the steps of a command; with `own`, the arguments of this process, several processes may be started for
    it."""
    from llamachat.runs.artifacts import is_published
    from pipelines.execution.jobs import run_groups
    from pipelines.execution.run import lead, write_reports
    from pipelines.planning.side_by_side import processes, side_by_side
    from pipelines.recipe.recipe import choose_steps, is_study, load

    if is_study(config):
        _study(command, config, overrides or (), overwrite=overwrite, dry_run=dry_run, only=only)
        return
    recipe = load(config, overrides or ())
    chosen = choose_steps(recipe.steps, command, only)
    if dry_run:
        from llamachat.config.loading import to_yaml
        from pipelines.planning.plan import make_plan
        from pipelines.planning.text import plan_text

        print(to_yaml(recipe.sections))
        print(plan_text(recipe, make_plan(recipe, command, only)))
        return
    groups = side_by_side(recipe, chosen)
    if own is not None and (overwrite or not all(is_published(recipe.folder(step)) for step in chosen)):
        count = processes(recipe, groups)
        if count > 1:
            raise typer.Exit(divide(count, own))
    with state_is_kept():
        ran = lead(lambda: run_groups(recipe, groups, should_overwrite=overwrite))
    if ran is None:
        return
    tables = write_reports(recipe, chosen)
    if tables and command == "rm":  # after a whole recipe they would push the last lines off the screen
        print(tables)
    if ran.left:
        print(
            f"run.max_hours ({recipe.run.max_hours:g}) is used up. Not started: {', '.join(ran.left)}. The same command"
            " runs them, for as many hours again; without run.max_hours it runs to the end."
        )
        raise typer.Exit(HOURS_ARE_OVER)
    if ran.num_worked == 0:
        steps = f"all {len(ran.artifacts)} steps are" if len(ran.artifacts) != 1 else "the step is"
        print(f"nothing to do: {steps} done already ({recipe.run.dir})")
    for step in chosen:
        if step.stage.command == "report":
            print(f"The report: {recipe.folder(step).page}")
    print(_next_command(recipe, config, overrides or ()))


def _next_command(recipe: "Recipe", config: Path, overrides: Sequence[str]) -> str:
    """What to run next: the recipe's first unfinished step, or a chat with the result."""
    from llamachat.runs.artifacts import is_published

    unfinished = [step for step in recipe.steps if not is_published(recipe.folder(step))]
    if not unfinished:
        words = f'{quote(recipe.run.dir)} -m "Hello, who are you?"'.replace("$", "$$")
        return f"All steps are done. Try: make chat ARGS={quote(words)}"
    settings = [] if config == TINY else [f"CONFIG={quote(str(config))}"]
    if overrides:
        settings.append(f"ARGS={quote(join(overrides).replace('$', '$$'))}")  # make expands dollars
    return " ".join(["Next: make", unfinished[0].stage.command, *settings])


def _study(
    command: str, config: Path, overrides: Sequence[str], *, overwrite: bool, dry_run: bool, only: Sequence[str]
) -> None:
    from pipelines.execution.run import lead
    from pipelines.studies.definition import load_study
    from pipelines.studies.run import run_study, study_plan_text

    plan = load_study(config, overrides)
    if command not in ("all", plan.study.command) or only:
        raise UsageError(
            f"{config}: this is a study of '{plan.commands}'; its variants say what is run (variants.NAME.only), so that"
            f" its tables compare like with like. Run `llamachat all --config {quote(str(config))}` without --only,"
            " or pass the recipe that it extends."
        )
    if dry_run:
        print(study_plan_text(plan))
        return
    with state_is_kept():
        summary = lead(lambda: run_study(plan, should_overwrite=overwrite))
    if summary is not None:
        print(summary)


def _step_command(command: str, text: str, *, has_models: bool = False) -> Callable[..., None]:
    """The function behind a stage's command, with `--only` if the stage trains several models."""

    def run(
        context: typer.Context,
        overrides: Overrides = None,
        config: ConfigOption = TINY,
        overwrite: OverwriteOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        _run(command, config, overrides, overwrite=overwrite, dry_run=dry_run, own=context.obj)

    def run_models(
        context: typer.Context,
        overrides: Overrides = None,
        config: ConfigOption = TINY,
        only: OnlyOption = None,
        overwrite: OverwriteOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        models = [name.strip() for names in only or () for name in names.split(",")]
        _run(command, config, overrides, overwrite=overwrite, dry_run=dry_run, only=models, own=context.obj)

    function: Callable[..., None] = run_models if has_models else run
    function.__doc__ = text
    return reported(function)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"llamachat {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options of the program itself."""


@app.command(hidden=True)
@reported
def job() -> None:
    """Run one step for a command that runs steps in parallel (run.jobs); the step is described on standard input."""
    from pipelines.execution.jobs import run_job

    with state_is_kept():
        run_job(sys.stdin.read())


for _name, _command in STEP_COMMANDS.items():
    app.command(_name, epilog=examples_of(_name))(_step_command(_name, _command.help, has_models=bool(_command.models)))
app.command("all", epilog=examples_of("all"))(
    _step_command(
        "all",
        "Run all steps of the recipe in order, except those that are finished and unchanged. Also runs studies.",
    )
)
for _function in (runs.plan, runs.init, runs.doctor, talk.chat, talk.sample, talk.pairs, talk.score, talk.benchmark):
    _several = SeveralValues if _function in (runs.init, talk.pairs) else None
    app.command(cls=_several, epilog=examples_of(_function.__name__))(_function)
for _function in (export, runs.compare, runs.diagnose, data.tokens, runs.dashboard, runs.base, runs.pretrain):
    app.command(epilog=examples_of(_function.__name__))(_function)
for _function in (data.check, data.convert):
    data_app.command(epilog=examples_of(f"data {_function.__name__}"))(_function)
