"""The command `llamachat init`: its options, and what it refuses before it reads anything."""

from pathlib import Path
from typing import Annotated

import typer

from llamachat.config.gpus import parse_gpu
from llamachat.errors import UsageError
from pipelines.cli.exit_status import reported
from pipelines.cli.tools import GpuOption, HoursOption

Files = list[Path] | None


@reported
def init(
    base: Annotated[str, typer.Option("--base", help="Folder of the base, or its hub name.", metavar="DIR_OR_HUB")],
    sft: Annotated[list[Path], typer.Option("--sft", help="Dialogs, one file or several.", metavar="FILE...")],
    preferences: Annotated[
        Files, typer.Option("--preferences", help="Pairs of answers, the better one chosen.", metavar="FILE...")
    ] = None,
    safety: Annotated[Files, typer.Option("--safety", help="Pairs, the safer one chosen.", metavar="FILE...")] = None,
    prompts: Annotated[
        Files, typer.Option("--prompts", help="What to sample answers to; else your questions.", metavar="FILE...")
    ] = None,
    adversarial: Annotated[
        Files, typer.Option("--adversarial", help="Prompts that ask for something unsafe.", metavar="FILE...")
    ] = None,
    gpu: GpuOption = None,
    hours: HoursOption = None,
    out: Annotated[Path, typer.Option("--out", help="The recipe to write.", metavar="FILE")] = Path("recipe.yaml"),
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Folder of the run; else runs/ and the name of FILE.", metavar="DIR")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over FILE where it exists.")] = False,
) -> None:
    """Write a recipe for a base, your files and a card, from the preset that fits and within the hours."""
    from pipelines.planning.init import init as write_recipe

    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out: '{out}' ends otherwise. A recipe is YAML. End its name with .yaml.")
    if out.exists() and not overwrite:
        raise UsageError(
            f"--out: '{out}' exists already. Nothing is written over unasked. Name another, or add `--overwrite`."
        )
    try:
        parse_gpu(gpu or "24GiB")
    except ValueError as error:
        raise UsageError(f"--gpu: {error}") from error
    given = (("--sft", sft), ("--preferences", preferences), ("--safety", safety))
    given += (("--prompts", prompts), ("--adversarial", adversarial))
    files = {option: paths for option, paths in given if paths}
    print(write_recipe(base, files, gpu=gpu, hours=hours, out=out, run_dir=run_dir or f"runs/{out.stem}"))
