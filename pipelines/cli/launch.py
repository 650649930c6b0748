"""What is around every command: its processes, its errors in words with their exit status, and the options they share.

Exit status: 1 failed, 2 bad usage, configuration or data, 3 hours over, 130 interrupted. `accelerate launch --cpu --num_processes N`
means N processes, but starts one (accelerate 1.15): here it starts them all. For GPUs accelerate starts every process
itself, and so does torchrun for either; then there is nothing to do here. As a command
(`python -m pipelines.cli.launch accelerate launch ...`) it becomes the launcher, one that dies with its parent.
"""

import errno
import functools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from llamachat import distributed
from llamachat.errors import INTERRUPTED, STATE_IS_KEPT, LlamachatError, UsageError, first_line
from llamachat.runs.atomic import storage_errors
from pipelines.planning.hardware import usable_cores

MAYBE_NO_MEMORY = (
    "The system ends a process so where memory is short: try run.processes=1 run.jobs=1, with the same command."
)
THREADS_MAY_TAKE = 10.0  # seconds after the command's end
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
    bool, typer.Option("--overwrite", help="Replace the output if it exists. An input is never replaced.")
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Other names of fields in the file: prompt=question,chosen=response_j,rejected=response_k.",
        metavar="FIELD=COLUMN[,...]",
    ),
]
AllowUnproved = Annotated[
    bool, typer.Option("--allow-unproved-tokenizer", help="Accept a tokenizer that fails the check of its token ids.")
]
PresetsOption = Annotated[
    bool, typer.Option("--presets", help="Show all presets on cards of 24, 48 and 80 GiB instead.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="Sampling temperature; 0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this probability mass.")]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help="Sample from this many of the likeliest tokens, before top-p; by default from all."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Maximum length of an answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")]


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """The command with `~` expanded in its paths, and its errors reported as messages with an exit status.

    An exception that is no LlamachatError and no refusal of the operating system is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with storage_errors(Path.cwd()):
                command(*args, **{name: _from_home(value) for name, value in kwargs.items()})  # pyright: ignore[reportCallIssue]
        except SystemExit as error:
            if error.code:
                raise
            # Some library or file of the user's has ended the process as if all were well.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"llamachat: the command was ended by sys.exit() in {frame.filename}:{frame.lineno}, before its own end.",
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
                f"llamachat: {where}{reason}. The command reads or writes it. Look after it, then give the same command"
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
    """The columns of a data file by the field that each of them is."""
    columns: dict[str, str] = {}
    for item in (item for word in words or () for item in word.split(",")):
        field, equals, column = item.partition("=")
        if not (field and equals and column) or field in columns:
            raise UsageError(
                f"--columns: '{item}' is not FIELD=COLUMN with a field that is named once. It says which column of the file is "
                "which field of a record, such as prompt=question,chosen=response_j,rejected=response_k. Correct it."
            )
        columns[field] = column
    return columns


def _from_home(value: Any) -> Any:
    """A path, or each of a list of paths, with `~` as the home folder."""
    from llamachat.config.section import from_home

    if isinstance(value, list):
        return [_from_home(item) for item in value]
    return Path(from_home(str(value))) if isinstance(value, Path) else value


@contextmanager
def state_is_kept() -> Iterator[None]:
    """On an interrupt inside, say that the same command resumes from where it was."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(STATE_IS_KEPT) from error


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values at once; it has no arguments of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # click's Context, of which later typers hold a copy
        options = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeated(args, options))


def repeated(arguments: list[str], options: Collection[str]) -> list[str]:
    """The arguments, each of these options written before each of its values."""
    expanded: list[str] = []
    option = ""  # the one whose values stand here
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
    """How many processes the launcher that started this one was asked for on this machine's CPU and did not start; 0 if none.

    accelerate says in the environment that there should be several, and not how many: that stands in its command.
    """
    is_alone = "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ
    if not is_alone or os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true"):
        return 0
    import psutil

    parent = psutil.Process().parent()
    command = [] if parent is None else parent.cmdline()
    return requested_processes(command[command.index("launch") + 1 :]) if "launch" in command else 0


def requested_processes(arguments: Sequence[str]) -> int:
    """How many processes these arguments of `accelerate launch` ask for, or the configuration that they name; 0 for one."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(list(arguments))
    config = load_config_from_file(options.config_file) if options.config_file else None
    machines = options.num_machines or getattr(config, "num_machines", None) or 1
    count = options.num_processes or getattr(config, "num_processes", None) or 1
    if machines > 1:
        raise UsageError(
            f"accelerate launch --cpu --num_machines {machines}: accelerate starts one process on each machine's CPU alone."
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


def die_with_parent() -> None:
    """Ask Linux to kill this process with the one that started it: a killed `make` leaves no orphan holding a step."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def divide(count: int, arguments: Sequence[str]) -> int:
    """Run the command in this many processes that share the cores, as `start`."""
    os.environ[distributed.OWN_LAUNCH] = str(count)
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
    logging.disable()  # of torchrun: the first process reports
    die_with_parent()
    return start(count, arguments)


def start(count: int, arguments: Sequence[str]) -> int:
    """Run the command in this many processes of this machine, and return its exit status: that of the first which failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", "--nproc_per_node", str(count), "-m", "pipelines", *arguments])
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode < 0:
            print(f"llamachat: a process was ended by {first.signal_name()}. {MAYBE_NO_MEMORY}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    except (SignalException, KeyboardInterrupt):  # the processes got the signal too, and the first of them reports it
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
