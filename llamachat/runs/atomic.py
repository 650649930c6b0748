"""Files and folders that appear whole or not at all: written beside, flushed to the disk, renamed into place.

One thing surprises: a rename is only safe against a power cut when the files, their folder and the folder that holds
the new name are flushed too, so every path here ends with a flush of the parent. Of several processes that work on a
step together the first one alone writes.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.errors import LlamachatError

# A side file or folder that a killed command leaves behind; whoever holds the step's lock may delete it.
INCOMING = ".incoming-"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY}
_BROKEN = {errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ELOOP}
# torch and safetensors report a full disk in their own exception types, with these words.
_FULL_WORDS = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")


class StorageError(LlamachatError):
    """A file of the run cannot be written or read: full disk, missing permission, broken device."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal below `path` into a sentence with a way out."""
    try:
        yield
    except LlamachatError:
        raise
    except OSError as error:
        if error.errno not in _FULL | _DENIED | _IN_THE_WAY | _BROKEN:
            raise
        where = Path(error.filename) if isinstance(error.filename, str) else path
        raise StorageError(_explain(where, error.errno, error.strerror or str(error))) from error
    except Exception as error:
        if any(word in str(error) for word in _FULL_WORDS):
            raise StorageError(_explain(path, errno.ENOSPC, "No space left on device")) from error
        raise


def _explain(path: Path, code: int | None, words: str) -> str:
    if code in _FULL:
        need = "The run needs room for its checkpoints; what was saved before is whole."
        mend = "Free space or choose another disk with run.dir=DIR, then give the same command again."
    elif code in _DENIED:
        need = "The run writes its state there."
        mend = "Make the folder writable for this user, or choose another with run.dir=DIR."
    elif code in _IN_THE_WAY:
        need = "The run needs a folder of its own there."
        mend = "Move what lies there out of the way, or choose another folder with run.dir=DIR."
    else:
        need = "The run keeps its state there; what was saved before is whole."
        mend = "Look after the disk, or choose another folder with run.dir=DIR, then give the same command again."
    return f"{path}: {words}. {need} {mend}"


def make_folder(path: Path) -> None:
    """Create `path` and its parents."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old content or the new, never a mixture."""
    if not distributed.is_first():
        return
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two commands on two steps of one run may write its index at once: each has its own side file.
        side = path.with_name(f"{INCOMING}{os.getpid()}-{path.name}")
        with side.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        side.replace(path)
        flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Flush one file, or the names inside one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Flush every file and folder below `path`, and `path` itself."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                flush(file)
        flush(Path(folder))


@contextmanager
def incoming_folder(final: Path) -> Iterator[Path]:
    """A side folder that becomes `final` when the block ends well, and is removed when it raises.

    `final` is replaced if it is there; between the two renames of a replacement it is absent, never half.
    """
    side = final.with_name(f"{INCOMING}{final.name}")
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(side)
        side.mkdir()
        try:
            yield side
            flush_tree(side)
            remove_tree(final)
            side.rename(final)
        except BaseException:
            shutil.rmtree(side, ignore_errors=True)
            raise
        flush(final.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder so that a reader never finds part of it under its name: renamed away first."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path
    if not path.name.startswith(INCOMING):
        doomed = path.with_name(f"{INCOMING}removed-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete the side files and folders that killed commands left in `folder`; only for the holder of the lock."""
    if not folder.is_dir():
        return
    with storage_errors(folder):
        for path in folder.glob(f"{INCOMING}*"):
            remove_tree(path)


def remove_dead_side_files(folder: Path) -> None:
    """Delete the side files of `write_text` whose process is gone, in a folder that no lock guards."""
    for path in folder.glob(f"{INCOMING}*-*"):
        pid = path.name.removeprefix(INCOMING).partition("-")[0]
        if pid.isdigit() and path.is_file() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
