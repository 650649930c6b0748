"""At most one running command per step: a POSIX record lock on `<step>/lock`, whose text names the holder.

The kernel releases the lock when its owner dies, so a killed command leaves nothing to clean up.
A record lock belongs to the process: a forked child or a service that it started does not hold it (as with flock), but
closing ANY descriptor of the file releases it, so a holder never opens its own lock file again. The file is never
unlinked while others may wait; if a reference replaces the whole folder, the lock is checked after it is acquired.
"""

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamachat.errors import BusyError
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.atomic import StorageError, make_folder, remove_leftovers, storage_errors

# A command that only looks (`plan`) holds the lock for microseconds; it must not block a command that wants to run.
_TRIES = 5
_PAUSE_S = 0.02

_holders: dict[Path, int] = {}
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class Owner:
    """The holder of a step, as written in the lock file."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def hold(folder: StepFolder) -> Iterator[None]:
    """Hold the step for the block, or raise BusyError at once; leftovers of killed holders are removed."""
    assert not folder.path.is_symlink(), f"{folder.path} is a reference: its files belong to another run"
    make_folder(folder.path)
    key = folder.lock.resolve()
    with _guard:
        if _is_held_here(key):
            raise BusyError(_busy_text(folder, _ourselves()))
        _holders[key] = os.getpid()
    descriptor = -1
    try:
        with storage_errors(folder.lock):
            descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _try_lock(descriptor, folder.lock):
            raise BusyError(_busy_text(folder, _read_owner(descriptor)))
        if not _is_still_the_lock(descriptor, folder):
            raise BusyError(
                f"{folder.path}: another command has just replaced this step by a reference. A lock on the old"
                " folder has no effect. Run the same command again."
            )
        _write_owner(descriptor, folder.lock)
        for place in (folder.path, folder.checkpoints, folder.figures):
            remove_leftovers(place)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        with _guard:
            _holders.pop(key, None)


def is_held_by_us(folder: StepFolder) -> bool:
    """Whether this process holds the step."""
    return _is_held_here(folder.lock.resolve())


def living_owner(folder: StepFolder) -> Owner | None:
    """The process that works on the step now, or None; for display, since it may change at any moment."""
    if is_held_by_us(folder):
        return _ourselves()
    try:
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return _read_owner(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _is_held_here(key: Path) -> bool:
    # A forked child inherits the table but not the lock, hence the process id.
    return _holders.get(key) == os.getpid()


def _try_lock(descriptor: int, path: Path) -> bool:
    for attempt in range(_TRIES):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise StorageError(
                    f"{path}: the file system does not support locks ({error.strerror}). Without a lock, two commands on one step would"
                    " destroy each other's files. Choose a local disk with run.dir=DIR."
                ) from error
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE_S)
        else:
            return True
    return False


def _is_still_the_lock(descriptor: int, folder: StepFolder) -> bool:
    """Whether the locked file is the one that the next command would open."""
    try:
        return not folder.path.is_symlink() and os.path.samestat(os.fstat(descriptor), folder.lock.stat())
    except FileNotFoundError:
        return False


def _ourselves() -> Owner:
    return Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"))


def _write_owner(descriptor: int, path: Path) -> None:
    owner = _ourselves()
    with storage_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner.pid}\n{owner.host}\n{owner.since}\n".encode(), 0)


def _read_owner(descriptor: int) -> Owner | None:
    lines = os.pread(descriptor, 4096, 0).decode(errors="replace").splitlines()
    if len(lines) != 3 or not lines[0].isdigit():
        return None  # the owner has the lock but has not written its name yet
    return Owner(int(lines[0]), lines[1], lines[2])


def _busy_text(folder: StepFolder, owner: Owner | None) -> str:
    who = str(owner) if owner else "another process"
    stop = f"stop it (`kill {owner.pid}` on {owner.host}; its state is kept)" if owner else "stop it"
    return (
        f"{folder.path}: {who} is working on this step. Two commands on one step would destroy each other's checkpoints."
        f" Wait for it to end, {stop}, or use another folder with run.dir=NEW."
    )
