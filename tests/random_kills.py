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


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where both runs are the same, 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_kills", description="A recipe under random kills.")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="how often the second run is killed (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; a temporary folder without it")
    parser.add_argument("recipe", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        differences = compare_runs(options.folder or Path(scratch), options)
    same = "no differences: every artifact has the same bytes, every summary the same figures"
    print("\n".join(differences) or same)
    return 1 if differences else 0


def compare_runs(folder: Path, options: argparse.Namespace) -> list[str]:
    """Both runs, and what differs."""
    run, kept = folder / "run", folder / "whole"
    folder.mkdir(parents=True, exist_ok=True)
    whole = run_whole(run, options, folder / "whole.log")
    run.rename(kept)
    print(f"uninterrupted: {whole.seconds:.1f} s, its first figures after {whole.start_s:.1f} s", flush=True)
    run_killed(run, options, whole, folder / "killed.log")
    return differences_of(kept, run)


def start(run: Path, options: argparse.Namespace, log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    recipe = ["--config", str(options.recipe), f"run.dir={run}", *options.overrides]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "all", *recipe],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def run_whole(run: Path, options: argparse.Namespace, log: Path) -> Whole:
    began, first = time.monotonic(), None
    process = start(run, options, log)
    while process.poll() is None:
        if first is None and any(run.rglob("metrics.jsonl")):
            first = time.monotonic() - began
        time.sleep(POLL_S)
    must_have_ended_well(process.returncode, log)
    return Whole(time.monotonic() - began, first or 0.0)


def run_killed(run: Path, options: argparse.Namespace, whole: Whole, log: Path) -> None:
    """The run under kills, and then to its end."""
    rng = random.Random(options.seed)
    moments = sorted(rng.uniform(0, whole.seconds) for _ in range(options.kills))
    waits = [
        now - before + rng.uniform(0, whole.start_s) for before, now in zip([0.0, *moments], moments, strict=False)
    ]
    print(f"seed {options.seed}: kills after {', '.join(f'{wait:.2f}' for wait in waits)} s of each start", flush=True)
    for number, wait in enumerate(waits, start=1):
        process = start(run, options, log)
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
    must_have_ended_well(start(run, options, log).wait(), log)


def where(run: Path) -> str:
    """How far a killed run is."""
    begun = sorted(path.parent for path in run.rglob("identity.json") if not ASIDE & {*path.relative_to(run).parts})
    done = [folder for folder in begun if (folder / "artifact" / MANIFEST).is_file()]
    open_ones = [folder.relative_to(run).as_posix() for folder in begun if folder not in done]
    return f"{len(done)} steps done, begun: {', '.join(open_ones) or 'none'}"


def must_have_ended_well(status: int, log: Path) -> None:
    if status != 0:
        sys.exit(f"{log}: the command ended with status {status}:\n{log.read_text(errors='replace')[-3000:]}")


def differences_of(whole: Path, killed: Path) -> list[str]:
    """Of all artifacts, and of all summaries."""
    differences = []
    for name, compare in ((MANIFEST, artifact_differences), ("summary.json", summary_differences)):
        one, other = (
            {path.relative_to(run): path for path in run.rglob(name) if not ASIDE & {*path.relative_to(run).parts}}
            for run in (whole, killed)
        )
        for place in sorted(one.keys() | other.keys()):
            if place not in one or place not in other:
                what = ["only in the run " + ("nobody killed" if place in one else "that was killed")]
            else:
                what = compare(one[place], other[place])
            differences += [f"{place.as_posix()}  {words[:300]}" for words in what]
    return differences


def artifact_differences(*manifest_paths: Path) -> list[str]:
    contents = [
        {path.relative_to(at.parent).as_posix(): path.read_bytes() for path in at.parent.rglob("*") if path.is_file()}
        for at in manifest_paths
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


def summary_differences(*summary_paths: Path) -> list[str]:
    values = [json.loads(path.read_text()) for path in summary_paths]
    return value_differences(*({name: of[name] for name in of if not name.startswith(VOLATILE)} for of in values))


def value_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    absent = "absent"
    return [
        f"{name}: {one.get(name, absent)} and {other.get(name, absent)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name, absent) != other.get(name, absent)
    ]


if __name__ == "__main__":
    sys.exit(main())
