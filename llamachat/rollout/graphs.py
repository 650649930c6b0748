"""Recordings of the decode step, which a GPU replays without Python: CUDA graphs, one for each shape of the step.

A recorded step reads and writes the same tensors each time and depends on no Python number: write positions come from
tensors, rows are padded to a power of two, columns to a multiple of `RECORDED_COLUMNS`. A shape's first step runs
unrecorded, because it initializes libraries and kernels, which a recording must not contain.

Not yet run on a GPU. Tests record and replay on a stand-in for a CUDA device, and on a CPU operation by operation with
the same tensors, as a graph does; the answers equal those of the unrecorded step.
"""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

RECORDED_COLUMNS = 128  # layouts have a multiple of this many columns: few shapes occur, and recordings are reused
MOST_RECORDINGS = 64  # each contains the launches of a whole step; the oldest is evicted

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]  # records a step without running it and returns a function that replays it


class Recordings:
    """Recorded steps by shape: each is recorded at its second run and replayed from then on."""

    def __init__(self, capture: Capture) -> None:
        self._capture: Capture | None = capture
        self._recordings: dict[Hashable, Step | None] = {}  # None: ran once, unrecorded

    def run(self, shape: Hashable, step: Step) -> Tensor:
        """Run or replay the step; the next run may overwrite the returned tensor."""
        if self._capture is None:
            return step()
        if shape not in self._recordings:
            self._recordings[shape] = None
            return step()
        recorded = self._recordings[shape]
        if recorded is None:
            try:
                recorded = self._capture(step)
            except RuntimeError as error:
                log.warning(
                    "the decode step cannot be recorded as a CUDA graph and runs without one, more slowly: %s", error
                )
                self._capture = None
                self._recordings.clear()
                return step()
            if len(self._recordings) > MOST_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[shape] = recorded
        return recorded()


def padded_rows(used: int, rows: int) -> int:
    """The next power of two, at most `rows`."""
    return min(1 << (used - 1).bit_length(), rows)


class CudaCapture:
    """Records steps as CUDA graphs, which share one memory pool for intermediate results."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # A failed capture does not restore the previous stream; the outer context does.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = step()

        def repeat() -> Tensor:
            graph.replay()
            return result

        return repeat
