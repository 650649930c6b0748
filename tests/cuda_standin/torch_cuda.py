"""The functions of `torch.cuda`, which a CPU build of torch lacks or answers with "no"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch._meta_registrations

if TYPE_CHECKING:
    from tests.cuda_standin.device import Device

PROPERTIES = {
    "name": "stand-in",
    "major": 8,
    "minor": 9,
    "multi_processor_count": 128,
    "L2_cache_size": 2**26,
    "warp_size": 32,
    "max_threads_per_multi_processor": 1536,
    "regs_per_multiprocessor": 65536,
    "gcnArchName": "",
    "uuid": "0",
}


class _Context:
    """A device or stream as a context manager."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def install(device: Device) -> None:
    """Replace the functions and classes in `torch.cuda`."""
    for name, value in (_questions(device) | _memory(device) | _random() | _streams(device) | _graphs(device)).items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.version.cuda = "12.8"


def _questions(device: Device) -> dict[str, Callable[..., Any]]:
    """What there is, and which device is the current one."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **_: None,
        "_is_compiled": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "device": _Context,
        "device_of": _Context,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "can_device_access_peer": lambda *_: False,
        "get_device_name": lambda index=None: PROPERTIES["name"],
        "get_device_capability": lambda index=None: (PROPERTIES["major"], PROPERTIES["minor"]),
        "get_device_properties": lambda index=None: SimpleNamespace(total_memory=device.total, **PROPERTIES),
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "synchronize": lambda index=None: device.wait("synchronize"),
    }


def _memory(device: Device) -> dict[str, Callable[..., Any]]:
    return {
        "mem_get_info": lambda index=None: (device.free, device.total),
        "memory_allocated": lambda index=None: device.allocated,
        "memory_reserved": lambda index=None: device.reserved,
        "max_memory_allocated": lambda index=None: device.peak_allocated,
        "max_memory_reserved": lambda index=None: device.peak_reserved,
        "reset_peak_memory_stats": lambda index=None: device.reset_peaks(),
        "memory_stats": lambda index=None: {},
        "empty_cache": device.empty_cache,
        "ipc_collect": lambda: None,
        "set_per_process_memory_fraction": lambda *_, **__: None,
    }


def _random() -> dict[str, Any]:
    """The device draws from the generator of the CPU."""
    generator = torch.default_generator
    return {
        "default_generators": (generator,),
        "get_rng_state": lambda index=None: generator.get_state(),
        "set_rng_state": lambda state, index=None: None,
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "seed": lambda: None,
        "seed_all": lambda: None,
        "initial_seed": lambda: 0,
    }


def _streams(device: Device) -> dict[str, Any]:
    """There is one stream."""
    stream = SimpleNamespace(
        device=torch.device("cuda", 0),
        device_index=0,
        device_type=1,
        cuda_stream=0,
        stream_id=0,
        synchronize=lambda: device.wait("stream.synchronize"),
        wait_stream=lambda other: None,
        wait_event=lambda event: None,
        record_event=lambda event=None: event,
        query=lambda: True,
    )

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any) -> None:
            self.at = device.statistics()["seconds"]

        def wait(self, *_: Any) -> None: ...

        def synchronize(self) -> None:
            device.wait("event.synchronize")

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Stream:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return stream

    return {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda index=None: stream,
        "default_stream": lambda index=None: stream,
        "set_stream": lambda other: None,
        "stream": _Context,
        "StreamContext": _Context,
    }


def _graphs(device: Device) -> dict[str, Any]:
    class Graph:
        id: int | None = None

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def capture_begin(self, *_: Any, **__: Any) -> None:
            self.id = device.begin_capture()

        def capture_end(self) -> None:
            device.end_capture()

        def replay(self) -> None:
            assert self.id is not None
            device.replay(self.id)

        def pool(self) -> tuple[int, int]:
            return (0, 1)

        def reset(self) -> None:
            if self.id is not None:
                device.forget(self.id)
                self.id = None

        def __del__(self) -> None:
            self.reset()

    @contextlib.contextmanager
    def graph(cuda_graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        device.wait("capture of a graph")
        device.empty_cache()
        cuda_graph.capture_begin()
        try:
            yield
        finally:
            cuda_graph.capture_end()

    return {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: device.is_capturing,
    }
