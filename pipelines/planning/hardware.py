"""The GPUs of this machine, as the driver and as torch see them, and its memory; both are asked in processes of their own.

Neither needs to be there: without an answer in time there is nothing to tell.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 60
_QUERY = "name,memory.total,memory.free,driver_version"
_ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
found = [torch.cuda.get_device_capability(), torch.cuda.get_arch_list()] if there else [None, []]
print(json.dumps([torch.__version__, torch.version.cuda, *found]))
"""
# The oldest Linux driver that runs programs of each CUDA, by its major version: NVIDIA's release notes, "CUDA Toolkit and
# Minimum Required Driver Version for CUDA Minor Version Compatibility".
_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True, slots=True)
class Device:
    """One card, as nvidia-smi tells it."""

    name: str
    total_gib: float
    free_gib: float
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.total_gib:.1f} GiB, {self.free_gib:.1f} free, driver {self.driver}"


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch."""

    version: str
    cuda: str | None  # that it was built for
    capability: tuple[int, ...] | None  # of the card that it can use
    oldest: tuple[int, int] | None = None  # compute capability that it has kernels for; None where it does not say

    @property
    def driver(self) -> str | None:
        """The oldest driver that its CUDA runs with; None of a CUDA that is not known here."""
        return _DRIVERS.get(int(self.cuda.partition(".")[0])) if self.cuda else None


def is_older(version: str, than: str) -> bool:
    """Whether a driver's version comes before another."""
    return _numbers(version) < _numbers(than)


def newest_cuda(driver: str) -> int | None:
    """The major version of the newest CUDA that a driver runs; None where none of those known here."""
    return max((cuda for cuda, least in _DRIVERS.items() if not is_older(driver, least)), default=None)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall("[0-9]+", version)]


def find_devices() -> list[Device]:
    """The cards that the driver shows; none where there is no driver."""
    text = _output(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"])
    devices = []
    for line in (text or "").splitlines():
        name, *sizes, driver = (part.strip() for part in line.split(","))
        try:
            total, free = (float(size) / 1024 for size in sizes)
        except ValueError:
            continue  # a card that shares the machine's memory tells no size
        devices.append(Device(name, total, free, driver))
    return devices


def installed_bytes() -> int:
    """The machine's own memory, all of it: what a recipe without a card has to live in."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # MemTotal of /proc/meminfo on Linux


def find_torch() -> Torch | None:
    """What torch says of itself; None where it is missing or does not start."""
    text = _output([sys.executable, "-c", _ASK_TORCH])
    if not text:
        return None
    version, cuda, capability, kernels = json.loads(text.splitlines()[-1])
    # "sm_90", "sm_120a"; what is only "compute_90" is compiled on the card, for it and newer ones.
    built = [divmod(int(digits), 10) for name in kernels for digits in re.findall("_([0-9]+)", name)]
    return Torch(version, cuda, tuple(capability) if capability else None, min(built, default=None))


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
