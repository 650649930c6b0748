"""What every command needs: its processes, errors as messages with an exit status, and shared options.

Exit status: 1 failed, 2 bad usage, configuration or data, 3 hours over, 130 interrupted. `accelerate launch --cpu
--num_processes N` means N processes, but accelerate 1.15 starts only one; this module starts the others. For GPUs
accelerate starts every process itself, and torchrun does so for both; then there is nothing to do here. Run as a
command (`python -m pipelines.cli.launch accelerate launch ...`), the module is a launcher that dies with its parent.
"""

import atexit
import errno
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from llamachat import distributed
from llamachat.errors import INTERRUPTED, STATE_IS_KEPT, LlamachatError, UsageError, first_line
from llamachat.runs.atomic import storage_errors
from pipelines.planning.hardware import usable_cores

MAYBE_NO_MEMORY = (
    "The system may have killed it for lack of memory: try run.processes=1 run.jobs=1 with the same command."
)
THREADS_MAY_TAKE = 10.0  # seconds after the command's end
_POLL_S = 0.05
_STOP_MAY_TAKE_S = 30.0
P = ParamSpec("P")

TINY = Path("configs/tiny.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", help="The recipe, a YAML file.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that override the recipe's, such as sft.epochs=1."),
]
GpuOption = Annotated[
    str | None,
    typer.Option("--gpu", help="The card to plan for, such as 24GiB, rtx-4090 or '8x a100-80gb'.", metavar="CARD"),
]
HoursOption = Annotated[
    float | None,
    typer.Option("--hours", min=0.0, max=1e6, help="Time budget for the whole recipe, in hours.", metavar="H"),
]
OverwriteOutOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists. An input file is never replaced.")
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Columns of the file that hold the fields: prompt=question,chosen=response_j,rejected=response_k.",
        metavar="FIELD=COLUMN[,...]",
    ),
]
AllowUnproved = Annotated[
    bool,
    typer.Option(
        "--allow-unproved-tokenizer", help="Accept a tokenizer whose token ids fail the check of the chat format."
    ),
]
PresetsOption = Annotated[
    bool, typer.Option("--presets", help="Show all presets on cards of 24, 48 and 80 GiB instead.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="Sampling temperature; 0 always takes the most likely token.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the most likely tokens with this total probability.")]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help="Sample from the k most likely tokens only, before top-p; by default from all."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Maximum length of an answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same answers.")]


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """The command with `~` expanded in its paths, and its errors reported as messages with an exit status.

    An exception that is neither a LlamachatError nor an OSError is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with storage_errors(Path.cwd()):
                command(*args, **{name: _from_home(value) for name, value in kwargs.items()})  # pyright: ignore[reportCallIssue]
        except SystemExit as error:
            if error.code:
                raise
            # Some library or a user's file has ended the process as if it had succeeded.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"llamachat: sys.exit() in {frame.filename}:{frame.lineno} ended the command before it was done.",
                file=sys.stderr,
            )
            raise typer.Exit(1) from error
        except LlamachatError as error:
            print(f"llamachat: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_status) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of the output has closed the pipe
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            reason = error.strerror or first_line(error)
            print(
                f"llamachat: {where}{reason}. The command needs this file. Fix the cause, then run the same command"
                " again.",
                file=sys.stderr,
            )
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            if distributed.launched_index() == 0:
                print(" ".join(["\nllamachat: interrupted.", *map(str, error.args)]), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


def named_columns(words: Sequence[str] | None) -> dict[str, str]:
    """The columns of a data file, by the field that each one holds."""
    columns: dict[str, str] = {}
    for item in (item for word in words or () for item in word.split(",")):
        field, equals, column = item.partition("=")
        if not (field and equals and column) or field in columns:
            raise UsageError(
                f"--columns: '{item}' is not FIELD=COLUMN with a field that occurs once. It says which column of the file holds "
                "which field of a record, such as prompt=question,chosen=response_j,rejected=response_k. Correct it."
            )
        columns[field] = column
    return columns


def _from_home(value: Any) -> Any:
    """A path or a list of paths, with `~` expanded to the home folder."""
    from llamachat.config.section import from_home

    if isinstance(value, list):
        return [_from_home(item) for item in value]
    return Path(from_home(str(value))) if isinstance(value, Path) else value


@contextmanager
def state_is_kept() -> Iterator[None]:
    """On an interrupt inside, report that the same command resumes."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(STATE_IS_KEPT) from error


class SeveralValues(TyperCommand):
    """A command whose repeatable options accept several values at once; it has no positional arguments."""

    def parse_args(
        self, ctx: Any, args: list[str]
    ) -> list[str]:  # click's Context, which later versions of typer vendor
        options = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeated(args, options))


def repeated(arguments: list[str], options: Collection[str]) -> list[str]:
    """The arguments, with each of these options repeated before each of its values."""
    expanded: list[str] = []
    option = ""  # the option whose values follow
    for argument in arguments:
        if not argument.startswith("-"):
            if option and expanded[-1] != option:
                expanded.append(option)
        else:
            name = argument.partition("=")[0]
            option = name if name in options else ""
        expanded.append(argument)
    return expanded


# -- processes


def missing_processes() -> int:
    """The number of CPU processes on this machine that the launcher was to start but did not; 0 if none.

    accelerate's environment says that there should be several, but not how many: its command line does.
    """
    is_alone = "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ
    if not is_alone or os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true"):
        return 0
    import psutil

    parent = psutil.Process().parent()
    command = [] if parent is None else parent.cmdline()
    return requested_processes(command[command.index("launch") + 1 :]) if "launch" in command else 0


def requested_processes(arguments: Sequence[str]) -> int:
    """The number of processes that these arguments of `accelerate launch`, or the configuration they name, ask for; 0
    for one."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(list(arguments))
    config = load_config_from_file(options.config_file) if options.config_file else None
    machines = options.num_machines or getattr(config, "num_machines", None) or 1
    count = options.num_processes or getattr(config, "num_processes", None) or 1
    if machines > 1:
        raise UsageError(
            f"accelerate launch --cpu --num_machines {machines}: on CPUs accelerate starts only one process per machine."
            " torchrun starts the requested number. Use"
            f" `torchrun --nnodes {machines} --nproc_per_node {count // machines} ... -m pipelines` on each machine."
        )
    return count if count > 1 else 0


def end_despite_threads(status: int) -> None:
    """End the process with this status also where a thread of a user's file or a library never ends, and say so."""
    waited_for = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]

    def end() -> None:
        time.sleep(THREADS_MAY_TAKE)
        names = [one.name for one in waited_for if one.is_alive()]
        if names:
            print(
                f"llamachat: the command is done, but the thread {', '.join(names)} has not ended {THREADS_MAY_TAKE:g} s"
                " later. It is ended with the process. A reward function that starts threads should end them.",
                file=sys.stderr,
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    if waited_for:
        threading.Thread(target=end, daemon=True).start()


class QuickEnd:
    """Ends the process without freeing what Python loaded: with torch and transformers that takes about 2 s.

    Create it before libraries are imported: handlers of `atexit` run in reverse order, so its own runs last.
    """

    def __init__(self) -> None:
        self.status: int | None = None  # None: the process ends as usual, with the traceback of an error
        atexit.register(self._end)

    def _end(self) -> None:
        if self.status is None:
            return
        with suppress(OSError, ValueError):  # the reader has closed the pipe: Python's own end reports it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: a killed `make` then leaves no orphan that locks a step."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def divide(count: int, arguments: Sequence[str]) -> int:
    """Run the command in `count` processes that share the cores, like `start`."""
    os.environ[distributed.OWN_LAUNCH] = str(count)
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
    os.environ.update(distributed.KEEP_FREED_MEMORY | os.environ)
    die_with_parent()
    return start(count, arguments)


def start(count: int, arguments: Sequence[str]) -> int:
    """Run the command in `count` processes on this machine, and return the exit status of the first one that failed,
    or 0. When one fails, the others are stopped. torchrun does the same, but takes 2 s to load."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "PYTHONUNBUFFERED": "1"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "pipelines", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            environment = {**os.environ, **place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In sessions of their own, so that the terminal's Ctrl-C reaches them through this process, once.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        while (status := _first_failure(processes)) is None:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:  # the processes get a signal too, and the first one reports it
        return INTERRUPTED
    finally:
        _stop(processes)
    if status < 0:
        name = signal.Signals(-status).name
        print(f"llamachat: a process was ended by {name}. {MAYBE_NO_MEMORY}", file=sys.stderr)
        return 1
    return status


def _free_port() -> int:
    """A free port below those that the system gives to outgoing connections, one of which could take it first."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UsageError("127.0.0.1: 100 ports between 20000 and 32000 are all in use. Free some, or set run.processes=1.")


def _first_failure(processes: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """The status of a process that failed, negative for a signal; 0 when all ended well; None while they run.

    A process that a signal ended comes first: the others fail because of it.
    """
    statuses = [process.poll() for process in processes]
    failed = min((status for status in statuses if status), default=0)
    return None if not failed and None in statuses else failed


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Stop the processes that still run: they have some time to save their state."""
    for process in processes:
        process.terminate()
    ends = time.monotonic() + _STOP_MAY_TAKE_S
    for process in processes:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
