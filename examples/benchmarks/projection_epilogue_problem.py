"""Layers of a projection and its prologue, and each way of doing them: for projection_epilogue.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import projection_epilogue_kernel as kernels
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.language.extra.cuda import gdc_launch_dependents
from triton.tools.tensor_descriptor import TensorDescriptor

from fx_fusion.kernels import triton as fused
from fx_fusion.kernels import triton_launch
from fx_fusion.kernels.cache_layout import CacheLayout

LAYERS = 16
HEAD_DIM = 128
TABLE_ROWS = CACHE_ROWS = 4096
EPS = 1e-6
#: Bytes of shared memory that a program may have on these GPUs.
SHARED_BYTES = 227 << 10

Layer = Callable[[int], object]


@dataclass(frozen=True)
class Shape:
    hidden: int
    num_heads: int
    num_kv_heads: int

    @property
    def heads(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads

    def __str__(self) -> str:
        return f"{self.hidden}:{self.num_heads}/{self.num_kv_heads}"


SHAPES = (Shape(4096, 32, 8), Shape(2048, 32, 4), Shape(5120, 64, 8))


@dataclass(frozen=True)
class Setting:
    """How one kernel is compiled and launched."""

    kernel: str
    tokens: int
    block: int
    stages: int
    split: int
    warps: int = 4
    turns: int = 1
    spread: bool = False
    shift: int = 0
    lag: bool = False
    pdl: str = ""
    epilogue: bool = True

    def early(self) -> list[Setting]:
        """With programmatic dependent launch: it waits first, or asks for weights ahead of the wait, and then also
        triggers the next launch.
        """
        return [replace(self, pdl=pdl) for pdl in (("first",) if self.kernel == "plain" else ("ahead", "trigger"))]

    def __str__(self) -> str:
        tile = f"{HEAD_DIM // self.turns}x{self.tokens}x{self.block}, {self.stages} stages, split {self.split}"
        rest = ["spread"] * self.spread + [f"shift {self.shift}"] * bool(self.shift) + ["lag"] * self.lag
        return ", ".join([f"{self.kernel} {tile}", *rest, *[f"PDL {self.pdl}"] * bool(self.pdl)])


def settings_for(shape: Shape, tokens: int) -> list[Setting]:
    """What is worth a measurement: programs enough to keep memory busy, buffers as deep as shared memory allows."""
    padded = max(8, triton.next_power_of_2(tokens))
    if padded > 128:
        return []
    found = []
    splits = [split for split in (1, 2, 3) if 40 <= shape.heads * split <= 160]
    for split, (block, turns) in itertools.product(splits, ((128, 1), (256, 1), (256, 2), (512, 2))):
        resident = 2 if shape.heads * split > 132 else 1
        stages = (SHARED_BYTES // resident - 2048) // ((HEAD_DIM // turns + padded) * block * 2)
        stages = min(stages, 12 * 64 // block * turns)
        # Many tokens are too many for one program to finish.
        spread = split == 2 and padded >= 32
        if stages < 2 or (split > 1 and padded >= 32 and not spread):
            continue
        for shift, lag in itertools.product((0, 5), (False, True)):
            if padded >= 32 or not lag:
                found.append(
                    Setting("ring", padded, block, stages, split, 4, turns, spread=spread, shift=shift, lag=lag)
                )
    for split in (1, 2):
        stages = min((SHARED_BYTES - 8192) // ((HEAD_DIM + padded) * 128 * 2), 4)
        if 40 <= shape.heads * split <= 160 and stages >= 2:
            found.append(Setting("plain", max(16, padded), 128, stages, split, 8 if padded == 128 else 4))
    return found


class Problem:
    """Weights, caches and inputs of some layers, and each way of doing them."""

    def __init__(self, shape: Shape, tokens: int, layers: int = LAYERS) -> None:
        self.shape, self.tokens = shape, tokens
        make = {"device": "cuda", "dtype": torch.bfloat16}
        generator = torch.Generator("cuda").manual_seed(tokens)
        width = shape.heads * HEAD_DIM
        self.weights = [
            torch.randn(width, shape.hidden, generator=generator, **make) * shape.hidden**-0.5 for _ in range(layers)
        ]
        self.caches = [
            [torch.zeros(CACHE_ROWS, shape.num_kv_heads, HEAD_DIM, **make) for _ in "kv"] for _ in range(layers)
        ]
        self.q_out = [torch.zeros(tokens, shape.num_heads, HEAD_DIM, **make) for _ in range(layers)]
        self.packed = [torch.zeros(tokens, width, **make) for _ in range(layers)]
        self.residual = torch.randn(tokens, shape.hidden, generator=generator, **make)
        self.norm_weight = torch.rand(shape.hidden, generator=generator, **make) + 0.5
        self.x = torch.empty_like(self.residual)
        self.q_weight, self.k_weight = (torch.rand(HEAD_DIM, generator=generator, **make) + 0.5 for _ in "qk")
        angles = torch.rand(TABLE_ROWS, HEAD_DIM // 2, device="cuda", generator=generator) * 6
        self.table = torch.cat([angles.cos(), angles.sin()], -1).bfloat16()
        self.positions = torch.randint(0, TABLE_ROWS, (tokens,), device="cuda", generator=generator)
        self.slots = torch.randperm(CACHE_ROWS, device="cuda", generator=generator)[:tokens].contiguous()
        self.partials = torch.empty(32 << 20, dtype=torch.float32, device="cuda")
        self.norm()

    def norm(self, trigger: bool = False) -> None:
        """Ahead of a layer: what writes its input. With `trigger` it lets its dependent begin at once."""
        width = triton.next_power_of_2(self.shape.hidden)
        sizes = (self.shape.hidden, EPS, width, trigger)
        norm_rows[(self.tokens,)](self.residual, self.norm_weight, self.x, *sizes, num_warps=8)

    def product(self, layer: int) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weights[layer])

    def pair(self, early: bool) -> Layer:
        """cuBLAS, then today's kernel."""
        return self.behind(self.product, early)

    def behind(self, product: Layer, early: bool) -> Layer:
        """A product, then today's kernel."""

        def layer(index: int) -> None:
            packed = product(index)
            operands, options = self.operands(packed, index)
            plan = triton_launch.plan(*operands, **options)
            plan.constants["WAITS_FOR_PREDECESSOR"] = early
            arguments = [*operands, self.q_out[index][None], None, *plan.arguments.values(), *plan.constants.values()]
            fused.kernel()[plan.grid](*arguments, **plan.options)

        return layer

    def operands(self, packed: Tensor, index: int) -> tuple[list[Tensor | None], dict[str, Any]]:
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        q, k, v = packed.unflatten(-1, (-1, HEAD_DIM))[None].split([heads, kv_heads, kv_heads], 2)
        cos, sin = self.table.split(HEAD_DIM // 2, -1)
        k_cache, v_cache = (cache[None] for cache in self.caches[index])
        options = {
            "k_layout": CacheLayout.of(k_cache, "k_cache"), "v_layout": CacheLayout.of(v_cache, "v_cache"),
            "k_scale_value": None, "v_scale_value": None, "q_eps": EPS, "k_eps": EPS, "gemma_norm": False,
            "rotary_dim": HEAD_DIM, "is_neox": True, "axes": [0] * (HEAD_DIM // 2), "saturate": False,
            "skip_negative_slots": False,
        }  # fmt: skip
        positions, slots = self.positions[None, None], self.slots[None]
        weights = [self.q_weight, self.k_weight]
        return [q, k, v, *weights, cos, sin, positions, slots, None, None, None, k_cache, v_cache], options

    def one_kernel(self, setting: Setting, warmup: bool = False) -> Layer:
        # Counters of its own: they are not reset, and count launches of one setting.
        arrived = torch.zeros(self.shape.heads, dtype=torch.int64, device="cuda")
        launches = [self.launch(setting, layer, arrived) for layer in range(len(self.weights))]

        def layer(index: int) -> Tensor:
            kernel, grid, arguments, options = launches[index]
            if warmup:
                kernel.warmup(*arguments, grid=grid, **options)
            else:
                kernel[grid](*arguments, **options)
            return self.packed[index]

        return layer

    def launch(
        self, setting: Setting, layer: int, arrived: Tensor
    ) -> tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]:
        shape, weight = self.shape, self.weights[layer]
        out = self.q_out[layer] if setting.epilogue else self.packed[layer]
        tensors = [
            self.q_weight, self.k_weight, self.table, self.positions, self.slots, out, *self.caches[layer],
            self.partials, arrived,
        ]  # fmt: skip
        blocks = shape.hidden // setting.block
        options = {"num_warps": setting.warps, **({"launch_pdl": True} if setting.pdl else {})}
        sizes = [self.tokens, blocks, shape.num_heads, shape.num_kv_heads, EPS]
        early = [bool(setting.pdl), setting.pdl in ("ahead", "trigger"), setting.pdl == "trigger"]
        if setting.kernel == "plain":
            rows = [
                TensorDescriptor.from_tensor(weight, [HEAD_DIM // 2, setting.block]),
                TensorDescriptor.from_tensor(self.x, [setting.tokens, setting.block]),
            ]
            constants = [setting.tokens, setting.block, setting.split, setting.stages, bool(setting.pdl)]
            return kernels.plain, (shape.heads, setting.split), [*rows, *tensors, *sizes, *constants], options
        grid = (shape.heads * setting.split,)
        sizes += [setting.tokens, setting.block, setting.stages]
        rows = [
            _gluon_rows(weight, HEAD_DIM // setting.turns, setting.block),
            _gluon_rows(self.x, setting.tokens, setting.block),
        ]
        constants = [
            setting.turns, setting.split, setting.spread, setting.shift, setting.lag, *early, setting.epilogue,
        ]  # fmt: skip
        return kernels.ring, grid, [*rows, *tensors, *sizes, *constants], options

    def quickest_read(self, time: Callable[[Problem, Layer], float]) -> Layer:
        ways = [self.read(programs, warps) for programs in (264, 528) for warps in (4, 8, 16)]
        return min(ways, key=lambda way: time(self, way))

    def read(self, programs: int, warps: int) -> Layer:
        sums = torch.empty(programs, device="cuda")

        def layer(index: int) -> None:
            weight = self.weights[index]
            read_all[(programs,)](weight, sums, weight.numel(), programs, 1024 * warps, num_warps=warps)

        return layer

    # --- what came out

    def results(self, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return (self.q_out[layer], *(cache[self.slots] for cache in self.caches[layer]))

    def poison(self, layer: int = 0) -> None:
        for tensor in (self.q_out[layer], *self.caches[layer]):
            tensor.fill_(float("nan"))

    def exact(self, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        y = (self.x.double() @ self.weights[layer].double().T).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = y.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        cos, sin = self.table[self.positions].double()[:, None].chunk(2, -1)

        def norm_rope(rows: Tensor, weight: Tensor) -> Tensor:
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS) * weight.double()
            a, b = rows.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return norm_rope(q, self.q_weight), norm_rope(k, self.k_weight), v

    def errors(self, layer: int = 0) -> list[float]:
        """Of q, k and v: relative to their root mean square."""
        pairs = zip(self.results(layer), self.exact(layer), strict=True)
        return [((found.double() - exact).norm() / exact.norm()).item() for found, exact in pairs]


def _gluon_rows(tensor: Tensor, rows: int, columns: int) -> GluonDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return GluonDescriptor.from_tensor(tensor, [rows, columns], layout)


@triton.jit
def norm_rows(residual, weight, out, width, eps, WIDTH: tl.constexpr, TRIGGER: tl.constexpr):
    if TRIGGER:
        gdc_launch_dependents()
    row, lane = tl.program_id(0), tl.arange(0, WIDTH)
    x = tl.load(residual + row * width + lane, mask=lane < width, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * tl.load(weight + lane, mask=lane < width, other=0).to(tl.float32)
    tl.store(out + row * width + lane, y.to(tl.bfloat16), mask=lane < width)


@triton.jit
def read_all(source, sums, count, programs, BLOCK: tl.constexpr):
    """Reads all of `source`; what it adds up is there so that nothing is left out."""
    total = tl.zeros([BLOCK], tl.float32)
    step = 8 * BLOCK
    for start in range(tl.program_id(0) * step, count, programs * step):
        for part in tl.static_range(8):
            total += tl.load(source + start + part * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
