"""Runs independent steps in parallel: each in its own process, with its share of the threads or its own card.

A group holds steps that do not read one another. A group of one step runs in this process, as without `run.jobs`. Any
other step runs as the hidden command `job`, which reads the resolved recipe and the name of its step from
standard input; locks, fingerprints and checkpoints are the same as in any command. If a step fails, only the
steps that read it do not run. The number of threads depends on the groups alone, so a resumed step has the same number.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from llamachat import distributed
from llamachat.config.loading import from_plain
from llamachat.errors import STATE_IS_KEPT, LlamachatError
from llamachat.runs.artifacts import read_artifact
from llamachat.tables import plural
from llamachat.training.progress import SharedProgress
from pipelines.execution.run import Command, Ran, find_work, finished, open_command, run_step
from pipelines.recipe.recipe import Recipe, RecipeSections, Step, resolve

TURN_S = 0.25  # length of a turn when steps take turns on the cores
_FLUSH_S = 2.0  # the time that a process's last lines may take to arrive after its end


@dataclass(frozen=True, slots=True)
class Group:
    """Steps that do not read one another."""

    steps: tuple[Step, ...]
    jobs: int = 1  # that run in parallel; a single one runs in this process
    threads: int | None = None  # per process; None leaves it to torch
    cards: tuple[str, ...] = ()  # one per process, as CUDA_VISIBLE_DEVICES names them; empty: not assigned
    at_once: int = 0  # number of processes that may run at the same moment; 0: all
    seconds: tuple[float, ...] = ()  # planned duration of each step, which sets its share of the cores; empty: equal


@dataclass(frozen=True, slots=True)
class Failure:
    """A step whose process failed."""

    step: str
    status: int  # negative: the number of the signal that killed it
    words: str  # its last line

    def __str__(self) -> str:
        if self.status >= 0:
            return f"{self.step} failed with exit status {self.status}: {self.words}"
        hint = ". The system may have killed it for lack of memory: try run.jobs=1" if self.status == -9 else ""
        return f"{self.step} was killed by {signal.Signals(-self.status).name}{hint}"


class StepsFailedError(LlamachatError):
    """Steps that ran in parallel with others have failed."""

    def __init__(self, failures: Sequence[Failure], lost: Sequence[str]) -> None:
        count = plural(len(failures), "step")
        words = "".join(f"\n  {failure}" for failure in failures)
        waiting = f"Not started, since their inputs are missing: {', '.join(lost)}. " if lost else ""
        super().__init__(f"{count} failed:{words}\n{waiting}{STATE_IS_KEPT}")
        self.exit_status = max(failures[0].status, 1)


def one_by_one(chosen: Iterable[Step]) -> list[Group]:
    """Each step as its own group, in order."""
    return [Group((step,)) for step in chosen]


def independent_steps(chosen: Sequence[Step]) -> list[list[Step]]:
    """The steps in groups whose members do not read one another; each group reads only earlier groups.

    A step waits for every earlier step that produces one of its inputs, not just the nearest.
    """
    levels: dict[str, int] = {}
    groups: list[list[Step]] = []
    for place, step in enumerate(chosen):
        level = max((levels[other.name] + 1 for other in chosen[:place] if _reads(step, other)), default=0)
        levels[step.name] = level
        groups += [[] for _ in range(level + 1 - len(groups))]
        groups[level].append(step)
    return groups


def _reads(step: Step, earlier: Step) -> bool:
    """Whether a step may read the product of an earlier one."""
    output = earlier.product.makes
    is_pooled = step.stage.pools and earlier.stage is step.stage
    return output in step.reads or output.kind in step.stage.surveys or is_pooled


def run_groups(recipe: Recipe, groups: Sequence[Group], *, should_overwrite: bool = False) -> Ran:
    """Run the groups in order, the steps of a group in parallel; raises StepsFailedError at the end if some failed."""
    chosen = [step for group in groups for step in group.steps]
    command = open_command(recipe, chosen, should_overwrite=should_overwrite)
    failures, lost = list[Failure](), list[Step]()
    for group in groups:
        missing = [recipe.step(failure.step) for failure in failures] + lost
        ready = [
            step
            for step in group.steps
            if not any(_reads(step, other) for other in recipe.before(step) if other in missing)
        ]
        lost += [step for step in group.steps if step not in ready]
        if group.jobs > 1:
            failures += _run_side_by_side(command, group, ready)
        else:
            for step in ready:
                try:
                    command.run(step)
                except LlamachatError as error:
                    if not failures:
                        raise
                    failures.append(Failure(step.name, error.exit_status, str(error)))
    if failures:
        raise StepsFailedError(failures, [step.name for step in lost])
    return command.ran


def _run_side_by_side(command: Command, group: Group, steps: Iterable[Step]) -> list[Failure]:
    """Run the steps in their own processes, `group.jobs` at a time; returns the failures."""
    failures, waiting = list[Failure](), deque[Step]()
    for step in steps:
        try:
            artifact = None if command.should_overwrite else finished(command.recipe, find_work(command.recipe, step))
        except LlamachatError as error:
            failures.append(Failure(step.name, error.exit_status, str(error)))
            continue
        if artifact is None:
            waiting.append(step)
        else:
            command.artifacts.append(artifact)
    _free_cards()
    free, running = list(range(group.jobs)), dict[str, _Process]()
    events: SimpleQueue[_Event] = SimpleQueue()
    turns = _Turns(group)
    with SharedProgress() as progress:
        try:
            while waiting or running:
                while waiting and free:
                    step = waiting.popleft()
                    if not command.is_left(step):
                        running[step.name] = _Process(command, group, step, free.pop(0), events)
                        command.num_worked += 1
                if not running:
                    break
                turns.take(running)
                try:
                    event = events.get(timeout=turns.remaining())
                except Empty:
                    continue
                if event.line is not None:
                    if event.step in running and event.line.strip():
                        running[event.step].last_line = event.line
                    progress.line(event.step, event.line)
                    continue
                process = running.pop(event.step)
                free.append(process.slot)
                progress.end(event.step)
                if event.status == 0:
                    folder = command.recipe.folder(command.recipe.step(event.step))
                    command.artifacts.append(read_artifact(folder.artifact))
                else:
                    failures.append(Failure(event.step, event.status, process.last_line))
                    others = f"; still running: {', '.join(running)}" if running else ""
                    progress.line(event.step, f"{event.step}: failed{others}")
        finally:
            _stop(running.values())
    return failures


def _free_cards() -> None:
    """Free the memory that earlier steps of this process have cached on the cards."""
    torch = distributed.imported_torch()
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


# -- processes


@dataclass(frozen=True, slots=True)
class _Event:
    """A step's process printed a line, or ended."""

    step: str
    line: str | None = None
    status: int = 0


class _Process:
    """The process of one step; its output lines and its end are put into `events`."""

    def __init__(self, command: Command, group: Group, step: Step, slot: int, events: "SimpleQueue[_Event]") -> None:
        self.slot = slot
        self.last_line = ""
        self._may_run = True
        self._step, self._events = step.name, events
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines", "job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(group, slot),
            text=True,
            errors="replace",
        )
        order = {
            "recipe": command.recipe.sections.model_dump(mode="json"),
            "step": step.name,
            "overwrite": command.should_overwrite,
            "deadline": command.deadline,
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stream:  # its exit status says what went wrong
            stream.write(json.dumps(order))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(_Event(self._step, line=line.rstrip("\n")))

    def _wait(self) -> None:
        status = self._process.wait()
        self._reader.join(_FLUSH_S)  # a service that it started may keep the pipe open
        self._events.put(_Event(self._step, status=status))

    def let_run(self, may_run: bool) -> None:
        """Continue or stop the process, if that changes anything."""
        if may_run != self._may_run:
            self._process.send_signal(signal.SIGCONT if may_run else signal.SIGSTOP)
            self._may_run = may_run

    def terminate(self) -> None:
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)  # a stopped process handles SIGTERM only when it continues

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()


class _Turns:
    """Runs at most `at_once` of the processes at a time and stops the others, in turns.

    If all ran at once, the system would switch between them every few milliseconds and the caches would be filled again
    each time, which costs a small model's training a tenth of its time. Shares are proportional to the planned
    durations, so that steps that start together end together.
    """

    def __init__(self, group: Group) -> None:
        names = [step.name for step in group.steps]
        self._at_once = group.at_once
        self._shares = dict(zip(names, group.seconds or [1.0] * len(names), strict=True))
        self._ran: dict[str, float] = {}  # run time of each step divided by its share
        self._began = time.monotonic()
        self._active: list[str] = []

    def remaining(self) -> float | None:
        """Seconds until the next turn; None if all may run."""
        return max(0.0, self._began + TURN_S - time.monotonic()) if self._at_once else None

    def take(self, running: Mapping[str, _Process]) -> None:
        """Begin the next turn if it is time, or if a process has begun or ended."""
        now = time.monotonic()
        is_unchanged = running.keys() == self._ran.keys()
        if not self._at_once or (is_unchanged and now < self._began + TURN_S):
            return
        elapsed = min(now - self._began, 2 * TURN_S)  # longer only if this process was suspended, too
        for step in self._active:
            self._ran[step] += elapsed / self._shares[step]
        self._began = now
        least = min((self._ran[step] for step in running if step in self._ran), default=0.0)
        self._ran = {step: self._ran.get(step, least) for step in running}
        self._active = sorted(running, key=lambda step: self._ran[step])[: self._at_once]
        for step, process in running.items():
            process.let_run(step in self._active)


def _environment(group: Group, slot: int) -> Mapping[str, str]:
    # The child imports the same modules as this process, wherever it was started.
    places = [place or str(Path.cwd()) for place in sys.path]
    environment = {
        **distributed.environment_alone(),
        "PYTHONPATH": os.pathsep.join(places),
        "LLAMACHAT_DIE_WITH_PARENT": "1",
    }
    if group.threads is not None:
        environment["OMP_NUM_THREADS"] = str(group.threads)
    if group.cards:
        return environment | {"CUDA_VISIBLE_DEVICES": group.cards[slot % len(group.cards)]}
    return distributed.KEEP_FREED_MEMORY | environment


def _stop(processes: Iterable[_Process]) -> None:
    """Terminate the processes with SIGTERM, which keeps their state; at a second interrupt kill them."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def run_job(order: str) -> None:
    """Run the step that another process describes on standard input."""
    # At Ctrl-C the terminal sends SIGINT to every process; the parent process stops this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    values: dict[str, Any] = json.loads(order)
    recipe = resolve(from_plain(RecipeSections, values["recipe"]))
    step = recipe.step(values["step"])
    run_step(recipe, step, should_overwrite=values["overwrite"], deadline=values["deadline"])
