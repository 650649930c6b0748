"""A folder of llama.cpp: what in it turns a model folder into a GGUF file, quantizes that, and serves it.

Its programs run as processes of their own; nothing of it is imported. Their output goes to no terminal: its last lines
stand in the error of what failed.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llamachat.errors import LlamachatError, UsageError
from llamachat.rollout.vllm_http import RefusedError, Server, ServerError

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"
SERVER = "llama-server"
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the converter writes by itself
LAST_LINES = 12
START_S = 900.0  # weights of 70B come from a slow disk
POLL_S = 0.1


class LlamaCppError(LlamachatError):
    """A program of llama.cpp did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The folder, known to hold what will be needed."""

    folder: Path
    quantization: str

    def __post_init__(self) -> None:
        where = f"--llama-cpp: '{self.folder}'"
        if not self.folder.is_dir():
            raise UsageError(
                f"{where} is no folder. GGUF is written by llama.cpp's own converter. Get it with `git clone "
                "https://github.com/ggml-org/llama.cpp` and name its folder."
            )
        if not (self.folder / CONVERTER).is_file():
            raise UsageError(
                f"{where} has no {CONVERTER}. It is in the source of llama.cpp, not in its binary packages. Name the "
                "folder that `git clone https://github.com/ggml-org/llama.cpp` made."
            )
        if not (self.folder / "gguf-py").is_dir() and find_spec("gguf") is None:
            raise UsageError(
                f"{where} has no gguf-py, and the package gguf is not installed. The converter writes with it. Install "
                f"it: {sys.executable} -m pip install gguf"
            )
        if self.is_quantized_after and self._program(QUANTIZER) is None:
            raise UsageError(
                f"--quantize {self.quantization}: {self.folder} has no built {QUANTIZER}, which makes it. Build it: "
                f"{_how_to_build(self.folder, QUANTIZER)} Or take one that needs no building: {', '.join(CONVERTED)}."
            )

    @property
    def is_quantized_after(self) -> bool:
        """Whether the converter's file is only the way to the one that is asked for."""
        return self.quantization not in CONVERTED

    @property
    def server(self) -> Path | None:
        """The program that answers from a GGUF file, where it is built."""
        return self._program(SERVER)

    def how_to_build_the_server(self) -> str:
        """The commands that make what `server` looks for."""
        return _how_to_build(self.folder, SERVER)

    def convert(self, model: Path, out: Path, *, kind: str, name: str) -> None:
        """Write the model folder as one GGUF file with weights of this kind."""
        script = self.folder / CONVERTER
        arguments = [str(model), "--outfile", str(out), "--outtype", kind, "--model-name", name]
        _run([sys.executable, str(script), *arguments], out)

    def quantize(self, source: Path, out: Path) -> str:
        """Write the GGUF file with fewer bits a weight; what the program said."""
        program = self._program(QUANTIZER)
        assert program is not None, "looked for at the start"
        return _run([str(program), str(source), str(out), self.quantization.upper()], out)

    def _program(self, name: str) -> Path | None:
        for folder in ("build/bin", "bin", "."):
            found = self.folder / folder / name
            if found.is_file() and os.access(found, os.X_OK):
                return found.resolve()
        return None


@contextmanager
def serving(program: Path, gguf: Path, *, context: int, log_file: Path) -> Iterator[Server]:
    """A llama-server on this machine alone that answers from the file, as exactly as it can.

    Keys and values are fp32, and attention is the plain one: its flash attention moves log-probabilities by thousandths.
    """
    port = _free_port()
    arguments = ["-m", str(gguf), "-c", str(context), "-np", "1", "--jinja", "-ctk", "f32", "-ctv", "f32"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(program), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_environment(), "LLAMA_ARG_FLASH_ATTN": "off"},  # as an option its form has changed
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        _wait(process, server, program, log_file)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", server: Server, program: Path, log_file: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            server.get("/health")
            return
        except (RefusedError, ServerError):  # 503 while it loads
            time.sleep(POLL_S)
    said = _tail(log_file.read_text(encoding="utf-8", errors="replace"))
    state = (
        f"ended with status {process.returncode}" if process.poll() is not None else f"is not ready in {START_S:g} s"
    )
    raise LlamaCppError(
        f"{program}: {state}. The file is held against the policy by asking this server. It said last:\n{said}\nMend "
        "that, or take the program away from the folder to write the file unheld."
    )


def _run(command: list[str], out: Path) -> str:
    """What a program said that ended well and left a file; else an error with its last lines."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
    )
    said = done.stdout.decode(errors="replace")
    if done.returncode == 0 and out.is_file():
        return said
    program = next(Path(word).name for word in command if Path(word).name != Path(sys.executable).name)
    state = f"ended with status {done.returncode}" if done.returncode else "wrote no file"
    mend = "See what it says; a newer llama.cpp may know more."
    lacking = [line.rpartition(" ")[2].strip("'") for line in said.splitlines() if "No module named '" in line]
    if lacking:
        mend = f"Install what it lacks: {sys.executable} -m pip install {lacking[-1].partition('.')[0]}"
    elif "No space left on device" in said:
        mend = "Free space, or name a folder on another disk with --out."
    raise LlamaCppError(f"{program} {state}; nothing was written. It said last:\n{_tail(said)}\n{mend}")


def _environment() -> dict[str, str]:
    # Nothing is fetched, and nothing is written into a folder that is the user's.
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-LAST_LINES:])


def _how_to_build(folder: Path, target: str) -> str:
    build = folder / "build"
    return f"cmake -B {build} -S {folder} && cmake --build {build} --config Release --target {target}."


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
