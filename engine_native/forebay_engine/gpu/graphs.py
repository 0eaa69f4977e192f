"""Steps that are recorded once and replayed: one call then launches hundreds of kernels.

A recorded step has fixed shapes and reads and writes fixed places in memory, so there is one for
each of some numbers of rows, and a step is filled up to the next of them. The largest is recorded
first: its memory is the pool that the smaller ones find room in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

#: What replays a recorded step.
Replay = Callable[[], object]


class Recorder(Protocol):
    """Makes replays of ``step``, which may be run several times before."""

    def record(self, step: Callable[[], object]) -> Replay:
        """``step`` takes no input but what lies in tensors that outlive the replay, and leaves its
        output in such tensors."""
        ...


class CudaRecorder:
    """CUDA graphs, all in one pool of memory, recorded on a stream of their own."""

    #: Runs before the recording: kernels are compiled and libraries take their workspace, which
    #: can't be done in a recording.
    _WARM_UPS = 2

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], object]) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self._WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph.replay


def buckets(most: int) -> Iterator[int]:
    """Numbers of rows that steps are recorded for, falling.

    A step is filled up by at most 7 rows, or from 256 on by a ninth.
    """
    sizes = {1, 2, 4, *range(8, min(most, 256) + 1, 8), *range(288, most + 1, 32), most}
    return iter(sorted((size for size in sizes if size <= most), reverse=True))


def bucket(sizes: Iterable[int], rows: int) -> int | None:
    """The smallest size that so many rows fit into."""
    return min((size for size in sizes if size >= rows), default=None)
