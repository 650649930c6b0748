"""The stand-in from Python: its memory, mode, limit and counts, and `torch.cuda` as a program sees it."""

import ctypes
import json
from typing import Any

from tests.cuda_standin.build import library, torch_folder

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # what a CUDA context takes of the card


class Device:
    """The one device that there is. Use `load`."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self.is_shape_mode = False
        for name in ("allocated", "reserved", "peak_allocated", "peak_reserved", "begin_capture"):
            self._function(name).restype = ctypes.c_int64
        for name in ("statistics", "wait", "replay"):
            self._function(name).restype = ctypes.c_char_p
        self._function("is_capturing").restype = ctypes.c_bool
        self.resize(24.0)

    def _function(self, name: str) -> Any:
        return getattr(self._functions, f"standin_{name}")

    def resize(self, total_gib: float) -> None:
        """The card's memory, of which a CUDA context takes a part."""
        self.total = int(total_gib * GIB)
        self.limit(self.total - CONTEXT_BYTES)

    def expandable(self, is_on: bool) -> None:
        """Whether torch's allocator runs with `expandable_segments:True`; before anything is allocated."""
        self._function("set_expandable")(ctypes.c_bool(is_on))

    def limit(self, size: int) -> None:
        """The bytes that torch's allocator may take."""
        self._limit = size
        self._function("set_limit")(ctypes.c_int64(size))

    def shape_mode(self, is_on: bool) -> None:
        """Whether large floating-point operations are left out, and only their results' shapes are made."""
        self.is_shape_mode = is_on
        self._function("set_shape_mode")(ctypes.c_bool(is_on))

    def roofline(self, *, flops: float, bandwidth: float, launch: float = 10e-6, kernel: float = 2e-6) -> None:
        """Operations and bytes per second that kernels reach, and seconds of host and device for any kernel."""
        self._function("set_roofline")(*map(ctypes.c_double, (flops, bandwidth, launch, kernel)))

    def take_over(self, operation: str) -> None:
        """Run "library::operation" as torch's own operations: by its kernel for the CPU, or its shapes alone."""
        space, name = operation.split("::")
        self._function("take_over")(space.encode(), name.encode())

    @property
    def allocated(self) -> int:
        return self._function("allocated")()

    @property
    def reserved(self) -> int:
        return self._function("reserved")()

    @property
    def peak_allocated(self) -> int:
        return self._function("peak_allocated")()

    @property
    def peak_reserved(self) -> int:
        return self._function("peak_reserved")()

    @property
    def free(self) -> int:
        """Bytes that the driver has left."""
        return self._limit - self.reserved

    def reset_peaks(self) -> None:
        self._function("reset_peaks")()

    def empty_cache(self) -> None:
        self._function("empty_cache")()

    def reset_statistics(self) -> None:
        self._function("reset_statistics")()

    def statistics(self) -> dict[str, Any]:
        """Kernels, replays of graphs, counts by kernel, waits by reason, and seconds of the roofline model."""
        return json.loads(self._function("statistics")().decode())

    @property
    def kernels(self) -> int:
        return self.statistics()["kernels"]

    @property
    def waits(self) -> int:
        return sum(self.statistics()["waits"].values())

    def count_kernel(self, name: str, *, flops: float = 0.0, moved: float = 0.0) -> None:
        """Note a kernel that Python computes; `moved` are the bytes that it reads and writes."""
        self._function("count_kernel")(name.encode(), ctypes.c_double(flops), ctypes.c_double(moved))

    def wait(self, reason: str) -> None:
        """Note that the host waits for the device."""
        _raise(self._function("wait")(reason.encode()))

    @property
    def is_capturing(self) -> bool:
        return self._function("is_capturing")()

    def begin_capture(self) -> int:
        return self._function("begin_capture")()

    def end_capture(self) -> None:
        self._function("end_capture")()

    def replay(self, graph: int) -> None:
        _raise(self._function("replay")(ctypes.c_int64(graph)))

    def forget(self, graph: int) -> None:
        self._function("forget")(ctypes.c_int64(graph))


def load() -> Device:
    """Give this process the device. torch must not have been imported."""
    libraries = torch_folder() / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    device = Device(ctypes.CDLL(str(library())))

    import bitsandbytes  # noqa: F401  # before torch says that there is CUDA: its CUDA library cannot be loaded

    from tests.cuda_standin import torch_cuda
    from tests.cuda_standin.kernels import register

    torch_cuda.install(device)
    register(device)
    return device


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())
