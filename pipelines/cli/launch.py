"""`accelerate launch --cpu --num_processes N` means N processes, but starts one (accelerate 1.15): here it starts them all.

For GPUs accelerate starts every process itself, and so does torchrun for either; then there is nothing to do here. As a
command (`python -m pipelines.cli.launch accelerate launch ...`) it becomes the launcher, one that dies with its parent.
"""

import os
import signal
import sys
from collections.abc import Sequence

from llamachat.errors import UsageError
from pipelines.cli.options import INTERRUPTED


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
    return asked_processes(command[command.index("launch") + 1 :]) if "launch" in command else 0


def asked_processes(arguments: Sequence[str]) -> int:
    """How many processes these arguments of `accelerate launch` ask for, or the configuration that they name; 0 for one."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(list(arguments))
    config = load_config_from_file(given.config_file) if given.config_file else None
    machines = given.num_machines or getattr(config, "num_machines", None) or 1
    count = given.num_processes or getattr(config, "num_processes", None) or 1
    if machines > 1:
        raise UsageError(
            f"accelerate launch --cpu --num_machines {machines}: accelerate starts one process on each machine's CPU alone."
            " torchrun starts as many as are asked for. Use"
            f" `torchrun --nnodes {machines} --nproc_per_node {count // machines} ... -m pipelines` on each machine."
        )
    return count if count > 1 else 0


def die_with_parent() -> None:
    """Ask Linux to kill this process with the one that started it: a killed `make` leaves no orphan holding a step."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def start(count: int, arguments: Sequence[str]) -> int:
    """Run the command in so many processes of this machine, and return its exit status: that of the first which failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", "--nproc_per_node", str(count), "-m", "pipelines", *arguments])
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 1
    except (SignalException, KeyboardInterrupt):  # the processes have been told, too, and the first of them says so
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
