"""Files and folders that appear completely or not at all: written to a side path, flushed to the disk, renamed into
place.

A rename survives a power failure only if the files, their folder and the parent folder of the new name are flushed
too, so every path here ends with a flush of the parent. If several processes work on a
step together, only the first one writes.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.errors import LlamachatError

# A side file or folder that a killed command leaves behind; the holder of the step's lock may delete it.
INCOMING = ".incoming-"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY}
_KNOWN = _FULL | _DENIED | _IN_THE_WAY
_KNOWN |= {
    getattr(errno, name)
    for name in ["EIO", "EBUSY", "ESTALE", "ENAMETOOLONG", "EMFILE", "ENFILE", "ELOOP", "ENOMEM", "ENXIO", "ETXTBSY"]
}
# torch and safetensors report errors of the operating system as their own exceptions, with these texts.
_RUST_CODE = re.compile(r"\bos error (\d+)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos|iostream error")
_NO_MEMORY = re.compile(r"bad_alloc|[Cc]an(no|')t allocate memory|alloc_cpu\.cpp")


class StorageError(LlamachatError):
    """A file cannot be written or read: full disk, missing permission, broken device."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise a `StorageError`, with the cause and the fix, for an operating-system error below `path`.

    torch and safetensors report such errors in their own exception types; these are recognised too.
    """
    try:
        yield
    except LlamachatError:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None or refusal.errno not in _KNOWN:
            raise
        where = Path(os.fsdecode(refusal.filename)) if isinstance(refusal.filename, str | bytes) else path
        raise StorageError(_explain(where, refusal)) from error


def _refusal(error: BaseException | None) -> OSError | None:
    """The operating-system error in an exception or in its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        text = str(error)
        code = _RUST_CODE.search(text)
        if code:
            return OSError(int(code[1]), os.strerror(int(code[1])))
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if _TORCH_WRITER.search(text) and not isinstance(error.__context__, OSError):
            return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, or a quota or a limit on the size of files")
        error = error.__cause__ or (error.__context__ if _TORCH_WRITER.search(text) else None)
    return None


def _explain(path: Path, refusal: OSError) -> str:
    code, words = refusal.errno, refusal.strerror or str(refusal)
    again = "then run the same command again"
    if code in _FULL:
        need = "There is no space for the file; everything saved before is intact."
        fix = f"Free space or choose another disk with run.dir=DIR (for one file, its --out), {again}."
    elif code in _DENIED:
        need = "The command reads or writes this path."
        fix = "Give this user access, or choose another path (for a run, run.dir=DIR)."
    elif code in _IN_THE_WAY and path.is_symlink() and not path.exists():
        need = f"It is a link to {path.readlink()}, which does not exist (a disk that is not mounted?)."
        fix = "Restore it, or choose another folder with run.dir=DIR."
    elif code in _IN_THE_WAY:
        need = "The run needs its own folder there."
        fix = "Move the existing file or folder away, or choose another folder with run.dir=DIR."
    elif code == errno.ENAMETOOLONG:
        need, fix = "The file system does not allow a name of this length.", "Choose a shorter one."
    elif code == errno.ENOMEM:
        need = "The machine has too little memory to read or write the file; everything saved before is intact."
        fix = f"Stop other programs, or use a machine with more memory, {again}."
    else:
        need = "Everything saved before is intact."
        fix = f"Check the disk, or choose another path (for a run, run.dir=DIR), {again}."
    return f"{path}: {words}. {need} {fix}"


def make_folder(path: Path) -> None:
    """Create `path` and its parents."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`: a reader sees the old content or the new, never a mixture."""
    if not distributed.is_first():
        return
    with incoming_file(path) as side, side.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` by `value` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
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
def incoming_file(path: Path) -> Iterator[Path]:
    """A side file that becomes `path` when the block succeeds, and is removed when it raises."""
    # Two commands on two steps of one run may write its index at once: each has its own side file.
    # The name is shortened: it must fit into 255 bytes.
    side = path.with_name(f"{INCOMING}{os.getpid()}-{path.name[:32]}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield side
            flush(side)
            side.replace(path)
        except BaseException:
            side.unlink(missing_ok=True)
            raise
        flush(path.parent)


@contextmanager
def incoming_folder(final: Path) -> Iterator[Path]:
    """A side folder that becomes `final` when the block succeeds, and is removed when it raises.

    An existing `final` is replaced; between the two renames it is absent, never incomplete.
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
    """Delete a folder so that a reader never sees part of it under its name: it is renamed first."""
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
