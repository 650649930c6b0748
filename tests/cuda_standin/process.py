"""Run a function of a test in a process of its own that has the stand-in.

One server for each pytest process loads the stand-in and the libraries, which takes seconds, and forks for each call.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda_standin.build import UnavailableError, library

if TYPE_CHECKING:
    from tests.cuda_standin.device import Device

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "llamachat.training.trainer")


def on_standin(
    function: Callable[..., Any],
    *arguments: Any,
    total_gib: float = 24.0,
    is_shape_mode: bool = False,
    is_expandable: bool = False,
    timeout: int = 600,
) -> Any:
    """What `function(device, *arguments)` returns there. Arguments and result are JSON values, paths become text.

    `function` is one of a module; pytest skips the test where there is no stand-in. `is_expandable` is torch's
    allocator with `expandable_segments:True`.
    """
    try:
        library()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    with tempfile.TemporaryDirectory() as folder:
        call = {
            "function": f"{function.__module__}:{function.__qualname__}",
            "arguments": [str(value) if isinstance(value, Path) else value for value in arguments],
            "total_gib": total_gib,
            "is_shape_mode": is_shape_mode,
            "is_expandable": is_expandable,
            "timeout": timeout,
            "folder": folder,
        }
        status = _ask(call)
        output = (Path(folder) / "output").read_text(errors="replace")
        print(output)
        if status:
            pytest.fail(f"{call['function']} ended with {status} on the stand-in:\n{output[-6000:]}", pytrace=False)
        return json.loads((Path(folder) / "result").read_text())


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.cuda_standin.process"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    atexit.register(server.stdin.close)  # which ends it
    return server


def _ask(call: dict[str, Any]) -> str:
    """How the process of the call ended; empty when well."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(call) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline() or '"no answer"')


def serve() -> None:
    """Fork a process for each line of the standard input, one after the other, and print how it ended."""
    from tests.cuda_standin.device import load

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    device = load()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a child's collections leave out what is loaded
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(device, call)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        name = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        print(json.dumps(name if status else ""), file=answers, flush=True)


def _run(device: "Device", call: dict[str, Any]) -> None:
    """Call the function, and end this process."""
    status = 1
    try:
        folder = Path(call["folder"])
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(call["timeout"])
        device.resize(call["total_gib"])
        device.expandable(call["is_expandable"])
        device.shape_mode(call["is_shape_mode"])
        module, name = call["function"].split(":")
        result = getattr(importlib.import_module(module), name)(device, *call["arguments"])
        (folder / "result").write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
