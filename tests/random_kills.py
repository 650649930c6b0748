"""A recipe under kills at random moments: it must end with the bytes and figures of a run that nobody killed.

    python -m tests.random_kills --kills 10 --seed 0 configs/smoke.yaml

runs `all` once to its end, then again under SIGKILLs to its process group, and compares every artifact byte for byte and
every summary.json, all but times, memory and throughput. The moments are uniform over the time of the whole run; each start
also gets a part of the time that a start takes, so that kills fall into loading as well as into work. Both runs lie under
the same path, one after the other, since manifests name the folders that they were made from.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.runs.artifacts import MANIFEST

ROOT = Path(__file__).resolve().parents[1]
VOLATILE = ("time", "throughput/", "memory/", "report/kib")  # figures that the clock and the machine put in
PAGES = {"report.html", "report.md"}  # tell times and memory: that they are there is compared
NOT_COMPARED = {"created", "git_commit", "git_is_edited"}  # of a manifest
ASIDE = {"checkpoints", "tuned", "figures"}
POLL_S = 0.05


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    seconds: float
    start_s: float  # until its first figures


@dataclass(frozen=True)
class Difference:
    place: str
    what: str


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where both runs are the same, 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_kills", description="A recipe under random kills.")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="how often the second run is killed (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; a temporary folder without it")
    parser.add_argument("recipe", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        differences = compare_runs(given.folder or Path(scratch), given)
    print(table(differences))
    return 1 if differences else 0


def compare_runs(folder: Path, given: argparse.Namespace) -> list[Difference]:
    """Both runs, and what differs."""
    run, kept = folder / "run", folder / "whole"
    folder.mkdir(parents=True, exist_ok=True)
    whole = run_whole(run, given, folder / "whole.log")
    run.rename(kept)
    print(f"uninterrupted: {whole.seconds:.1f} s, its first figures after {whole.start_s:.1f} s", flush=True)
    run_killed(run, given, whole, folder / "killed.log")
    return differences_of(kept, run)


def command(run: Path, given: argparse.Namespace) -> list[str]:
    recipe = ["--config", str(given.recipe), f"run.dir={run}", *given.overrides]
    return [sys.executable, "-m", "pipelines", "all", *recipe]


def start(run: Path, given: argparse.Namespace, log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command(run, given), cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )


def run_whole(run: Path, given: argparse.Namespace, log: Path) -> Whole:
    began, first = time.monotonic(), None
    process = start(run, given, log)
    while process.poll() is None:
        if first is None and any(run.rglob("metrics.jsonl")):
            first = time.monotonic() - began
        time.sleep(POLL_S)
    must_have_ended_well(process.returncode, log)
    return Whole(time.monotonic() - began, first or 0.0)


def run_killed(run: Path, given: argparse.Namespace, whole: Whole, log: Path) -> None:
    """The run under kills, and then to its end."""
    rng = random.Random(given.seed)
    moments = sorted(rng.uniform(0, whole.seconds) for _ in range(given.kills))
    waits = [
        now - before + rng.uniform(0, whole.start_s) for before, now in zip([0.0, *moments], moments, strict=False)
    ]
    print(f"seed {given.seed}: kills after {', '.join(f'{wait:.2f}' for wait in waits)} s of each start", flush=True)
    for number, wait in enumerate(waits, start=1):
        process = start(run, given, log)
        try:
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"kill {number}: {where(run)}", flush=True)
        else:
            must_have_ended_well(status, log)
            print(f"ended by itself before kill {number}", flush=True)
            return
    must_have_ended_well(start(run, given, log).wait(), log)


def where(run: Path) -> str:
    """How far a killed run is."""
    begun = sorted(path.parent for path in run.rglob("identity.json") if not ASIDE & {*path.relative_to(run).parts})
    done = [folder for folder in begun if (folder / "artifact" / MANIFEST).is_file()]
    open_ones = [folder.relative_to(run).as_posix() for folder in begun if folder not in done]
    return f"{len(done)} steps done, begun: {', '.join(open_ones) or 'none'}"


def must_have_ended_well(status: int, log: Path) -> None:
    if status != 0:
        sys.exit(f"{log}: the command ended with status {status}:\n{log.read_text(errors='replace')[-3000:]}")


def differences_of(whole: Path, killed: Path) -> list[Difference]:
    """Of all artifacts, and of all summaries."""
    found = []
    for one, other, name in pairs_of(whole, killed, MANIFEST):
        if one is None or other is None:
            found.append(Difference(name, "only in the run " + ("that was killed" if one is None else "nobody killed")))
            continue
        found += [Difference(name, what) for what in artifact_differences(one.parent, other.parent)]
    for one, other, name in pairs_of(whole, killed, "summary.json"):
        figures = [figures_of(path) for path in (one, other)]
        found += [Difference(name, what) for what in value_differences(*figures)]
    return found


def pairs_of(whole: Path, killed: Path, name: str) -> list[tuple[Path | None, Path | None, str]]:
    """The files of this name in both runs, side by side."""
    found = [{path.relative_to(run): path for path in run.rglob(name)} for run in (whole, killed)]
    names = sorted(place for place in found[0].keys() | found[1].keys() if not ASIDE & {*place.parts})
    return [(found[0].get(place), found[1].get(place), place.as_posix()) for place in names]


def artifact_differences(one: Path, other: Path) -> list[str]:
    contents = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    ]
    manifests = [json.loads(files.pop(MANIFEST)) for files in contents]
    plain = [{key: value for key, value in values.items() if key not in NOT_COMPARED} for values in manifests]
    for files, values in zip(contents, plain, strict=True):
        for name in PAGES & files.keys():
            files[name] = b""
            values["files"], values["sizes"] = ({**values[key], name: None} for key in ("files", "sizes"))
    names = sorted(contents[0].keys() | contents[1].keys())
    return [
        *[f"{name}: other bytes" for name in names if contents[0].get(name) != contents[1].get(name)],
        *value_differences(*plain),
    ]


def figures_of(path: Path | None) -> dict[str, Any]:
    values = {} if path is None else json.loads(path.read_text())
    return {name: value for name, value in values.items() if not name.startswith(VOLATILE)}


def value_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    absent = "absent"
    return [
        f"{name}: {one.get(name, absent)} and {other.get(name, absent)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name, absent) != other.get(name, absent)
    ]


def table(differences: Sequence[Difference]) -> str:
    if not differences:
        return "no differences: every artifact has the same bytes, every summary the same figures"
    width = max(len(one.place) for one in differences)
    return "\n".join(f"{one.place:{width}}  {one.what[:300]}" for one in differences)


if __name__ == "__main__":
    sys.exit(main())
