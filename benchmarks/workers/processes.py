"""Processes that a benchmark starts and asks for figures, one or several that work together."""

import json
import os
import socket
import subprocess
from typing import Any

from llamachat.distributed import KEEP_FREED_MEMORY

MOST = 4  # as of a step (pipelines.planning.side_by_side)


class Worker:
    """One process, or several that work together, which answer each line of JSON with a line of JSON."""

    def __init__(self, command: list[str], environment: dict[str, str], count: int = 1) -> None:
        self.count = count
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if not os.environ.get("SHOW") else None,
                env=environment | ranks,
                text=True,
            )
            for ranks in environments(count)
        ]

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers of all processes."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answers = list[dict[str, Any]]()
        for process in self._processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the worker ended without an answer; SHOW=1 in the environment prints what it says")
            answers.append(json.loads(line))
        return answers

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def count_of_a_step() -> int:
    """The number of processes that a step of the bundled recipe has when it runs alone (`run.processes: auto`)."""
    import torch

    if torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS"):
        return 1
    return min(len(os.sched_getaffinity(0)), MOST)


def environments(count: int) -> list[dict[str, str]]:
    """What each of `count` processes has in its environment, as those of a step; nothing for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    return [KEEP_FREED_MEMORY | place | threads | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
