"""On a GPU that launches early: no operand is read, and no cache written, ahead of what the kernel before does to it.

That kernel lets its dependents launch at once, and does its work two milliseconds later. Each race is run without the
wait too, and lost, which shows that it is one.
"""

from __future__ import annotations

import pytest
import torch
from launches.places import bytes_of, on
from launches.problem import Prepared, Variant, prepare
from on_gpu import fused_and_eager
from prologue import Prologue, arguments
from torch import Tensor

from fx_fusion.kernels import triton
from fx_fusion.kernels.tile import Tile
from fx_fusion.kernels.triton_launch import launches_early

tl = pytest.importorskip("triton.language")
import triton as triton_package  # noqa: E402
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not launches_early(torch.device("cuda", 0)), reason="launches nothing early"
    ),
]

VARIANT = Variant(
    seq=9, blocks=True, cache_dtype=torch.float8_e4m3fn, k_scale="tensor", v_scale="tensor", tile=Tile(2, 1)
)
READ = ("q", "q_weight", "k_weight", "cos", "positions", "slots", "blocks", "k_scale", "v_scale")
WRITTEN = ("q_out", "k_out", "k_cache", "v_cache")
LATE = 2_000_000
BLOCK = 1024


@triton_package.jit
def copy_late(target, source, count, nanoseconds, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    start = globaltimer()
    now = start
    while now - start < nanoseconds:
        now = globaltimer()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count), mask=place < count)


def late(target: Tensor, source: Tensor) -> None:
    copy_late[(triton_package.cdiv(len(target), BLOCK),)](target, source, len(target), LATE, BLOCK)


def launch(prepared: Prepared, waits: bool) -> None:
    kernel = triton.kernel()
    arguments = {**prepared.arguments(kernel), "WAITS_FOR_PREDECESSOR": waits}
    kernel[prepared.grid](**arguments, num_warps=prepared.launch.tile.num_warps, launch_pdl=True)


def captured(step):
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Race:
    """One launch, on tensors whose storages can be put back."""

    def __init__(self) -> None:
        self.prepared = on(prepare(VARIANT), "cuda")
        self.storages = {name: bytes_of(t) for name, t in self.prepared.tensors.items() if t is not None}
        self.before = {name: bytes_.clone() for name, bytes_ in self.storages.items()}
        launch(self.prepared, waits=True)
        self.expected = self.results()

    def results(self) -> list[Tensor]:
        torch.cuda.synchronize()
        return [self.storages[name].clone() for name in WRITTEN]

    def restore(self) -> None:
        for name, bytes_ in self.before.items():
            self.storages[name].copy_(bytes_)

    def is_won(self, step, in_graph: bool) -> bool:
        run = captured(step) if in_graph else step
        for _ in range(3):
            self.restore()
            torch.cuda.synchronize()
            run()
            if not all(map(torch.equal, self.results(), self.expected)):
                return False
        return True


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("name", READ)
def test_an_operand_is_read_when_it_is_written(name, in_graph):
    race = Race()

    def step(waits=True):
        race.storages[name].zero_()
        late(race.storages[name], race.before[name])
        launch(race.prepared, waits)

    assert race.is_won(step, in_graph)
    assert not race.is_won(lambda: step(waits=False), in_graph)


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("name", ["k_cache", "v_cache", "q_out"])
def test_what_is_written_before_does_not_last(name, in_graph):
    race = Race()

    def step(waits=True):
        late(race.storages[name], race.before[name])
        launch(race.prepared, waits)

    assert race.is_won(step, in_graph)
    assert not race.is_won(lambda: step(waits=False), in_graph)


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_is_read_before_is_read_as_it_was(name, in_graph):
    race = Race()
    copy = torch.empty_like(race.storages[name])

    def is_won(waits):
        def step():
            late(copy, race.storages[name])
            launch(race.prepared, waits)

        return race.is_won(step, in_graph) and torch.equal(copy, race.before[name])

    assert is_won(waits=True)
    assert not is_won(waits=False)


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
def test_behind_a_copy_and_behind_another_stream(in_graph):
    """What is ahead of the launch need not be a kernel, nor in its stream."""
    race = Race()
    side = torch.cuda.Stream()

    def step():
        race.storages["positions"].zero_()
        race.storages["q"].zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late(race.storages["q"], race.before["q"])
        race.storages["positions"].copy_(race.before["positions"])
        torch.cuda.current_stream().wait_stream(side)
        launch(race.prepared, waits=True)

    assert race.is_won(step, in_graph)


@pytest.fixture
def options(monkeypatch):
    """Of every launch that Triton makes: the kernel's name, and whether it is early."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    seen, call = [], driver.CudaLauncher.__call__

    def record(self, *args, **kwargs):
        seen.append(bool(self.launch_pdl))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(driver.CudaLauncher, "__call__", record)
    return seen


def test_the_operation_is_launched_early(options):
    prepared = on(prepare(Variant(tile=None)), "cuda")
    operands = [tensor for name, tensor in prepared.tensors.items() if name not in ("q_out", "k_out")]
    triton.qk_norm_rope_cache(*operands, return_k=True, **prepared.options)
    assert options == [True]


def test_inductor_launches_it_early(options):
    outcome = fused_and_eager(Prologue(), arguments())
    assert "'launch_pdl': True" in outcome.code
    assert "'WAITS_FOR_PREDECESSOR': True" in outcome.code
    assert options.count(True) == 1
    for fused, eager in zip(outcome.fused, outcome.eager, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
