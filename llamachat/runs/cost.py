"""What a step has cost so far: `cost.json` with seconds, peak memory and starts, over all the commands that worked on it.

Written as the work begins, every ten seconds and as it ends, so that a killed command loses no more than that. It is no
part of the artifact: the same step made twice costs something else. One thing surprises: a process's peak of resident
memory never falls by itself, so it is set back through /proc/self/clear_refs as a step begins. Where that cannot be done
(no Linux, or not allowed) the peak of a later step of one command is at least that of the steps before it.
"""

import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamachat.runs.atomic import StorageError, storage_errors, write_json
from llamachat.runs.folder import StepFolder

EVERY_S = 10.0

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # of proc(5): the peak of resident memory becomes the present size


@dataclass(frozen=True, slots=True)
class Cost:
    """What the work on one step has taken."""

    seconds: float = 0.0  # of wall time, of all starts
    peak_gib: float = 0.0  # most memory that one of them held: of the GPU where there is one, else resident
    starts: int = 0  # commands that worked on it


def read_cost(folder: StepFolder) -> Cost | None:
    """The cost as it was last written; None of a step that no command has worked on since it is counted."""
    if not folder.cost.is_file():
        return None
    with storage_errors(folder.cost):
        return Cost(**json.loads(folder.cost.read_text(encoding="utf-8")))


@contextmanager
def counted(folder: StepFolder) -> Iterator[None]:
    """Count the block as one more start of the step."""
    before, began = read_cost(folder) or Cost(), time.monotonic()
    reset_peak()
    ended = threading.Event()

    def write() -> None:
        now = Cost(
            seconds=round(before.seconds + time.monotonic() - began, 3),
            peak_gib=round(max(before.peak_gib, peak_memory()), 4),
            starts=before.starts + 1,
        )
        write_json(folder.cost, asdict(now))

    def refresh() -> None:
        while not ended.wait(EVERY_S):
            # A full disk is told by the work itself, which needs it more.
            with suppress(StorageError):
                write()

    write()
    watch = threading.Thread(target=refresh, name="cost", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()
        with suppress(StorageError):
            write()


def reset_peak() -> None:
    """Let the peak begin anew at what is held now, as far as the system lets us."""
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_memory() -> float:
    """Most memory that the process has held since `reset_peak`, in GiB: of the GPU where there is one, else resident."""
    torch = _torch_on_gpu()
    if torch is not None:
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError, ValueError, IndexError):
        return int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _torch_on_gpu() -> Any:
    """PyTorch where it holds a GPU already; nothing is loaded to ask."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
