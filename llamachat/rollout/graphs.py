"""The decode step as a recording, which a GPU repeats without Python: CUDA graphs, one for each shape of the step.

A recorded step reads and writes the same tensors each time, and no Python number changes in it: what is written where
comes from tensors, rows are filled up to a power of two, columns to a multiple of `RECORDED_COLUMNS`. The first
step of a shape runs without recording: libraries and kernels are set up in it, which no recording may contain.

No card has run this. Tests record and repeat on a stand-in for a CUDA device, and on a CPU operation by operation on
the same tensors, as a graph does it; the answers are those of the plain step.
"""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

RECORDED_COLUMNS = 128  # the columns of a layout are a multiple: few shapes recur, and a recording serves many layouts
MOST_RECORDINGS = 64  # each holds the launches of a whole step; the oldest goes

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]  # records a step without running it, and returns what runs the recording


class Recordings:
    """Steps by their shape: each recorded when it comes a second time, and repeated from then on."""

    def __init__(self, capture: Capture) -> None:
        self._capture: Capture | None = capture
        self._recordings: dict[Hashable, Step | None] = {}  # None: ran once, plainly

    def run(self, shape: Hashable, step: Step) -> Tensor:
        """The step's result: a tensor that the next run may write over."""
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
    """Records as CUDA graphs; all of them share the memory of what is computed in between."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # A capture that fails ends without going back to the stream that it left: the outer one does.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = step()

        def repeat() -> Tensor:
            graph.replay()
            return result

        return repeat
