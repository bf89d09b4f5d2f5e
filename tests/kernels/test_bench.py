"""Checking and timing of kernels, as far as the CPU takes it: the stopwatch is a stand-in, and so are the kernels."""

from __future__ import annotations

import aiter_stand_in
import pytest
import torch

from fx_fusion.kernels.measure import bench
from fx_fusion.kernels.measure.bench import Bench, Refused
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache import reference, self_check
from fx_fusion.kernels.qk_norm_rope_cache.agreement import compare
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.triton.implementation import Triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import plan, wave_size_of
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, choose_tile
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call
from fx_fusion.kernels.target import Target

TRITON, AITER = (OPERATION.implementation(name) for name in ("triton", "aiter"))
CPU = torch.device("cpu")
LARGE = Shape(32, 8, 128, 128, "bfloat16")
SMALL = Shape(4, 2, 64, 64, "bfloat16")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Each call is made once, and takes as many microseconds as there are calls in a graph."""

    def pretend(call, count, device):
        for index in range(count):
            call(index)
        return float(count)

    monkeypatch.setattr(bench, "microseconds", pretend)
    monkeypatch.setattr(bench, "_BYTES", 1 << 16)
    self_check.clear()
    yield
    self_check.clear()


@pytest.fixture
def triton_here(on_the_cpu, monkeypatch):
    monkeypatch.setattr(Triton, "unavailable", lambda self, target: None)


class StandIn(Triton):
    """The reference in Triton's place."""

    def __init__(self, spoil=0.0):
        self.spoil = spoil

    def unavailable(self, target):
        return None

    def run(self, call, setting=None):
        assert setting == Tile(1, 1)
        q, k = reference.qk_norm_rope_cache(call)
        return q + self.spoil, k


def test_every_set_has_tensors_of_its_own(on_the_cpu):
    small = Bench(SMALL, 3, CPU)
    assert small.time(StandIn(), Tile(1, 1)) == len(small._calls) > 3
    addresses = {call.q.data_ptr() for call in small._calls}
    assert len(addresses) == len(small._calls)


def test_a_wrong_kernel_is_not_timed(on_the_cpu):
    with pytest.raises(Refused, match="q_out differs by"):
        Bench(SMALL, 3, CPU).time(StandIn(spoil=0.5), Tile(1, 1))


def test_a_kernel_that_raises_is_not_timed(triton_here):
    with pytest.raises(Refused, match="ValueError: argument q: expected a tensor on a CUDA"):
        Bench(SMALL, 3, CPU).time(TRITON, Tile(1, 1))


def test_a_kernel_that_refuses_the_call_is_not_timed(on_the_cpu, monkeypatch):
    monkeypatch.setattr(StandIn, "refuses", lambda self, call, target: f"{call.q.shape[3]} lanes on {target.name}")
    with pytest.raises(Refused, match="64 lanes on cpu"):
        Bench(SMALL, 3, CPU).time(StandIn(), Tile(1, 1))


@pytest.mark.parametrize("kernel", [TRITON, AITER], ids=lambda kernel: kernel.name)
def test_a_kernel_is_refused_where_it_does_not_run(on_the_cpu, kernel):
    with pytest.raises(Refused, match=kernel.name.capitalize() if kernel is TRITON else kernel.name):
        Bench(SMALL, 3, CPU).time(kernel, None)


def test_what_there_is_to_time():
    small = Bench(SMALL, 3, CPU)
    assert [kernel.name for kernel in small.kernels] == ["triton", "aiter"]
    assert small.settings(TRITON)[0] == choose_tile(3, 4, 2, 64)
    assert set(small.settings(TRITON)) >= set(candidates(2, 64, 32))
    assert small.settings(AITER) == [None]


@pytest.fixture
def aiter_here(on_the_cpu, monkeypatch):
    def install(module):
        monkeypatch.setattr(aiter, "_module", lambda: module)
        monkeypatch.setattr(aiter.Aiter, "unavailable", lambda self, target: None)

    return install


def test_aiter_is_timed(aiter_here):
    aiter_here(aiter_stand_in.Aiter())
    assert Bench(SMALL, 3, CPU).time(AITER, None) > 0


@pytest.mark.parametrize(
    ("module", "reason"),
    [(object, "RuntimeError: aiter"), (aiter_stand_in.OtherEps, "q_out differs by")],
    ids=["no function", "other eps"],
)
def test_an_aiter_that_is_wrong_is_not_timed(aiter_here, monkeypatch, module, reason):
    """A call of it would be served by another kernel, which agrees. What its own check finds counts, too."""
    monkeypatch.setattr(self_check.log, "warning", lambda *_: None)
    aiter_here(module())
    small = Bench(SMALL, 3, CPU)
    assert all(each.error <= each.allowed for each in compare(AITER.run, small._calls[0]))
    with pytest.raises(Refused, match=reason):
        small.time(AITER, None)


@pytest.mark.parametrize("shape", [LARGE, Shape(16, 2, 256, 64, "float16"), SMALL], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_a_typical_call_is_one_that_every_kernel_serves(shape, count):
    typical = typical_call(shape, count, CPU)
    assert all(not each.error for each in compare(reference.qk_norm_rope_cache, typical))
    for kernel in OPERATION:
        assert kernel.objects(typical, Target("gfx942")) is None
    for tile in candidates(shape.num_kv_heads, shape.head_dim, 64):
        assert plan(typical, tile).grid[0] > 0


# --- on a device ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_more_tokens_take_longer():
    gpu = torch.device("cuda")
    few, many = (Bench(LARGE, count, gpu).time(TRITON, choose_tile(count, 32, 8, 128)) for count in (1, 8192))
    assert 0.2 < few < many < 10_000


@pytest.mark.gpu
def test_every_candidate_is_right_on_this_device():
    gpu = torch.device("cuda")
    small = Bench(LARGE, 33, gpu)
    for tile in candidates(8, 128, wave_size_of(gpu)):
        assert small.time(TRITON, tile) > 0, tile
