"""Which kernel `auto` calls: by what was measured, for the number of tokens of the call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from prologue import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SLOTS, Prologue, arguments

import fx_fusion
from fx_fusion.decline import Decline
from fx_fusion.kernels import dispatch
from fx_fusion.kernels.dispatch import choose
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Timing, Tuned, to_json
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile
from fx_fusion.kernels.target import Problem, Target
from fx_fusion.patterns.qk_norm_rope_cache import fusion as builtin
from fx_fusion.testing import assert_fuses

HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", "0.1.5")
TILE = Tile(2, 1)
#: aiter wins up to 64 tokens, did not run at 512, and loses from 1024 on.
TIMINGS = (
    Timing(1, TILE, 3.0, 2.0), Timing(64, TILE, 5.0, 4.9), Timing(512, TILE, 7.0), Timing(1024, TILE, 9.0, 30.0),
)  # fmt: skip
SERVED = Problem(
    num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, is_neox=True, gemma_norm=False, q_eps=1e-6, k_eps=1e-6,
    dtype=torch.bfloat16, cache_dtype=torch.bfloat16, weight_dtypes=(torch.bfloat16, torch.bfloat16),
    angle_dtype=torch.bfloat16, packed_qkv=True, packed_table=True, positions_dtype=torch.int64, num_axes=1,
    axes=(0,) * 64, slots_dtype=torch.int64, separate_blocks=False, per_sequence_cache=False,
    cache_stride=(16384, 1024, 128, 1), return_k=False, skip_negative_slots=False,
)  # fmt: skip


@pytest.fixture
def both(monkeypatch):
    """Both kernels run on AMD."""
    monkeypatch.setattr(aiter, "installed", lambda: None)
    everywhere = dataclasses.replace(triton.KERNEL, unavailable=lambda target: None)
    monkeypatch.setattr(dispatch, "FAST", (everywhere, aiter.KERNEL))


@pytest.fixture
def measured(both, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    shape = Shape(32, 8, 128, 128, "bfloat16")
    path.write_text(to_json(Tuned(HERE, "2.13.0", "2026-11-23", {shape: TIMINGS})))
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    return path


def automatic(count, target="gfx942", **changes):
    return choose("auto", dataclasses.replace(SERVED, num_tokens=count, **changes), Target(target))


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
    assert automatic(1, packed_qkv=False) == "triton"


def test_another_shape_keeps_the_order(measured):
    assert automatic(1, num_heads=16) == "triton"


def test_a_target_elsewhere_keeps_the_order(measured):
    assert automatic(1, target="gfx950") == "triton"


def test_a_kernel_asked_for_by_name_is_called_however_slow(measured):
    assert choose("aiter", dataclasses.replace(SERVED, num_tokens=4096), Target("gfx942")) == "aiter"


def test_none_serves(monkeypatch):
    with pytest.raises(Decline, match="no fast kernel serves on cpu"):
        automatic(1, target="cpu")


# --- what a match tells ---------------------------------------------------------------------------------------------


@pytest.fixture
def problems(monkeypatch):
    """Every problem that is described while the test runs."""
    found = []
    original = builtin._problem

    def keep(match):
        found.append(original(match))
        return found[-1]

    monkeypatch.setattr(builtin, "_problem", keep)
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


def test_the_number_of_tokens(problems):
    assert_fuses(Prologue(), arguments(5), count=1)
    assert problems[0].num_tokens == 5
    assert problems[0].packed_qkv
    assert problems[0].block_size is None


def test_a_symbolic_number_of_tokens(problems):
    args = arguments(5)
    for tensor, dim in zip(args[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    assert_fuses(Prologue(), args, count=1, dynamic=None)
    assert problems[0].num_tokens is None
    assert problems[0].packed_qkv


def test_the_block_size(problems):
    paged = (SLOTS // 16, 16, NUM_KV_HEADS, HEAD_DIM)
    assert_fuses(ByBlocks(), arguments(cache=paged), count=1)
    assert problems[0].separate_blocks
    assert problems[0].block_size == 16


def test_columns_that_no_head_has(problems):
    assert_fuses(WithFurtherColumns(), arguments(), count=1)
    assert not problems[0].packed_qkv


def test_a_projection_that_lies_in_a_wider_tensor(problems):
    _, *others = arguments()
    wide = torch.randn(5, 2, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    for projection in (wide[:, 0], wide[:, 0].contiguous()):
        assert_fuses(Given(), (projection, *others), count=1)
    assert list(dict.fromkeys(problem.packed_qkv for problem in problems)) == [False, True]


@pytest.mark.parametrize(
    ("size", "stride", "contiguous"),
    [((3, 8), (8, 1), True), ((3, 8), (16, 1), False), ((3, 8), (1, 3), False), ((1, 8), (99, 1), True),
     ((2, 3, 8), (24, 8, 1), True), ((2, 3, 8), (8, 16, 1), False)],
)  # fmt: skip
def test_contiguous(size, stride, contiguous):
    node = torch.fx.Graph().placeholder("data")
    node.meta["val"] = torch.empty_strided(size, stride)
    assert builtin._is_contiguous(node) is contiguous


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
    monkeypatch.setattr("fx_fusion.fusion_pass." + f"{package}_version", lambda: "99.0")
    assert fx_fusion.FusionPass().uuid() != before
