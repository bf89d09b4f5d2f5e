"""Launches of the kernel, named by how they differ from the plain one: their tensors, and what the plan makes of them.

The plain launch is a decode step of Qwen3-VL: one packed projection in bfloat16, a table of angles with mRoPE
positions, a cache addressed by flat slots.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import Launch, as_bytes, plan
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, choose_tile

BLOCKS, BLOCK_SIZE = 3, 16
TABLE_ROWS = 40
FAR = 1 << 20
SPECIAL = (math.inf, -math.inf, -0.0, 65504.0, -65504.0, 6e-8, 3e-3, math.nan)
# Eight neighbouring lanes of half a head a thread, on a GPU with waves of 64.
WIDE = Tile(tokens=8, num_warps=1)
OUTPUTS = ("q_out", "k_out")


@dataclass(frozen=True)
class Variant:
    """What may differ from one launch to the next."""

    batch: int = 1
    seq: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    rotary_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    angle_dtype: torch.dtype | None = None
    index_dtype: torch.dtype = torch.int64
    gated: bool = False
    weights: bool = True
    gemma_norm: bool = False
    q_eps: float | None = 1e-6
    k_eps: float | None = 1e-6
    is_neox: bool = True
    axes: str = "interleaved"
    table: bool = True
    full_width: bool = False
    two_tables: bool = False
    narrow: bool = True
    positions: str = "inside"
    cache: str = "NHD"
    blocks: bool = False
    slots: str = "inside"
    skip_negative_slots: bool = False
    k_scale: float | str | None = None
    v_scale: float | str | None = None
    saturate: bool = False
    return_k: bool = True
    tile: Tile = WIDE

    def tiled_for(self, wave_size: int) -> Variant:
        """With the tile that a launch on such a GPU would choose."""
        tokens = self.batch * self.seq
        tile = choose_tile(tokens, self.num_heads, self.num_kv_heads, self.head_dim, wave_size)
        return dataclasses.replace(self, tile=tile)

    @property
    def rotated(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def angle_width(self) -> int:
        return self.rotated if self.full_width else self.rotated // 2

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    def axis_of_pairs(self) -> list[int]:
        pairs = self.rotated // 2
        if self.axes == "one":
            return [0] * pairs
        if self.axes == "interleaved":
            return [pair % 3 if pair < pairs * 15 // 16 else 0 for pair in range(pairs)]
        if self.axes == "sectioned":
            first, second = pairs * 3 // 8, pairs * 11 // 16
            return [0 if pair < first else 1 if pair < second else 2 for pair in range(pairs)]
        assert self.axes == "any"
        return [(7 * pair * pair + pair // 5) % 4 for pair in range(pairs)]


@dataclass(frozen=True)
class Prepared:
    """A launch with its tensors, by the kernel's names for its parameters."""

    variant: Variant
    tensors: dict[str, Tensor | None]
    options: Options
    launch: Launch

    @property
    def call(self) -> Call[Tensor]:
        return Call.of({name: each for name, each in self.tensors.items() if name not in OUTPUTS}, self.options)

    @property
    def grid(self) -> tuple[int, int]:
        """Also where a tile serves a symbolic number of heads."""
        x, y = self.launch.grid
        return int(x), int(y)

    def arguments(self, kernel: Any) -> dict[str, Any]:
        """A value for each parameter of `kernel`."""
        tensors = {name: None if tensor is None else as_bytes(tensor) for name, tensor in self.tensors.items()}
        known = {**tensors, **self.launch.arguments, **self.launch.constants}
        if self.variant.cache == "whole":
            known |= {"k_cache": _whole_storage(known["k_cache"]), "v_cache": None}
        return {name: known[name] for name in kernel.arg_names}


def prepare(variant: Variant, device: str = "cpu", seed: int = 0) -> Prepared:
    """On the meta device, only what a compiler needs."""
    make = _Maker(variant, torch.device(device), seed)
    q, k, v = make.projections()
    cos, sin, positions = make.angles()
    slots, blocks = make.slots()
    k_cache, v_cache = make.caches()
    operands = {
        "q": q, "k": k, "v": v, "q_weight": make.weight(), "k_weight": make.weight(), "cos": cos, "sin": sin,
        "positions": positions, "slots": slots, "blocks": blocks, "k_scale": make.scale(variant.k_scale),
        "v_scale": make.scale(variant.v_scale), "k_cache": k_cache, "v_cache": v_cache,
    }  # fmt: skip
    options = Options(
        k_layout=make.layout(k_cache, "k_cache"),
        v_layout=make.layout(v_cache, "v_cache"),
        k_scale_value=variant.k_scale if isinstance(variant.k_scale, float) else None,
        v_scale_value=variant.v_scale if isinstance(variant.v_scale, float) else None,
        q_eps=variant.q_eps,
        k_eps=variant.k_eps,
        gemma_norm=variant.gemma_norm,
        rotary_dim=variant.rotated,
        is_neox=variant.is_neox,
        axes=tuple(variant.axis_of_pairs()),
        saturate=variant.saturate,
        skip_negative_slots=variant.skip_negative_slots,
        return_k=variant.return_k,
    )
    launch = plan(Call.of(operands, options), variant.tile)
    # What would be so of tensors too large for a test.
    launch.constants["NARROW"] = variant.narrow
    outputs = {
        "q_out": make.unwritten(*q.shape, dtype=q.dtype),
        "k_out": make.unwritten(*k.shape, dtype=k.dtype) if variant.return_k else None,
    }
    return Prepared(variant, {**operands, **outputs}, options, launch)


def _whole_storage(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _cycle(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).repeat(len(like))[: len(like)]


@dataclass
class _Maker:
    variant: Variant
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def random(self, *size: int, dtype: torch.dtype) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(size, dtype=dtype, device="meta")
        return torch.randn(size, generator=self.generator).to(dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(size, dtype=self.variant.index_dtype, device="meta")
        return torch.randint(low, high, size, generator=self.generator, dtype=self.variant.index_dtype)

    def unwritten(self, *size: int, dtype: torch.dtype) -> Tensor:
        """Filled with a pattern that no result has by chance."""
        tensor = torch.empty(size, dtype=dtype, device=self.device)
        if self.device.type != "meta":
            bytes_ = tensor.view(torch.uint8).view(-1)
            bytes_.copy_(torch.arange(bytes_.numel()) * 37 % 251)
        return tensor

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one packed projection; gated q has a gate after each head."""
        v = self.variant
        q_width = v.num_heads * v.head_dim * (2 if v.gated else 1)
        kv_width = v.num_kv_heads * v.head_dim
        packed = self.random(v.batch, v.seq, q_width + 2 * kv_width, dtype=v.dtype)
        q, key, value = packed.split([q_width, kv_width, kv_width], -1)
        q = q.unflatten(-1, (v.num_heads, -1))[..., : v.head_dim]
        if self.device.type != "meta":
            # Which NaN a conversion between float dtypes gives is nobody's promise.
            special = SPECIAL[:-1] if v.stored_dtype.itemsize > 1 and v.stored_dtype != v.dtype else SPECIAL
            value[..., : len(special)] = torch.tensor(special)
        return q, key.unflatten(-1, (-1, v.head_dim)), value.unflatten(-1, (-1, v.head_dim))

    def weight(self) -> Tensor | None:
        v = self.variant
        return self.random(v.head_dim, dtype=v.weight_dtype or v.dtype) if v.weights else None

    def angles(self) -> tuple[Tensor, Tensor, Tensor | None]:
        v = self.variant
        dtype = v.angle_dtype or v.dtype
        if not v.table:
            angles = 3 * self.random(v.batch, v.seq, v.angle_width, dtype=torch.float32)
            return angles.cos().to(dtype), angles.sin().to(dtype), None
        angles = 3 * self.random(TABLE_ROWS, v.angle_width, dtype=torch.float32)
        cos, sin = torch.cat([angles.cos(), angles.sin()], -1).to(dtype).chunk(2, -1)
        if v.two_tables:
            more = 3 * self.random(3, v.angle_width, dtype=torch.float32)
            sin = torch.cat([sin, more.sin().to(dtype)])
        positions = self.integers(0, TABLE_ROWS, max(v.axis_of_pairs()) + 1, v.batch, v.seq)
        if v.positions == "outside" and self.device.type != "meta":
            outside = torch.tensor([TABLE_ROWS, -TABLE_ROWS - 1, FAR, -FAR])
            positions.view(-1)[::3] = outside.to(positions.dtype).repeat(positions.numel())[
                : len(positions.view(-1)[::3])
            ]
            positions.view(-1)[1::3] -= TABLE_ROWS
        return cos, sin, positions

    def slots(self) -> tuple[Tensor, Tensor | None]:
        v = self.variant
        if v.cache == "sequence":
            return self._distinct(BLOCK_SIZE, 1, v.seq), None
        places = self._distinct(BLOCKS * BLOCK_SIZE, v.batch, v.seq)
        if not v.blocks:
            return self._misplace(places, BLOCKS * BLOCK_SIZE), None
        blocks, slots = places // BLOCK_SIZE, places % BLOCK_SIZE
        return self._misplace(slots, BLOCK_SIZE), blocks

    def _distinct(self, size: int, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.variant.index_dtype, device="meta")
        count = shape[0] * shape[1]
        return torch.randperm(size, generator=self.generator)[:count].reshape(shape).to(self.variant.index_dtype)

    def _misplace(self, slots: Tensor, size: int) -> Tensor:
        """Some slots from the end, some nowhere."""
        if self.variant.slots == "inside" or self.device.type == "meta":
            return slots
        flat = slots.view(-1)
        flat[1::4] -= size
        flat[2::4] = _cycle([size, -size - 1, FAR, -FAR], flat[2::4])
        return slots

    def caches(self) -> tuple[Tensor, Tensor]:
        v = self.variant
        heads, dim, dtype = v.num_kv_heads, v.head_dim, v.stored_dtype
        if v.cache == "sequence":
            k, w = (self.unwritten(v.batch, heads, BLOCK_SIZE, dim, dtype=dtype) for _ in range(2))
            return k.transpose(1, 2), w.transpose(1, 2)
        count, size = (BLOCKS, BLOCK_SIZE) if v.blocks else (1, BLOCKS * BLOCK_SIZE)
        if v.cache == "NHD":
            k, w = (self.unwritten(count, size, heads, dim, dtype=dtype) for _ in range(2))
            return k, w
        if v.cache == "HND":
            k, w = (self.unwritten(count, heads, size, dim, dtype=dtype) for _ in range(2))
            return k.transpose(1, 2), w.transpose(1, 2)
        if v.cache in ("packed", "whole"):
            k, w = self.unwritten(count, 2, size, heads, dim, dtype=dtype).unbind(1)
            return k, w
        assert v.cache == "shuffle"
        group = 16 // dtype.itemsize
        return (
            self.unwritten(count, heads, dim // group, size, group, dtype=dtype),
            self.unwritten(count, heads, size // group, dim, group, dtype=dtype),
        )

    def layout(self, cache: Tensor, name: str) -> CacheLayout:
        """Where the kernel gets the tensor that holds both caches, they begin at an offset."""
        offset = cache.storage_offset() if self.variant.cache == "whole" else 0
        return CacheLayout.of(cache, name)._replace(offset=offset)

    def scale(self, scale: float | str | None) -> Tensor | None:
        if scale != "tensor":
            return None
        return torch.full((1,), 0.013, dtype=torch.float32, device=self.device)
