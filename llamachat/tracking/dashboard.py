"""`make dashboard`: the runs side by side, in wandb's terminal dashboard or, without a terminal, as plain tables."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from llamachat.errors import UsageError
from llamachat.runs.artifacts import StepFolder, is_published
from llamachat.runs.locks import living_owner
from llamachat.tables import plural
from llamachat.tracking.curves import terminal_curves

_WIDTH = 100


def dashboard(run_dir_parent: Path, *, is_terminal: bool | None = None) -> None:
    """Show every run below `run_dir_parent`; `is_terminal` None asks the standard streams."""
    steps = step_folders(run_dir_parent)
    if not steps:
        raise UsageError(
            f"{run_dir_parent}: no runs here. The dashboard shows what `make sft` and the other steps record."
            " Run one, or name another run with run.dir=DIR."
        )
    offline = run_dir_parent / "wandb"
    if is_terminal is None:
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not (is_terminal and _open_leet(offline)):
        print(summary_text(run_dir_parent, is_ascii=not _can_print_blocks()), end="")
    print(sync_hint(offline))


def step_folders(run_dir_parent: Path) -> list[StepFolder]:
    """Every step with figures, by run and name."""
    folders = {path.parent for pattern in ("*/*", "*/*/*") for path in run_dir_parent.glob(f"{pattern}/metrics.jsonl")}
    return [StepFolder(path) for path in sorted(folders)]


def summary_text(run_dir_parent: Path, *, is_ascii: bool = False) -> str:
    """A table with curves for each step of each run, readable at 100 columns."""
    parts = []
    for folder in step_folders(run_dir_parent):
        name = folder.path.relative_to(run_dir_parent).as_posix()
        parts.append(f"{name}  ({_condition(folder)})\n")
        parts.append(terminal_curves(folder.metrics, width=_WIDTH, is_ascii=is_ascii))
        if folder.curves.is_file():
            parts.append(f"  picture: {folder.curves}\n")
        parts.append("\n")
    return "".join(parts)


def sync_hint(offline: Path) -> str:
    """How to send the offline runs to a wandb account, with paths ready to copy."""
    runs = sorted(offline.glob("offline-run-*"))
    if not runs:
        return "No offline wandb runs here (tracking.mode is off or online)."
    return (
        f"{plural(len(runs), 'offline wandb run')} in {offline}."
        f" To send them to your account: wandb login, then wandb sync {offline}/offline-run-*"
    )


def _condition(folder: StepFolder) -> str:
    if folder.path.is_symlink():
        return f"reused from {folder.path.readlink()}"
    owner = living_owner(folder)
    if owner is not None:
        return f"running: {owner}"
    return "finished" if is_published(folder) else "not finished"


def _open_leet(offline: Path) -> bool:
    """Open wandb's dashboard; returns whether it opened and the user closed it."""
    if not any(offline.glob("offline-run-*")) or importlib.util.find_spec("wandb") is None:
        return False
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-m", "wandb", "leet", "run", str(offline)]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def _can_print_blocks() -> bool:
    try:
        "\u2581".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
