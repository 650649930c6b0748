"""The stand-in's shared library, compiled once for each version of torch and of its source."""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "standin.cpp", HERE / "allocator.h")


class UnavailableError(RuntimeError):
    """Why there is no stand-in on this machine."""


def torch_folder() -> Path:
    """Where torch is installed; it is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def library() -> Path:
    """The compiled library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if platform.system() != "Linux":
        raise UnavailableError("the CUDA stand-in needs Linux")
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        raise UnavailableError("the CUDA stand-in needs a torch that is built for the CPU alone")
    key = hashlib.sha256(version("torch").encode() + b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamachat" / "cuda_standin"
    built = folder / f"{key}.so"
    if built.exists():
        return built
    if compiler is None:
        raise UnavailableError("the CUDA stand-in needs a C++ compiler (g++, or the one that CXX names)")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(compiler, built)
    return built


def _compile(compiler: str, built: Path) -> None:
    torch = torch_folder()
    unfinished = built.with_suffix(".unfinished")
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O1", "-w", f"-I{torch / 'include'}"]
    command += [f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}", str(SOURCES[0]), "-o", str(unfinished)]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-Wl,--no-undefined"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the CUDA stand-in does not compile: {' '.join(command)}\n{result.stderr[-4000:]}")
    unfinished.replace(built)
