"""Several processes on one CPU that meet as those of `torchrun` do (gloo), for tests.

They are forked from one server that has the libraries loaded, since importing them takes longer than most tests do.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

PATIENCE_S = 120.0
LOADED = ("torch", "peft", "sft.train", "reward.train", "ppo.train", "rejection_sampling.train", "pipelines.cli.main")


def run_several(count: int, function: Callable[..., Any], *arguments: Any, may_die: bool = False) -> list[Any]:
    """Run `function(*arguments)` in `count` processes that work together; return the result of each, in order.

    The function is at the top level of a module, and its result can be pickled. If one of them raises, all end, and the error
    is raised here. A killed process returns None if `may_die`, else it is an error. One process has no process group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[tuple[ForkServerProcess, Connection]] = []
    for index in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(index, count, port, there, function, arguments), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    try:
        return _results([here for _, here in started], may_die=may_die)
    finally:
        for process, here in started:
            process.join(2.0)
            if process.is_alive():
                process.kill()
            here.close()


def _results(pipes: list[Connection], *, may_die: bool) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting, ends = list(pipes), time.monotonic() + PATIENCE_S
    while waiting:
        ready = wait(waiting, timeout=max(0.0, ends - time.monotonic()))
        if not ready:
            raise AssertionError(f"{len(waiting)} of {len(pipes)} processes have not ended in {PATIENCE_S:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                is_well, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                if not may_die:
                    raise AssertionError(f"process {pipes.index(pipe)} of {len(pipes)} has died") from None
                continue
            if not is_well:
                raise AssertionError(f"process {pipes.index(pipe)} of {len(pipes)}:\n{result}")
            results[pipes.index(pipe)] = result
    return results


def _work(
    index: int, count: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if count == 1:  # as without a launcher
        del os.environ["LOCAL_RANK"], os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from llamachat import distributed

    torch.set_num_threads(1)
    try:
        with distributed.opened():
            result = function(*arguments)
        report = (True, result)
    except BaseException:
        report = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(report))  # `send` would leave tensors in the memory of a process that ends
    pipe.close()
