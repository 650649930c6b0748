"""Checkpoints of one step: `checkpoints/step-00000050/`, each whole or absent, the newest two kept.

A checkpoint is written in a side folder and renamed last. Its `checkpoint.json` lists files and sizes, so that a copy
broken off by other hands (rsync, a full disk elsewhere) is passed over for the one before it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.runs.atomic import incoming_folder, remove_tree, storage_errors, write_json

MARKER = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: `step` optimizer steps are done, their state lies in `path`."""

    step: int
    path: Path


@contextmanager
def writing(checkpoints: Path, step: int, *, keep: int = 2) -> Iterator[Path]:
    """A side folder to save into; when the block ends well it is the checkpoint of `step`, and older ones go."""
    assert step >= 0 and keep >= 1
    with incoming_folder(checkpoints / f"step-{step:08d}") as side:
        yield side
        write_json(side / MARKER, {"step": step, "files": _sizes(side)})
    _prune(checkpoints, keep)


def newest(checkpoints: Path) -> Checkpoint | None:
    """The whole checkpoint with the most steps, or None."""
    return next((found for found in _candidates(checkpoints) if _is_whole(found)), None)


def _candidates(checkpoints: Path) -> list[Checkpoint]:
    """Everything named like a checkpoint, most steps first."""
    if not checkpoints.is_dir():
        return []
    with storage_errors(checkpoints):
        matches = [(_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    found = [Checkpoint(int(match[1]), path) for match, path in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        marker: Any = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))
        files: dict[str, int] = marker["files"]
        return marker["step"] == checkpoint.step and files == _sizes(checkpoint.path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _prune(checkpoints: Path, keep: int) -> None:
    found = _candidates(checkpoints)
    kept = [checkpoint.path for checkpoint in found if _is_whole(checkpoint)][:keep]
    with storage_errors(checkpoints):
        for checkpoint in found:
            if checkpoint.path not in kept:
                remove_tree(checkpoint.path)
