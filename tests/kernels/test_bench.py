"""Checking and timing of kernels, as far as the CPU takes it: the stopwatch is a stand-in, and so are the kernels."""

from __future__ import annotations

import aiter_stand_in
import pytest
import torch

from fx_fusion.kernels.measure import bench
from fx_fusion.kernels.measure.bench import Bench, Refused
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.measure.typical_problem import typical_problem
from fx_fusion.kernels.qk_norm_rope_cache import reference, self_check
from fx_fusion.kernels.qk_norm_rope_cache.agreement import compare
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.aiter.call import Operands, Options, problem
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import plan, wave_size_of
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, choose_tile
from fx_fusion.kernels.target import Target

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


def stand_in(spoil=0.0):
    """The reference in Triton's place."""

    def launch(*operands, tile, **options):
        q, k = reference.qk_norm_rope_cache(*operands, **options)
        return q + spoil, k

    return launch


def test_every_set_has_tensors_of_its_own(on_the_cpu, monkeypatch):
    monkeypatch.setattr(triton, "qk_norm_rope_cache", stand_in())
    small = Bench(SMALL, 3, CPU)
    assert small.triton(Tile(1, 1)) == len(small._problems) > 3
    addresses = {each.operands[0].data_ptr() for each in small._problems}
    assert len(addresses) == len(small._problems)


def test_a_wrong_kernel_is_not_timed(on_the_cpu, monkeypatch):
    monkeypatch.setattr(triton, "qk_norm_rope_cache", stand_in(spoil=0.5))
    with pytest.raises(Refused, match="q_out differs by"):
        Bench(SMALL, 3, CPU).triton(Tile(1, 1))


def test_a_kernel_that_raises_is_not_timed(on_the_cpu):
    with pytest.raises(Refused, match="ValueError: argument q: expected a tensor on a CUDA"):
        Bench(SMALL, 3, CPU).triton(Tile(1, 1))


def test_aiter_is_refused_where_it_does_not_run(on_the_cpu):
    with pytest.raises(Refused, match="aiter"):
        Bench(SMALL, 3, CPU).aiter()


@pytest.fixture
def aiter_here(on_the_cpu, monkeypatch):
    def install(module):
        monkeypatch.setattr(aiter, "_module", lambda: module)
        monkeypatch.setattr(aiter, "KERNEL", aiter.KERNEL.__class__("aiter", lambda target: None, aiter.refuses))

    return install


def test_aiter_is_timed(aiter_here):
    aiter_here(aiter_stand_in.Aiter())
    assert Bench(SMALL, 3, CPU).aiter() > 0


def test_an_aiter_that_is_wrong_is_not_timed(aiter_here, monkeypatch):
    """Its entry then calls another kernel, which agrees: only the verdict tells."""
    monkeypatch.setattr(self_check.log, "warning", lambda *_: None)
    aiter_here(object())
    with pytest.raises(Refused, match="RuntimeError: aiter"):
        Bench(SMALL, 3, CPU).aiter()


@pytest.mark.parametrize("shape", [LARGE, Shape(16, 2, 256, 64, "float16"), SMALL], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_a_typical_problem_is_one_that_every_kernel_serves(shape, count):
    typical = typical_problem(shape, count, CPU)
    assert all(not each.error for each in compare(reference.qk_norm_rope_cache, typical))
    asked = problem(Operands(*typical.operands), Options(**typical.options))
    assert aiter.refuses(asked, Target("gfx942")) is None
    assert triton.refuses(asked, Target("gfx942")) is None
    options = {name: value for name, value in typical.options.items() if name != "return_k"}
    for tile in candidates(shape.num_kv_heads, shape.head_dim, 64):
        assert plan(*typical.operands, **options, tile=tile).grid[0] > 0


# --- on a device ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_more_tokens_take_longer():
    gpu = torch.device("cuda")
    few, many = (Bench(LARGE, count, gpu).triton(choose_tile(count, 32, 8, 128)) for count in (1, 8192))
    assert 0.2 < few < many < 10_000


@pytest.mark.gpu
def test_every_candidate_is_right_on_this_device():
    gpu = torch.device("cuda")
    small = Bench(LARGE, 33, gpu)
    for tile in candidates(8, 128, wave_size_of(gpu)):
        assert small.triton(tile) > 0, tile
