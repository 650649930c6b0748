"""Outputs of commands: no input is overwritten, and no file is replaced without `--overwrite`.

Steps of a recipe write into their own folders (`llamachat.runs.state`). All other outputs, files and folders, are
checked by `check_output` before any work is done; files are then written by `written_beside`.
"""

import gzip
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from llamachat.config.section import from_home
from llamachat.errors import UsageError
from llamachat.runs.atomic import incoming_file


def check_output(
    out: Path,
    inputs: Iterable[Path | str],
    *,
    option: str = "--out",
    overwrite: bool = False,
    marker: str | None = None,
) -> None:
    """Raise a `UsageError` if `out` is one of the inputs (by any link), is not a regular file, or exists without
    `overwrite`.

    With `marker` the output is a folder, and a file with this name shows that the same command wrote it: only such a
    folder, or an empty one, is replaced.
    """
    try:
        fault = _fault_of_input(out, [Path(from_home(str(path))) for path in inputs], is_folder=marker is not None)
        fault = fault or (_fault_of_file(out) if marker is None else _fault_of_folder(out, marker))
        if fault is None and os.path.lexists(out) and not overwrite and not _is_empty_folder(out):
            fault = (
                "already exists, and nothing is overwritten by default. Choose another output, or add `--overwrite`."
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fault = f"cannot be written ({reason}). This user must be able to write there. Choose another output."
    if fault is not None:
        raise UsageError(f"{option}: '{out}' {fault}")


def check_folder(out: Path, *, option: str = "--out") -> None:
    """Raise `UsageError` if the folder of an output does not exist."""
    if not out.parent.is_dir():
        raise UsageError(
            f"{option}: '{out}' cannot be written (No such file or directory). Create the folder, or choose another output."
        )


def _fault_of_input(out: Path, inputs: Iterable[Path], *, is_folder: bool) -> str | None:
    place = out.resolve()
    for path in inputs:
        read = path.resolve()
        if place == read or (out.exists() and path.exists() and out.samefile(path)):
            return "is an input of this command, and inputs are never overwritten. Choose another output."
        if not is_folder and out.exists() and read in place.parents:
            return f"belongs to the input '{path}', and inputs are never overwritten. Choose another output."
        if is_folder and out.exists() and place in read.parents:
            return f"contains the input '{path}', which would be deleted. Choose another folder."
    return None


def _fault_of_file(out: Path) -> str | None:
    if out.is_dir():
        return "is a folder, but the output is one file. Name a file in it."
    if out.exists() and not out.is_file():
        return "is not a regular file. The output is written next to it and renamed. Name a file."
    return None


def _fault_of_folder(out: Path, marker: str) -> str | None:
    place, here = out.resolve(), Path.cwd()
    if out.name in ("", "..") or place in (here, *here.parents):
        return (
            "is the working directory, a folder above it or without a name. The output is written next to it and renamed. "
            "Name a folder in it."
        )
    if os.path.ismount(out):
        return "cannot be replaced, since a disk is mounted there. Name a folder in it."
    if os.path.lexists(out) and not ((out / marker).is_file() or _is_empty_folder(out)):
        return "already exists and was not written by this command, so its content could be lost. Choose a new folder."
    return None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def written_beside(out: Path) -> Iterator[IO[bytes]]:
    """A stream whose content appears under the name `out` completely, and only if nothing was raised; gzip if `.gz`.

    If `out` is a symbolic link, its target is replaced.
    """
    place = out.resolve()
    with incoming_file(place) as side, side.open("wb") as raw:
        if place.suffix == ".gz":
            # No name and no time inside: equal records give equal files.
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        else:
            yield raw
