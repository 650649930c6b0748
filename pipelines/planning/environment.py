"""`python -m pipelines.planning.environment`: whether an existing environment meets the lower bounds of pyproject.toml.

Nothing is installed or changed: whoever brings an environment keeps the torch that is in it.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PYTHON_NEEDED = (3, 11)
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*(?P<version>[0-9.]+)")


def requirements(pyproject: Path) -> dict[str, str | None]:
    """Each required package with its installed version, None where it is not installed."""
    return {name: _installed(name) for name in _lower_bounds(pyproject)}


def shortfalls(pyproject: Path) -> list[str]:
    """Each requirement that the running Python does not meet, in words."""
    found = []
    for name, needed in _lower_bounds(pyproject).items():
        installed = _installed(name)
        if installed is None:
            found.append(f"{name} is not installed; {needed} or newer is needed")
        elif _numbers(installed) < _numbers(needed):
            found.append(f"{name} is {installed}; {needed} or newer is needed")
    return found


def _lower_bounds(pyproject: Path) -> dict[str, str]:
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    bounds = {}
    for requirement in project["dependencies"]:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        assert match is not None, f"a requirement without a lower bound: {requirement}"
        bounds[match["name"]] = match["version"]
    return bounds


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version: 2.13.0+cpu -> (2, 13, 0)."""
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def main() -> int:
    """0 when the environment can run everything, else 2 after saying what it lacks."""
    lacking = shortfalls(Path(__file__).resolve().parents[2] / "pyproject.toml")
    if not lacking:
        return 0
    print(f"The environment of {sys.executable} cannot run llamachat:", file=sys.stderr)
    for line in lacking:
        print(f"  {line}", file=sys.stderr)
    print("Install these there, or run make without VENV=, which sets up .venv by itself.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
