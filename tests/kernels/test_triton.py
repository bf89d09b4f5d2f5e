"""The Triton kernel on a GPU, variant by variant, against float64 and byte by byte; and its arguments."""

from __future__ import annotations

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.checks import check, snapshot
from launches.places import bring_back, on
from launches.problem import Prepared, Variant, prepare

import fx_fusion
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import converts_float8, plan
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, choose_tile, tile_for_any


def launch(prepared: Prepared, **changed: object) -> None:
    kernel = triton.kernel()
    arguments = {**prepared.arguments(kernel), **changed}
    kernel[prepared.grid](**arguments, num_warps=prepared.launch.tile.num_warps)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    prepared = prepare(VARIANTS[name])
    before = snapshot(prepared)
    there = on(prepared, "cuda")
    launch(there)
    bring_back(there, prepared)
    check(prepared, before)


CONVERTED = [
    name for name, variant in VARIANTS.items() if variant.stored_dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONVERTED)
def test_the_converter_gives_the_same_bytes(name):
    if not converts_float8(torch.device("cuda")):
        pytest.skip("this GPU has no converter that the kernel uses")
    prepared = prepare(VARIANTS[name])
    before = snapshot(prepared)
    there = on(prepared, "cuda")
    launch(there, CONVERTS_FLOAT8=True)
    bring_back(there, prepared)
    check(prepared, before)


@pytest.mark.gpu
def test_the_operation_launches_it():
    prepared = prepare(Variant(tile=None))
    before = snapshot(prepared)
    there = on(prepared, "cuda")
    operands = [tensor for name, tensor in there.tensors.items() if name not in ("q_out", "k_out")]
    q_out, k_out = triton.qk_norm_rope_cache(*operands, return_k=True, **there.options)
    there.tensors["q_out"].copy_(q_out)
    there.tensors["k_out"].copy_(k_out)
    bring_back(there, prepared)
    check(prepared, before)


@pytest.mark.gpu
def test_no_token_launches_nothing():
    empty = torch.empty(1, 0, 2, 64, device="cuda")
    cos = torch.empty(1, 0, 32, device="cuda")
    slots = torch.empty(1, 0, dtype=torch.int64, device="cuda")
    caches = torch.zeros(2, 1, 8, 2, 64, device="cuda")
    q_out, _ = fx_fusion.qk_norm_rope_cache(
        empty, empty, empty, None, None, cos, cos, None, slots, None, caches[0], caches[1], q_eps=1e-6, k_eps=1e-6,
        rotary_dim=64, axes=[0] * 32, implementation="triton",
    )  # fmt: skip
    assert q_out.shape == empty.shape
    assert not bool(caches.any())


def arguments(**changes):
    prepared = prepare(Variant(tile=None))
    tensors = {**prepared.tensors, **changes}
    return [tensor for name, tensor in tensors.items() if name not in ("q_out", "k_out")], prepared.options


REFUSED = [
    ({"k": torch.zeros(1, 5, 2, 128)}, r"arguments q, k, v: .*found bfloat16, float32, bfloat16"),
    ({"q": torch.zeros(1, 5, 4, 1024, dtype=torch.bfloat16)}, "argument q: expected a head_dim of at most 512"),
    ({"q_weight": None}, "arguments q_weight, k_weight: expected two of one dtype or none"),
    ({"k_weight": torch.zeros(128)}, "arguments q_weight, k_weight: expected two of one dtype or none"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_the_kernel_would_not_notice_is_refused(change, message):
    operands, options = arguments(**change)
    with pytest.raises(ValueError, match=message):
        plan(*operands, **options)


def test_one_eps_is_refused():
    operands, options = arguments()
    with pytest.raises(ValueError, match="arguments q_eps, k_eps: expected two or none"):
        plan(*operands, **{**options, "k_eps": None})


def test_a_tensor_on_the_cpu_is_refused():
    operands, options = arguments()
    with pytest.raises(ValueError, match=r"argument q: expected a tensor on a CUDA or ROCm device .* found cpu"):
        triton.qk_norm_rope_cache(*operands, return_k=False, **options)


def test_more_work_shares_more_and_heads_of_any_width_fill_a_thread_alike():
    tiles = [choose_tile(tokens, 32, 8, 128) for tokens in (1, 256, 4096)]
    assert [tile.heads for tile in tiles] == [1, 4, 4]
    narrow, wide = choose_tile(4096, 32, 8, 64), choose_tile(4096, 32, 8, 256)
    assert narrow.tokens * 64 == tiles[-1].tokens * 128
    assert wide.num_warps == tiles[-1].num_warps
    assert choose_tile(4096, 32, 8, 128, wave_size=64).tokens == 2 * tiles[-1].tokens


def planned(operands, options, tile=None):
    return triton._plan_once(operands, options, tile)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_launch_of_any_size_serves_all_heads_of_its_tile_or_one(head_dim):
    """The kernel holds code for these two only."""
    tiles = [tile_for_any(work, head_dim) for work in (0, 1, 5119, 5120, 10240, 1 << 40)]
    assert [tile.heads_per_program for tile in tiles] == [1] * 3 + [tiles[0].heads] * 3


def test_calls_that_differ_in_contents_alone_are_planned_once():
    operands, options = arguments()
    launch = planned(operands, options)
    alike = [t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in operands]
    assert planned(alike, {**options, "axes": list(options["axes"])}) is launch
    assert launch == plan(*operands, **options)


def wider(tensor):
    return torch.empty_strided(tensor.shape, [2 * stride for stride in tensor.stride()], dtype=tensor.dtype)


@pytest.mark.parametrize("names", [("q",), ("k", "v"), ("cos",), ("positions",), ("slots",)])
def test_other_strides_are_planned_anew(names):
    operands, options = arguments()
    tensors = prepare(Variant(tile=None)).tensors
    others, _ = arguments(**{name: wider(tensors[name]) for name in names})
    launch = planned(operands, options)
    assert planned(others, options) == plan(*others, **options) != launch


def test_another_dtype_and_other_sizes_are_planned_anew():
    operands, options = arguments()
    launch = planned(operands, options)
    tensors = prepare(Variant(tile=None)).tensors
    for changes in (
        {"k_cache": tensors["k_cache"].to(torch.float8_e5m2)},
        {"cos": tensors["cos"][:-1], "sin": tensors["sin"][:-1]},
    ):
        others, _ = arguments(**changes)
        assert planned(others, options) == plan(*others, **options) != launch


@pytest.mark.parametrize("change", [{"q_eps": 0.5}, {"saturate": True}, {"axes": [1] * 64}, {"rotary_dim": 64}])
def test_other_options_are_planned_anew(change):
    operands, options = arguments()
    launch = planned(operands, options)
    assert planned(operands, {**options, **change}) == plan(*operands, **{**options, **change}) != launch
    assert planned(operands, options, Tile(1, 1)).tile == Tile(1, 1)


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(triton, "_MOST_PLANS", 3)
    operands, options = arguments()
    for eps in range(1, 10):
        planned(operands, {**options, "k_eps": 1.0 / eps})
    assert len(triton._plans) <= 3


def test_lanes_further_apart_than_the_kernel_counts_are_refused():
    prepared = prepare(Variant(), device="meta")
    names = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "positions", "slots", "blocks", "k_scale", "v_scale")
    operands = [prepared.tensors[name] for name in (*names, "k_cache", "v_cache")]
    far = prepared.options["v_layout"]._replace(lane_stride=1 << 24)
    with pytest.raises(ValueError, match="argument v_cache: expected the lanes of a row within 2\\^31 elements"):
        plan(*operands, **{**prepared.options, "v_layout": far})
