"""The Triton kernel on a GPU, variant by variant, against float64 and byte by byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from amdgcn.launches import Prepared, Variant, prepare

from fx_fusion.kernels import reference, triton
from fx_fusion.kernels.triton import Tile

pytestmark = pytest.mark.gpu

fp8 = torch.float8_e4m3fn

VARIANTS = {
    "plain": Variant(),
    "one tile for all": Variant(seq=3, tile=Tile(16, 2, 4)),
    "small tile": Variant(seq=7, tile=Tile(2, 1)),
    "some heads a program": Variant(seq=9, num_heads=5, num_kv_heads=3, tile=Tile(2, 1, 4, heads_per_program=3)),
    "heads left over": Variant(seq=9, num_heads=5, num_kv_heads=3, tile=Tile(4, 1, 2)),
    "many tokens": Variant(seq=40, num_heads=8, tile=Tile(8, 1, 4)),
    "batch": Variant(batch=3, seq=4),
    "float16": Variant(dtype=torch.float16),
    "float32": Variant(dtype=torch.float32),
    "float32 weights and table": Variant(weight_dtype=torch.float32, angle_dtype=torch.float32),
    "int32 indices": Variant(index_dtype=torch.int32),
    "gated": Variant(gated=True),
    "gemma": Variant(gemma_norm=True),
    "no norm": Variant(q_weights=False, k_weights=False, q_eps=None, k_eps=None),
    "norm without weight": Variant(q_weights=False, k_weights=False),
    "two epsilons": Variant(q_eps=1e-2, k_eps=1e-6),
    "gpt-j": Variant(is_neox=False),
    "gpt-j rows, one angle a lane": Variant(is_neox=False, table=False, full_width=True),
    "partial": Variant(rotary_dim=64),
    "partial gpt-j": Variant(rotary_dim=32, is_neox=False),
    "gated partial gemma 256": Variant(
        head_dim=256, rotary_dim=64, gated=True, gemma_norm=True, num_heads=16, num_kv_heads=2
    ),
    "rope": Variant(axes="one"),
    "sectioned": Variant(axes="sectioned"),
    "four axes": Variant(axes="any"),
    "rows": Variant(table=False),
    "rows, one angle a lane": Variant(table=False, full_width=True),
    "table, one angle a lane": Variant(full_width=True),
    **{f"head_dim {d}": Variant(head_dim=d) for d in (16, 64, 72, 80, 96, 112, 192, 256, 512)},
    **{f"cache {c}": Variant(cache=c) for c in ("HND", "packed", "shuffle")},
    **{f"cache {c} by blocks": Variant(cache=c, blocks=True) for c in ("NHD", "HND", "packed", "shuffle")},
    "a cache per sequence": Variant(cache="sequence", batch=3, seq=2),
    "one kv head": Variant(num_heads=8, num_kv_heads=1),
    "odd heads": Variant(num_heads=5, num_kv_heads=3),
    "no k_out": Variant(return_k=False),
    "slots anywhere": Variant(slots="outside", seq=9),
    "slots anywhere, negative skipped": Variant(slots="outside", seq=9, skip_negative_slots=True),
    "slots anywhere by blocks": Variant(slots="outside", seq=9, blocks=True),
    "float16 cache": Variant(cache_dtype=torch.float16),
    "float32 cache": Variant(cache_dtype=torch.float32),
    "scaled": Variant(k_scale=0.7, v_scale="tensor"),
    **{
        f"{str(dtype)[6:]}{' saturating' if saturate else ''}": Variant(
            cache_dtype=dtype, k_scale=0.004, v_scale="tensor", saturate=saturate
        )
        for dtype in (fp8, torch.float8_e4m3fnuz, torch.float8_e5m2)
        for saturate in (False, True)
    },
    "float8 shuffle": Variant(cache_dtype=fp8, cache="shuffle", blocks=True, k_scale=0.5),
    "float8 without scale": Variant(cache_dtype=fp8),
}


def copied(tensors: dict[str, torch.Tensor | None], device: str) -> dict[str, torch.Tensor | None]:
    """The same views of copies of the same storages, on `device`."""
    storages: dict[int, Any] = {}

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = bytes_of(tensor).to(device, copy=True).untyped_storage()
        there = torch.empty(0, dtype=tensor.dtype, device=device)
        return there.set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    return {name: copy(tensor) for name, tensor in tensors.items()}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def launch(prepared: Prepared, tensors: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    operands = [tensor for name, tensor in tensors.items() if name not in ("q_out", "k_out")]
    return triton.qk_norm_rope_cache(
        *operands, return_k=prepared.variant.return_k, tile=prepared.variant.tile, **prepared.options
    )


def expected_rotation(prepared: Prepared, name: str) -> torch.Tensor:
    """In float64, from the very numbers that the kernel read."""
    tensors, options = prepared.tensors, prepared.options
    wide = {
        key: value.double() if value is not None and value.is_floating_point() else value
        for key, value in tensors.items()
        if key in ("q", "k", "q_weight", "k_weight", "cos", "sin", "positions")
    }
    cos, sin, positions = wide["cos"], wide["sin"], wide["positions"]
    layout = (options["rotary_dim"], options["is_neox"])
    if positions is not None:
        cos, sin = (reference.look_up(table, positions.long(), options["axes"], *layout) for table in (cos, sin))
    return reference.norm_rope(
        wide[name], wide[f"{name}_weight"], options[f"{name}_eps"], options["gemma_norm"], cos, sin, *layout
    )


def token_places(prepared: Prepared, name: str) -> list[tuple[int, int, int, int]]:
    """(batch, seq, block, slot) of every token that is stored."""
    slots, blocks, layout = prepared.tensors["slots"], prepared.tensors["blocks"], prepared.options[f"{name}_layout"]
    batch, seq = prepared.tensors["q"].shape[:2]
    places = []
    for b in range(batch):
        for s in range(seq):
            slot = int(slots.expand(batch, seq)[b, s])
            block = b % layout.num_blocks if blocks is None else int(blocks.expand(batch, seq)[b, s])
            if slot < 0 and not prepared.options["skip_negative_slots"]:
                slot += layout.block_size
            if 0 <= slot < layout.block_size and 0 <= block < layout.num_blocks:
                places.append((b, s, block, slot))
    return places


def put(view: torch.Tensor, layout: Any, block: int, slot: int, heads: torch.Tensor) -> None:
    if layout.slot_group:
        view[block, slot // layout.slot_group, slot % layout.slot_group] = heads
    elif layout.lane_group:
        view[block, slot] = heads.unflatten(-1, (-1, layout.lane_group))
    else:
        view[block, slot] = heads


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    variant = VARIANTS[name]
    prepared = prepare(variant)
    there = copied(prepared.tensors, "cuda")
    q_out, k_out = launch(prepared, there)
    torch.cuda.synchronize()
    eps = torch.finfo(variant.dtype).eps
    for result, operand in ((q_out, "q"), (k_out, "k")):
        if operand == "k" and not variant.return_k:
            assert result.numel() == 0
            continue
        exact = expected_rotation(prepared, operand)
        # Half a unit for the rounding; float32's own error, relative to the terms of the rotation's sum.
        bound = exact.abs() * eps * 0.505 + exact.abs().amax(-1, keepdim=True) * 4e-7
        assert bool(((result.cpu().double() - exact).abs() <= bound).all())
    if not variant.return_k:
        k_out = launch(replace(prepared, variant=replace(variant, return_k=True)), copied(prepared.tensors, "cuda"))[1]
    options = prepared.options
    expected = copied(prepared.tensors, "cpu")
    for cache, value, scale in (("k", k_out.cpu(), "k_scale"), ("v", prepared.tensors["v"], "v_scale")):
        divisor = prepared.tensors[scale] if prepared.tensors[scale] is not None else options[f"{scale}_value"]
        stored = reference.to_cache(value, prepared.variant.stored_dtype, divisor, variant.saturate)
        layout = options[f"{cache}_layout"]
        target = expected[f"{cache}_cache"]
        view = layout.view(target.view(torch.uint8) if target.dtype.itemsize == 1 else target)
        stored = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
        for b, s, block, slot in token_places(prepared, cache):
            put(view, layout, block, slot, stored[b, s])
    for cache in ("k_cache", "v_cache"):
        actual, wanted = (bytes_of(tensors[cache]).cpu().view(variant.stored_dtype) for tensors in (there, expected))
        # Which NaN a conversion gives is nobody's promise.
        same = (bits(actual) == bits(wanted)) | (actual.float().isnan() & wanted.float().isnan())
        assert bool(same.all()), f"{int((~same).sum())} elements of {cache} differ"


def test_positions_outside_the_table_give_nan():
    prepared = prepare(Variant(seq=9, positions="outside", axes="one"))
    q_out, _ = launch(prepared, copied(prepared.tensors, "cuda"))
    positions = prepared.tensors["positions"][0, 0]
    rows = prepared.tensors["cos"].shape[0]
    outside = (positions >= rows) | (positions < -rows)
    assert bool(outside.any()) and not bool(outside.all())
    assert bool(q_out[0, outside.cuda()].isnan().all()) and not bool(q_out[0, ~outside.cuda()].isnan().any())
