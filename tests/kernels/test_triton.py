"""The Triton kernel on a GPU, variant by variant, against float64 and byte by byte; and its arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.checks import check, snapshot
from launches.places import bring_back, on
from launches.problem import Prepared, Variant, prepare
from torch import Tensor

import fx_fusion
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import converts_float8, kernel, plan
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, choose_tile, tile_for_any


def launch(prepared: Prepared, **changed: object) -> None:
    program = kernel()
    arguments = {**prepared.arguments(program), **changed}
    program[prepared.grid](**arguments, num_warps=prepared.launch.tile.num_warps)


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
    assert there.options.return_k
    q_out, k_out = triton.Triton().run(there.call)
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


def call(**changes) -> Call[Tensor]:
    """The plain call, with other tensors or other options."""
    plain = prepare(Variant(tile=None)).call
    tensors = {name: changes.pop(name) for name in plain.tensors if name in changes}
    return replace(plain, **tensors, options=replace(plain.options, **changes))


REFUSED = [
    ({"k": torch.zeros(1, 5, 2, 128)}, r"arguments q, k, v: .*found bfloat16, float32, bfloat16"),
    ({"q": torch.zeros(1, 5, 4, 1024, dtype=torch.bfloat16)}, "argument head_dim: expected at most 512, found 1024"),
    ({"q_weight": None}, "arguments q_weight, k_weight: expected two of one dtype or none"),
    ({"k_weight": torch.zeros(128)}, "arguments q_weight, k_weight: expected two of one dtype or none"),
    ({"k_eps": None}, "arguments q_eps, k_eps: expected two or none"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_the_kernel_would_not_notice_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        planned(call(**change))


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"argument q: expected a tensor on a CUDA or ROCm device .* found cpu"):
        triton.Triton().run(call(return_k=False))


def test_more_work_shares_more_and_heads_of_any_width_fill_a_thread_alike():
    tiles = [choose_tile(tokens, 32, 8, 128) for tokens in (1, 256, 4096)]
    assert [tile.heads for tile in tiles] == [1, 4, 4]
    narrow, wide = choose_tile(4096, 32, 8, 64), choose_tile(4096, 32, 8, 256)
    assert narrow.tokens * 64 == tiles[-1].tokens * 128
    assert wide.num_warps == tiles[-1].num_warps
    assert choose_tile(4096, 32, 8, 128, wave_size=64).tokens == 2 * tiles[-1].tokens


def planned(call, tile=None):
    return triton._plan_once(call, tile)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_launch_of_any_size_serves_all_heads_of_its_tile_or_one(head_dim):
    """The kernel holds code for these two only."""
    tiles = [tile_for_any(work, head_dim) for work in (0, 1, 5119, 5120, 10240, 1 << 40)]
    assert [tile.heads_per_program for tile in tiles] == [1] * 3 + [tiles[0].heads] * 3


def test_calls_that_differ_in_contents_alone_are_planned_once():
    first = call()
    alike = first.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
    launch = planned(first)
    assert planned(replace(alike, options=replace(alike.options, axes=tuple(list(alike.options.axes))))) is launch
    assert launch == plan(first)


def wider(tensor):
    return torch.empty_strided(tensor.shape, [2 * stride for stride in tensor.stride()], dtype=tensor.dtype)


@pytest.mark.parametrize("names", [("q",), ("k", "v"), ("cos",), ("positions",), ("slots",)])
def test_other_strides_are_planned_anew(names):
    first = call()
    other = call(**{name: wider(first.tensors[name]) for name in names})
    launch = planned(first)
    assert planned(other) == plan(other) != launch


def test_another_dtype_and_other_sizes_are_planned_anew():
    first = call()
    launch = planned(first)
    for changes in (
        {"k_cache": first.k_cache.to(torch.float8_e5m2)},
        {"cos": first.cos[:-1], "sin": first.sin[:-1]},
    ):
        other = call(**changes)
        assert planned(other) == plan(other) != launch


@pytest.mark.parametrize("change", [{"q_eps": 0.5}, {"saturate": True}, {"axes": (1,) * 64}, {"rotary_dim": 64}])
def test_other_options_are_planned_anew(change):
    first, other = call(), call(**change)
    launch = planned(first)
    assert planned(other) == plan(other) != launch
    assert planned(first, Tile(1, 1)).tile == Tile(1, 1)


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(triton, "_MOST_PLANS", 3)
    for eps in range(1, 10):
        planned(call(k_eps=1.0 / eps))
    assert len(triton._plans) <= 3


def test_lanes_further_apart_than_the_kernel_counts_are_refused():
    meta = prepare(Variant(), device="meta").call
    far = meta.options.v_layout._replace(lane_stride=1 << 24)
    with pytest.raises(ValueError, match="argument v_cache: expected the lanes of a row within 2\\^31 elements"):
        plan(replace(meta, options=replace(meta.options, v_layout=far)))
