"""`llamachat init`: a recipe for a base, data files and a card, every value with its reason, ending within the hours.

Reads the files and the base's config.json; no weights, no network where the base is here or known. Imports neither
torch nor trl. What it writes loads, fits by the plan's own estimate, and gives every step steps enough.
"""

from pathlib import Path
from typing import Annotated

import typer

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.errors import UsageError
from pipelines.cli.exit_status import reported
from pipelines.cli.tools import GpuOption

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
    hours: Annotated[
        float | None, typer.Option("--hours", help="The whole recipe ends within so many, by estimate.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The recipe to write.", metavar="FILE")] = Path("recipe.yaml"),
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Folder of the run; else runs/ and the name of FILE.", metavar="DIR")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over FILE where it exists.")] = False,
) -> None:
    """Write a recipe for a base, your files and a card: what fits, ends within the hours, and why each value."""
    _check_out(out, overwrite)
    if hours is not None and hours <= 0:
        raise UsageError(
            f"--hours: {hours:g} is no time to train in. Hours above 0 are needed. Leave it out for no limit."
        )
    card = _card(gpu)
    given = {
        "--sft": sft,
        "--preferences": preferences,
        "--safety": safety,
        "--prompts": prompts,
        "--adversarial": adversarial,
    }
    from pipelines.planning.init_fitting import make
    from pipelines.planning.init_text import recipe_text, told, write_recipe

    files = {option: paths for option, paths in given.items() if paths}
    made = make(base, files, card=card, gpu=gpu or "", hours=hours, run_dir=run_dir or f"runs/{out.stem}")
    write_recipe(out, recipe_text(made))
    print(told(made, out))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out: '{out}' ends otherwise. A recipe is YAML. End its name with .yaml.")
    if out.is_dir():
        raise UsageError(f"--out: '{out}' is a folder. A recipe is one file. Name a file in it.")
    if out.exists() and not overwrite:
        raise UsageError(
            f"--out: '{out}' exists already. Nothing is written over unasked. Name another, or add `--overwrite`."
        )


def _card(gpu: str | None) -> Gpu | None:
    if not gpu:
        return None
    try:
        return parse_gpu(gpu)
    except ValueError as error:
        raise UsageError(f"--gpu: {error}") from error
