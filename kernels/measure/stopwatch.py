"""How long a launch takes on the device, cold: as in a model, where other layers ran since."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

REPLAYS = 7
#: Larger than any cache in front of a GPU's memory (an MI300X has 256 MiB).
FLUSH_BYTES = 512 << 20


def microseconds(call: Callable[[int], object], count: int, device: torch.device) -> float:
    """Of one call: the median of several replays of one captured graph of ``call(0) … call(count - 1)``.

    Each call should have tensors of its own. Before each replay the caches are overwritten, so that every call reads
    from memory.
    """
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        graph = _capture(call, count)
        samples = [_replay(graph, flush) / count for _ in range(REPLAYS)]
        graph.reset()
    return statistics.median(samples)


def _capture(call: Callable[[int], object], count: int) -> torch.cuda.CUDAGraph:
    # What a first call compiles and checks may not be captured, and tensors of another alignment compile anew.
    for index in range(count):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the end: else all calls would write their results to the same memory, which stays cached.
        kept = [call(index) for index in range(count)]
    del kept
    return graph


def _replay(graph: torch.cuda.CUDAGraph, flush: torch.Tensor) -> float:
    flush.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(stop)
