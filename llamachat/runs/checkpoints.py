"""Checkpoints of one step: `checkpoints/step-00000050/`, each complete or absent; the newest two are kept.

A checkpoint is written in a side folder and finally renamed. Its `checkpoint.json` lists files, sizes and digests. A
checkpoint whose sizes differ (an interrupted rsync, for example) is always skipped, and the one before it is used. The
digests are compared once, when a command starts (`pass_over_damaged`), since that reads every byte. A checkpoint of an
earlier version has no digests; only its sizes are checked. Each checkpoint also holds the step's `identity.json` and
`metrics.jsonl`, from which lost originals are restored.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llamachat.runs.atomic import flush, incoming_folder, remove_tree, storage_errors, write_json

MARKER = "checkpoint.json"
DAMAGED = "damaged.json"  # marks a checkpoint to skip; the next save removes it
KEPT_TOO = ("identity.json", "metrics.jsonl")  # of the step's folder
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = (
    16 << 20
)  # several blocks are hashed in parallel, whatever the size of the files: a 7B checkpoint of 80 GiB takes a minute


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint after `step` optimizer steps, stored in `path`."""

    step: int
    path: Path


@contextmanager
def writing(checkpoints: Path, step: int, *, keep: int = 2) -> Iterator[Path]:
    """A side folder to save into; when the block succeeds it becomes the checkpoint of `step`, and old ones are
    deleted."""
    assert step >= 0 and keep >= 1
    with incoming_folder(checkpoints / f"step-{step:08d}") as side:
        yield side
        for beside in (checkpoints.parent / name for name in KEPT_TOO):
            if beside.is_file():
                shutil.copyfile(beside, side / beside.name)
        sizes = _sizes(side)
        digests = {name: _digest(side / name) for name in sizes}
        write_json(side / MARKER, {"step": step, "files": sizes, "digests": digests})
    _prune(checkpoints, keep)


def newest(checkpoints: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps, or None."""
    return next((checkpoint for checkpoint in _candidates(checkpoints) if not _fault(checkpoint)), None)


def pass_over_damaged(checkpoints: Path) -> dict[Path, str]:
    """Mark damaged checkpoints, from the newest to the first intact one, and return what is wrong
    with each. Only for the holder of the step's lock, before any of them is read."""
    faults: dict[Path, str] = {}
    for checkpoint in _candidates(checkpoints):
        fault = _fault(checkpoint) or _changed(checkpoint)
        if not fault:
            break
        faults[checkpoint.path] = fault
        with storage_errors(checkpoint.path):
            if (checkpoint.path / MARKER).is_file():
                (checkpoint.path / MARKER).replace(checkpoint.path / DAMAGED)
                flush(checkpoint.path)
    return faults


def _candidates(checkpoints: Path) -> list[Checkpoint]:
    """Everything named like a checkpoint, most steps first."""
    if not checkpoints.is_dir():
        return []
    with storage_errors(checkpoints):
        matches = [(_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    candidates = [Checkpoint(int(match[1]), path) for match, path in matches if match]
    return sorted(candidates, key=lambda checkpoint: checkpoint.step, reverse=True)


def _fault(checkpoint: Checkpoint) -> str:
    """Why a checkpoint is incomplete, by names and sizes; empty if it is complete."""
    if (checkpoint.path / DAMAGED).is_file():
        return "it was found damaged before"
    try:
        marker, sizes = _marker(checkpoint), _sizes(checkpoint.path)
        files: dict[str, int] = marker["files"]
        wrong = sorted(name for name in files.keys() | sizes.keys() if files.get(name) != sizes.get(name))
        if marker["step"] != checkpoint.step:
            return f"its {MARKER} belongs to step {marker['step']}"
        if "digests" in marker and marker["digests"].keys() != files.keys():
            return f"its {MARKER} lacks the digest of a file"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MARKER} cannot be read ({type(error).__name__})"
    return "".join(f"{name} has {sizes.get(name, 0)} bytes of {files.get(name, 0)}" for name in wrong[:1])


def _changed(checkpoint: Checkpoint) -> str:
    """The first file whose content changed since it was saved; empty if there is none."""
    for name, digest in _marker(checkpoint).get("digests", {}).items():
        try:
            if _digest(checkpoint.path / name) != digest:
                return f"{name} has changed since it was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _marker(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _digest(path: Path) -> str:
    """SHA-256 of the SHA-256 of each block."""

    def block(start: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(start)
            return sha256(stream.read(_BLOCK)).digest()

    starts = range(0, path.stat().st_size, _BLOCK)
    if len(starts) < 2:
        return sha256(block(0)).hexdigest()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return sha256(b"".join(pool.map(block, starts))).hexdigest()


def _prune(checkpoints: Path, keep: int) -> None:
    candidates = _candidates(checkpoints)
    kept = [checkpoint.path for checkpoint in candidates if not _fault(checkpoint)][:keep]
    with storage_errors(checkpoints):
        for checkpoint in candidates:
            if checkpoint.path not in kept:
                remove_tree(checkpoint.path)
