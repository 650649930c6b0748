"""The GPUs of this machine, as the driver and as torch see them; both are asked in processes of their own.

Neither needs to be there: without an answer in time there is nothing to tell.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 60
_QUERY = "name,memory.total,memory.free,driver_version"
_ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.get_device_capability() if there else None]))
"""


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


def find_torch() -> Torch | None:
    """What torch says of itself; None where it is missing or does not start."""
    text = _output([sys.executable, "-c", _ASK_TORCH])
    if not text:
        return None
    version, cuda, capability = json.loads(text.splitlines()[-1])
    return Torch(version, cuda, tuple(capability) if capability else None)


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
