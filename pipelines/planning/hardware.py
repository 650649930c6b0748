"""This machine's GPUs, as the driver and torch see them, its memory, and its versions of Python and libraries.

`python -m pipelines.planning.hardware` checks an existing environment against the lower bounds of pyproject.toml.
Nothing is installed or changed: your own environment keeps its torch.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PYTHON_NEEDED = (3, 11)
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
TIMEOUT_S = 60
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*(?P<version>[0-9.]+)")
_QUERY = "name,memory.total,memory.free,driver_version"
_ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
card = [torch.cuda.get_device_capability(), torch.cuda.get_arch_list()] if there else [None, []]
print(json.dumps([torch.__version__, torch.version.cuda, *card]))
"""


@dataclass(frozen=True, slots=True)
class Device:
    """One card, as nvidia-smi describes it."""

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
    cuda: str | None  # the version that torch was built for
    capability: tuple[int, ...] | None  # of the card that torch can use
    oldest: tuple[int, int] | None = None  # oldest compute capability that it has kernels for; None if unknown


def _numbers(version: str) -> list[int]:
    """The numbers of the release, for comparing versions: 2.13.0+cpu is 2.13.0."""
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return [int(part) for part in release[0].split(".")] if release else []


def find_devices() -> list[Device]:
    """The cards that the driver shows; none without a driver."""
    text = _output(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"])
    devices = []
    for line in (text or "").splitlines():
        name, *sizes, driver = (part.strip() for part in line.split(","))
        try:
            total, free = (float(size) / 1024 for size in sizes)
        except ValueError:
            continue  # a card that shares the machine's memory has no memory size
        devices.append(Device(name, total, free, driver))
    return devices


def visible_cards() -> list[str]:
    """The cards that a command may use: those in CUDA_VISIBLE_DEVICES, or all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(len(find_devices()))]
    return [card.strip() for card in visible.split(",") if card.strip() not in ("", "-1")]


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def installed_bytes() -> int:
    """The machine's whole memory: the limit of a recipe without a card."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # MemTotal of /proc/meminfo on Linux


def find_torch() -> Torch | None:
    """What torch reports about itself, from a separate process; None if it is missing or cannot be imported."""
    text = _output([sys.executable, "-c", _ASK_TORCH])
    if not text:
        return None
    version, cuda, capability, kernels = json.loads(text.splitlines()[-1])
    # "sm_90", "sm_120a"; "compute_90" alone is compiled on the card, for it and newer ones.
    built = [divmod(int(digits), 10) for name in kernels for digits in re.findall("_([0-9]+)", name)]
    return Torch(version, cuda, tuple(capability) if capability else None, min(built, default=None))


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def requirements(pyproject: Path) -> dict[str, tuple[str, str | None]]:
    """Each required package with its lower bound and its installed version, None if it is not installed."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    bounds = {}
    for requirement in project["dependencies"]:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        assert match is not None, f"a requirement without a lower bound: {requirement}"
        try:
            installed = metadata.version(match["name"])
        except metadata.PackageNotFoundError:
            installed = None
        bounds[match["name"]] = match["version"], installed
    return bounds


def shortfalls(pyproject: Path) -> list[str]:
    """Each requirement that the running Python does not meet, as text."""
    return [
        f"{name} is {installed or 'not installed'}; {needed} or newer is needed"
        for name, (needed, installed) in requirements(pyproject).items()
        if installed is None or _numbers(installed) < _numbers(needed)
    ]


def main() -> int:
    """Return 0 if the environment can run everything; otherwise print what it lacks and return 2."""
    lacking = shortfalls(PYPROJECT)
    if not lacking:
        return 0
    print(f"The environment of {sys.executable} cannot run llamachat:", file=sys.stderr)
    for line in lacking:
        print(f"  {line}", file=sys.stderr)
    print("Install these packages there, or run make without VENV=, which sets up .venv by itself.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
