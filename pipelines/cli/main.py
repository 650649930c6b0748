"""The `llamachat` command. Exit status: 0 done, 1 failed, 2 bad usage, configuration or data, 130 interrupted.

Only here is logging set up and are signals and the environment read. What a command needs is imported when it runs,
so that `--help` and refusals come at once.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llamachat import distributed
from llamachat.errors import LlamachatError, UsageError
from pipelines.cli import tools
from pipelines.cli.exit_status import INTERRUPTED, reported, state_is_kept
from pipelines.cli.export import export
from pipelines.cli.init import init
from pipelines.cli.launch import die_with_parent, missing_processes, start
from pipelines.cli.pairs import pairs
from pipelines.cli.several import SeveralValues
from pipelines.cli.tools import TINY, ConfigOption, Overrides

app = typer.Typer(
    name="llamachat",
    help="A base Llama-2 model becomes a chat model by the recipe of the Llama 2 paper.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    help="Look at data files, bring them into our form.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Throw the step's present result away, run it anew.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", help="These models alone: helpfulness, safety, judge.", metavar="MODEL[,MODEL]"),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan, run nothing.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # One of several processes must not outlive the launcher either.
    if os.environ.get("LLAMACHAT_DIE_WITH_PARENT") == "1" or distributed.are_launched():
        die_with_parent()
    level = logging.INFO if distributed.launched_index() == 0 else logging.ERROR  # the others find the same to say
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
    # Libraries tell each other what they will rename; nobody who runs a command can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    # Before torch is loaded: threads that wait by spinning make a command five times slower where others use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        asked = missing_processes()
    except LlamachatError as error:
        print(f"llamachat: {error}", file=sys.stderr)
        return error.exit_status
    if asked:
        die_with_parent()
        return start(asked, given)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(given, prog_name="llamachat")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run(
    command: str,
    config: Path,
    overrides: list[str] | None,
    *,
    overwrite: bool,
    dry_run: bool,
    only: Sequence[str] = (),
) -> None:
    from llamachat.config.loading import to_yaml
    from pipelines.execution.run import lead, run_chosen, write_reports
    from pipelines.planning.plan import make_plan
    from pipelines.planning.text import plan_text
    from pipelines.recipe.recipe import choose_steps, load
    from pipelines.studies.definition import is_study

    if is_study(config):
        _study(command, config, overrides or (), overwrite=overwrite, dry_run=dry_run, only=only)
        return
    recipe = load(config, overrides or ())
    if dry_run:
        print(to_yaml(recipe.sections))
        print(plan_text(recipe, make_plan(recipe, command, only)))
        return
    chosen = choose_steps(recipe.steps, command, only)
    with state_is_kept():
        ran = lead(lambda: run_chosen(recipe, chosen, should_overwrite=overwrite))
    if ran is None:
        return
    tables = write_reports(recipe, chosen)
    if tables and command == "rm":  # after a whole recipe they would push its end off the screen
        print(tables)
    if ran.left:
        print(
            f"run.max_hours ({recipe.run.max_hours:g}) are over. Not begun yet: {', '.join(ran.left)}. The same command goes"
            " on with them for as many hours again, and without run.max_hours to the end."
        )
    elif ran.num_worked == 0:
        steps = f"all {len(ran.artifacts)} steps are" if len(ran.artifacts) != 1 else "the step is"
        print(f"nothing to do: {steps} done already ({recipe.run.dir})")
    elif command == "all":
        pages = [recipe.folder(step).page for step in chosen if step.stage.command == "report"]
        for page in pages:
            print(f"The report: {page}")
        print(f"All steps are done. Try: llamachat chat {recipe.run.dir} -m 'Hello, who are you?'")


def _study(
    command: str, config: Path, overrides: Sequence[str], *, overwrite: bool, dry_run: bool, only: Sequence[str]
) -> None:
    from pipelines.execution.run import lead
    from pipelines.studies.definition import load_study
    from pipelines.studies.run import run_study, study_plan_text

    plan = load_study(config, overrides)
    if command not in ("all", plan.study.command) or only:
        raise UsageError(
            f"{config}: is a study of '{plan.commands}', whose variants say what is run (variants.NAME.only), so that"
            f" its tables compare like with like. Run `llamachat all --config {config}` without --only,"
            " or give the recipe that it extends."
        )
    if dry_run:
        print(study_plan_text(plan))
        return
    with state_is_kept():
        told = lead(lambda: run_study(plan, should_overwrite=overwrite))
    if told is not None:
        print(told)


@app.command()
@reported
def sft(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Supervised fine-tuning: a base learns to answer from dialogs (paper, section 3.1)."""
    _run("sft", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command()
@reported
def rm(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    only: OnlyOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Reward models: the chat policy learns which of two answers people prefer (3.2.2). Also runs a study."""
    models = [name.strip() for names in only or () for name in names.split(",")]
    _run("rm", config, overrides, overwrite=overwrite, dry_run=dry_run, only=models)


@app.command()
@reported
def rs(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Rejection sampling: the best of K answers to each prompt are learnt, with earlier rounds' (3.2.3)."""
    _run("rs", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command(name="gatt")
@reported
def ghost_attention(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Ghost Attention: the policy learns to keep an instruction of the first turn to the end (3.3)."""
    _run("gatt", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command()
@reported
def distill(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Context distillation: safer answers, sampled under a preprompt, are learnt without it (4.2.4)."""
    _run("distill", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command()
@reported
def ppo(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Proximal policy optimisation: the policy learns to answer as the reward models like it (3.2.3)."""
    _run("ppo", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command(name="eval")
@reported
def evaluate(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Evaluation: every finished policy of the run on the same held-out prompts (3.4 and 4.4)."""
    _run("eval", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command()
@reported
def report(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """One page that tells of the whole run, or of as much of it as is finished: HTML, and the same as Markdown."""
    _run("report", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command(name="all")
@reported
def all_steps(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Run the recipe's steps in order; finished, unchanged ones are not run again. Also runs any study."""
    _run("all", config, overrides, overwrite=overwrite, dry_run=dry_run)


@app.command()
@reported
def plan(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    gpu: tools.GpuOption = None,
    hours: tools.HoursOption = None,
    presets: tools.PresetsOption = False,
) -> None:
    """Say what would run, from which inputs and why, with memory and time; runs nothing."""
    from pipelines.planning.plan import make_plan
    from pipelines.planning.text import plan_text
    from pipelines.recipe.recipe import load
    from pipelines.studies.definition import is_study, load_study
    from pipelines.studies.run import study_plan_text

    if presets:
        from pipelines.planning.text import presets_text

        print(presets_text(gpu=gpu))
        return
    if hours is not None and is_study(config):
        raise UsageError(
            f"--hours: {hours:g}, but {config} is a study, whose runs the plan sums without holding them to hours. Give the"
            " recipe that it extends, or leave --hours out."
        )
    given = [*(overrides or ()), *([f"run.gpu={gpu}"] if gpu else ())]
    if is_study(config):
        print(study_plan_text(load_study(config, given)))
        return
    recipe = load(config, given)
    print(plan_text(recipe, make_plan(recipe), hours=hours))


app.command(cls=SeveralValues)(init)
app.command()(tools.doctor)
app.command()(tools.chat)
app.command()(tools.sample)
app.command(cls=SeveralValues)(pairs)
app.command()(tools.score)
app.command()(export)
app.command()(tools.compare)
app.command()(tools.tokens)
app.command()(tools.dashboard)
app.command()(tools.pretrain)
data_app.command(name="check")(tools.check)
data_app.command(name="convert")(tools.convert)
