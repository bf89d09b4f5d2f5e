"""The kernel in a captured graph: a replay follows every input that changed in place, and nothing else."""

from __future__ import annotations

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.checks import check, snapshot
from launches.places import bring_back, bytes_of, on
from launches.problem import prepare

from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel

pytestmark = pytest.mark.gpu

NAMES = ("plain", "rows-full-width", "shuffle", "e4m3fn-scaled", "slots-skip", "sequence", "whole", "gated-gemma")


@pytest.mark.parametrize("name", NAMES)
def test_replays_follow_every_input(name):
    captured, later = prepare(VARIANTS[name], seed=0), prepare(VARIANTS[name], seed=1)
    there = on(captured, "cuda")
    program = kernel()

    def launch():
        program[captured.grid](**there.arguments(program), num_warps=captured.launch.tile.num_warps)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    before = snapshot(later)
    for tensor, value in zip(there.tensors.values(), later.tensors.values(), strict=True):
        if tensor is not None:
            bytes_of(tensor).copy_(bytes_of(value))
    graph.replay()
    bring_back(there, later)
    check(later, before)
