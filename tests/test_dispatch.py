"""Which kernel `auto` calls: by what was measured, for the number of tokens of the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prologue import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SLOTS, Prologue, arguments
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import fx_fusion
from fx_fusion.decline import Decline
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Timing, Tuned, to_json
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import is_contiguous, is_packed_qkv
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.reference import Reference
from fx_fusion.kernels.qk_norm_rope_cache.shape import shape_of
from fx_fusion.kernels.qk_norm_rope_cache.triton.implementation import Triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, tile_to_json
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call
from fx_fusion.kernels.target import Target
from fx_fusion.testing import assert_fuses

HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", "0.1.5")
SHAPE = Shape(32, 8, 128, 128, "bfloat16")
TILE = {"triton": tile_to_json(Tile(2, 1))}
#: aiter wins up to 64 tokens, did not run at 512, and loses from 1024 on.
TIMINGS = (
    Timing(1, {"triton": 3.0, "aiter": 2.0}, TILE), Timing(64, {"triton": 5.0, "aiter": 4.9}, TILE),
    Timing(512, {"triton": 7.0}, TILE), Timing(1024, {"triton": 9.0, "aiter": 30.0}, TILE),
)  # fmt: skip


@pytest.fixture
def both(monkeypatch):
    """Both kernels run on AMD."""
    monkeypatch.setattr(aiter, "installed", lambda: None)
    monkeypatch.setattr(Triton, "unavailable", lambda self, target: None)


@pytest.fixture
def measured(both, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(to_json(Tuned(HERE, "2.13.0", "2026-11-23", {SHAPE: TIMINGS})))
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    return path


def symbol(env):
    """A number of tokens that is known when the graph runs."""
    source = ConstantSource("tokens")
    return env.create_symintnode(env.create_symbol(7, source, DimDynamic.DYNAMIC), hint=7, source=source)


def call(count, shape=SHAPE, **changes) -> Call[Tensor]:
    """A typical call of `count` tokens, None for a symbolic number; with other tensors, made of those."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        made = typical_call(shape, symbol(env) if count is None else count, torch.device("cpu"))
        return replace(made, **{name: change(made.tensors[name]) for name, change in changes.items()})


def automatic(count, target="gfx942", **changes):
    return OPERATION.choose("auto", call(count, **changes), Target(target))


@pytest.mark.parametrize("count", [None, 1, 256, 16384])
def test_without_measurements_triton_comes_first(both, count):
    assert automatic(count) == "triton"


@pytest.mark.parametrize(
    ("count", "kernel"),
    [(1, "aiter"), (63, "aiter"), (64, "aiter"), (512, "triton"), (1024, "triton"), (99999, "triton")],
)
def test_the_faster_one_for_this_number_of_tokens(measured, count, kernel):
    assert automatic(count) == kernel


def test_a_symbolic_number_of_tokens_keeps_the_order(measured):
    assert automatic(None) == "triton"


def test_a_kernel_that_refuses_is_not_called_however_fast(measured):
    assert automatic(1, v=Tensor.clone) == "triton"


def test_another_shape_keeps_the_order(measured):
    assert automatic(1, shape=SHAPE._replace(num_heads=16)) == "triton"


def test_a_target_elsewhere_keeps_the_order(measured):
    assert automatic(1, target="gfx950") == "triton"


def test_a_kernel_asked_for_by_name_is_called_however_slow(measured):
    assert OPERATION.choose("aiter", call(4096), Target("gfx942")) == "aiter"


def test_a_choice_adds_no_guard(measured):
    asked = call(None)
    env = asked.q.fake_mode.shape_env
    before = len(env.guards)
    OPERATION.choose("auto", asked, Target("gfx942"))
    assert OPERATION.eligible(asked) == {"triton": None, "aiter": None}
    assert len(env.guards) == before


def test_none_serves():
    with pytest.raises(Decline, match="no fast kernel serves on cpu"):
        automatic(1, target="cpu")


# --- what a match tells ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What every match amounts to that is read while the test runs."""
    found = []
    read = fx_fusion.QkNormRopeCache.read

    def keep(self, analysis, candidate, memo):
        lowered = read(self, analysis, candidate, memo)
        found.append(lowered.call)
        return lowered

    monkeypatch.setattr(fx_fusion.QkNormRopeCache, "read", keep)
    return found


class ByBlocks(Prologue):
    def store(self, cache, slots, value):
        cache[slots // 16, slots % 16] = value


class WithFurtherColumns(Prologue):
    """The projection has more columns than the three take."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        out = self.qkv_proj.out_features
        self.qkv_proj = torch.nn.Linear(self.qkv_proj.in_features, out + HEAD_DIM, bias=False)

    def split(self, qkv):
        return super().split(qkv[:, : (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM])


class Given(Prologue):
    """The projection is an argument."""

    def project(self, x):
        return x


def test_the_number_of_tokens(calls):
    assert_fuses(Prologue(), arguments(5), count=1)
    assert shape_of(calls[0]) == (Shape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, "float32"), 5)
    assert is_packed_qkv(calls[0])
    assert calls[0].blocks is None


def test_a_symbolic_number_of_tokens(calls):
    args = arguments(5)
    for tensor, dim in zip(args[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    assert_fuses(Prologue(), args, count=1, dynamic=None)
    assert isinstance(shape_of(calls[0])[1], torch.SymInt)
    assert is_packed_qkv(calls[0])


def test_the_block_size(calls):
    paged = (SLOTS // 16, 16, NUM_KV_HEADS, HEAD_DIM)
    assert_fuses(ByBlocks(), arguments(cache=paged), count=1)
    assert calls[0].blocks is not None
    assert calls[0].options.k_layout.block_size == 16


def test_columns_that_no_head_has(calls):
    assert_fuses(WithFurtherColumns(), arguments(), count=1)
    assert not is_packed_qkv(calls[0])


def test_a_projection_that_lies_in_a_wider_tensor(calls):
    _, *others = arguments()
    wide = torch.randn(5, 2, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    for projection in (wide[:, 0], wide[:, 0].contiguous()):
        assert_fuses(Given(), (projection, *others), count=1)
    assert list(dict.fromkeys(is_packed_qkv(each) for each in calls)) == [False, True]


@pytest.mark.parametrize(
    ("size", "stride", "contiguous"),
    [((3, 8), (8, 1), True), ((3, 8), (16, 1), False), ((3, 8), (1, 3), False), ((1, 8), (99, 1), True),
     ((2, 3, 8), (24, 8, 1), True), ((2, 3, 8), (8, 16, 1), False)],
)  # fmt: skip
def test_contiguous(size, stride, contiguous):
    assert is_contiguous(torch.empty_strided(size, stride)) is contiguous


# --- the compile cache ------------------------------------------------------------------------------------------------


def test_uuid_follows_the_measurements(measured, monkeypatch):
    before = fx_fusion.FusionPass().uuid()
    assert before == fx_fusion.FusionPass().uuid()
    measured.write_text(measured.read_text().replace("4.9", "5.1"))
    changed = fx_fusion.FusionPass().uuid()
    measured.unlink()
    missing = fx_fusion.FusionPass().uuid()
    monkeypatch.setenv("FX_FUSION_TUNED", "off")
    assert len({before, changed, missing, fx_fusion.FusionPass().uuid()}) == 4


@pytest.mark.parametrize("package", ["triton", "aiter"])
def test_uuid_follows_versions(package, monkeypatch):
    before = fx_fusion.FusionPass().uuid()
    home = f"fx_fusion.kernels.qk_norm_rope_cache.{package}.implementation"
    monkeypatch.setattr(f"{home}.{package}_version", lambda: "99.0")
    assert fx_fusion.FusionPass().uuid() != before


def test_uuid_follows_what_is_registered():
    class Another(Reference):
        name = "another"

        def version(self):
            return "1.0"

    before = fx_fusion.FusionPass().uuid()
    registered = OPERATION.register(Another())
    with_another = fx_fusion.FusionPass().uuid()
    registered.remove()
    assert with_another != before == fx_fusion.FusionPass().uuid()
