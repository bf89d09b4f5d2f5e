"""The fused kernel on a GPU, beside a device copy of the same bytes and static-shape torch.compile of the unfused code.

    python examples/benchmarks/kernel.py [--output FOLDER] [--tokens 1,64,1024] [--heads 32/8/128]

Every number is microseconds a call, the median of several replays of one CUDA graph that makes many calls, each on
tensors of its own; before each replay the L2 cache is overwritten. "static compile" is the unfused code compiled for
the very sizes, "symbolic tokens" the same code compiled once by backend="fx_fusion" for any number of tokens. The bytes
are all that must move: q, k and v read, q, k and v written, positions, slots, and the rows of cosines and sines. Slots
are in random order; in the shuffle layout, which is for pages, the pages are, each filled in order. Writes
kernel.json, kernel.md and, with matplotlib, kernel.svg; ``--render`` makes the latter two from an earlier kernel.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fx_fusion.kernels.measure.stopwatch import microseconds
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import as_bytes, kernel, plan

TABLE_ROWS = 4096


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    gated: bool = False
    gemma_norm: bool = False
    cache: str = "NHD"
    cache_dtype: torch.dtype = torch.bfloat16
    rows: bool = False
    return_k: bool = False

    @property
    def widths(self) -> list[int]:
        """Of q, k and v in the packed projection."""
        kv_width = self.num_kv_heads * self.head_dim
        return [self.num_heads * self.head_dim * (2 if self.gated else 1), kv_width, kv_width]

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}"


SHAPES = (
    Shape(32, 8, 128, 128),
    Shape(8, 1, 128, 128),
    Shape(64, 8, 128, 128),
    Shape(64, 4, 128, 128),
    Shape(16, 2, 256, 64, gated=True, gemma_norm=True),
)
PLAIN = SHAPES[0]
VARIANTS = {
    "plain": PLAIN,
    "float8 cache": replace(PLAIN, cache_dtype=torch.float8_e4m3fn),
    "heads-first cache": replace(PLAIN, cache="HND"),
    "shuffle layout": replace(PLAIN, cache="shuffle"),
    "full-width rows (Hugging Face)": replace(PLAIN, rows=True),
    "k returned": replace(PLAIN, return_k=True),
}
BLOCK = 16


class Calls:
    """`count` calls on tensors of their own."""

    def __init__(self, shape: Shape, tokens: int, count: int) -> None:
        self.shape, self.tokens = shape, tokens
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.projections = [torch.randn(1, tokens, sum(shape.widths), **make) for _ in range(count)]
        self.caches = [[self.cache(which) for which in "kv"] for _ in range(count)]
        self.slots = [self.places()[None].clone() for _ in range(count)]
        self.positions = [torch.randint(0, TABLE_ROWS, (3, 1, tokens), device="cuda") for _ in range(count)]
        angles = torch.rand(TABLE_ROWS, shape.rotary_dim // 2, device="cuda") * 6
        self.table = torch.cat([angles.cos(), angles.sin()], -1).bfloat16()
        self.angles = torch.rand(2, count, 1, tokens, shape.rotary_dim, **make)
        self.weight = torch.rand(shape.head_dim, **make)
        pairs = shape.rotary_dim // 2
        self.axes = tuple(pair % 3 if pair < 15 * pairs // 16 else 0 for pair in range(pairs))

    def places(self) -> Tensor:
        if self.shape.cache != "shuffle":
            return torch.randperm(self.tokens, device="cuda")
        pages = torch.randperm(-(-self.tokens // BLOCK), device="cuda")
        return (pages[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()[: self.tokens]

    def cache(self, which: str) -> Tensor:
        shape, blocks = self.shape, -(-self.tokens // BLOCK)
        heads, dim, group = shape.num_kv_heads, shape.head_dim, 16 // shape.cache_dtype.itemsize
        sizes = {
            "NHD": (blocks * BLOCK, heads, dim),
            "HND": (blocks, heads, BLOCK, dim),
            "shuffle": (blocks, heads, dim // group, BLOCK, group)
            if which == "k"
            else (blocks, heads, BLOCK // group, dim, group),
        }[shape.cache]
        return torch.zeros(sizes, dtype=shape.cache_dtype, device="cuda")

    def call(self, index: int) -> Call[Tensor]:
        shape = self.shape
        q, k, v = self.projections[index].split(shape.widths, -1)
        q = q.unflatten(-1, (shape.num_heads, -1))[..., : shape.head_dim]
        k, v = (part.unflatten(-1, (shape.num_kv_heads, shape.head_dim)) for part in (k, v))
        half = shape.rotary_dim // 2
        cos, sin, positions = self.table[:, :half], self.table[:, half:], self.positions[index]
        if shape.rows:
            cos, sin, positions = self.angles[0, index], self.angles[1, index], None
        slots, blocks = self.slots[index], None
        if shape.cache != "NHD":
            slots, blocks = slots % BLOCK, slots // BLOCK
        k_cache, v_cache = self.caches[index]
        if shape.cache == "NHD":
            k_cache, v_cache = k_cache[None], v_cache[None]
        if shape.cache == "HND":
            k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        options = Options(
            k_layout=CacheLayout.of(k_cache, "k_cache"), v_layout=CacheLayout.of(v_cache, "v_cache"),
            k_scale_value=None, v_scale_value=None, q_eps=1e-6, k_eps=1e-6, gemma_norm=shape.gemma_norm,
            rotary_dim=shape.rotary_dim, is_neox=True, axes=self.axes, saturate=False, skip_negative_slots=False,
            return_k=shape.return_k,
        )  # fmt: skip
        weight = self.weight
        return Call(q, k, v, weight, weight, cos, sin, positions, slots, blocks, None, None, k_cache, v_cache, options)

    def fused(self) -> Callable[[int], None]:
        """Plain Triton launches, all planned in advance: a captured graph holds nothing else."""
        program, launches = kernel(), []
        for index in range(len(self.projections)):
            call = self.call(index)
            results = torch.empty_like(call.q), torch.empty_like(call.k) if call.options.return_k else None
            planned = plan(call)
            *inputs, k_cache, v_cache = call.tensors.values()
            tensors = [*inputs, as_bytes(k_cache), as_bytes(v_cache), *results]
            launches.append((planned, [*tensors, *planned.arguments.values(), *planned.constants.values()]))

        def run(index: int) -> None:
            planned, arguments = launches[index]
            program[planned.grid](*arguments, num_warps=planned.tile.num_warps)

        return run

    def through(self, prologue: Callable[..., Tensor]) -> Callable[[int], None]:
        """Calls of what `unfused` made, compiled in one way or another."""
        return lambda index: prologue(*self.inputs(index))

    def inputs(self, index: int) -> list[Tensor]:
        tensors = [self.projections[index], self.positions[index], self.slots[index]]
        return [*tensors, *self.caches[index], self.table, self.weight]


def unfused(shape: Shape) -> Callable[..., Tensor]:
    """The same in PyTorch, as a model writes it."""
    half, eps, widths = shape.rotary_dim // 2, 1e-6, shape.widths

    def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        y = (y * (1 + weight.float() if shape.gemma_norm else weight.float())).to(x.dtype)
        turned, rest = y[..., : shape.rotary_dim], y[..., shape.rotary_dim :]
        a, b = turned.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def prologue(
        projection: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor,
        weight: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = projection[0].split(widths, -1)
        q = q.unflatten(-1, (shape.num_heads, -1))[..., : shape.head_dim]
        k, v = (part.unflatten(-1, (shape.num_kv_heads, shape.head_dim)) for part in (k, v))
        pair = torch.arange(half, device=projection.device)
        axis = torch.where(pair < 15 * half // 16, pair % 3, 0)
        rows = table[positions[:, 0]].unflatten(-1, (2, half))
        angles = torch.where(axis == 2, rows[2], torch.where(axis == 1, rows[1], rows[0]))
        cos, sin = angles[:, None, 0], angles[:, None, 1]
        # Into the cache itself, not into a view of it, which Inductor would copy back.
        k_cache.index_put_((slots[0],), norm_rope(k, weight, cos, sin))
        v_cache.index_put_((slots[0],), v)
        return norm_rope(q, weight, cos, sin)

    return prologue


def compiled_for_each_size(shape: Shape) -> Callable[..., Tensor]:
    return torch.compile(unfused(shape), dynamic=False, fullgraph=True)


def fused_for_any_size(shape: Shape) -> Callable[..., Tensor]:
    """Compiled here, for any number of tokens: as engines do, one is taken for a number like others."""
    options = {"fx_fusion.kernel": "triton", "fx_fusion.require": 1}
    prologue = torch.compile(unfused(shape), backend="fx_fusion", fullgraph=True, options=options)
    inputs = Calls(shape, 64, 1).inputs(0)
    for tensor, dim in zip(inputs[:5], (1, 2, 1, 0, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        prologue(*inputs)
    return prologue


def bytes_moved(shape: Shape, tokens: int) -> int:
    read = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * 2
    written = shape.num_heads * shape.head_dim * 2
    written += 2 * shape.num_kv_heads * shape.head_dim * shape.cache_dtype.itemsize
    written += shape.num_kv_heads * shape.head_dim * 2 if shape.return_k else 0
    indices = 8 if shape.cache == "NHD" else 16
    angles = 2 * shape.rotary_dim * 2 if shape.rows else 3 * shape.rotary_dim * 2 + 3 * 8
    return tokens * (read + written + indices + angles)


def calls_that_fit(shape: Shape, tokens: int) -> Calls:
    return Calls(shape, tokens, max(3, min(100, (1 << 30) // bytes_moved(shape, tokens))))


def copy_microseconds(moved: int, count: int, device: torch.device) -> float:
    """Half the bytes read, half written."""
    source = torch.empty(count, moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return microseconds(lambda index: target[index].copy_(source[index]), count, device)


def measure(calls: Calls, device: torch.device) -> dict[str, float]:
    moved, count = bytes_moved(calls.shape, calls.tokens), len(calls.projections)
    copy, fused = copy_microseconds(moved, count, device), microseconds(calls.fused(), count, device)
    return {"copy": round(copy, 2), "fused": round(fused, 2)}


def measure_compiled(calls: Calls, prologue: Callable[..., Tensor], device: torch.device) -> float:
    return round(microseconds(calls.through(prologue), len(calls.projections), device), 2)


def measure_shape(shape: Shape, tokens: list[int], device: torch.device) -> list[dict[str, Any]]:
    """A row for each number of tokens: all ways of one, then all of the next."""
    # A shape that follows another would be compiled for any shape.
    torch._dynamo.reset()
    for_each, for_any = compiled_for_each_size(shape), fused_for_any_size(shape)
    rows = []
    for number in tokens:
        calls = calls_that_fit(shape, number)
        row: dict[str, Any] = {"shape": str(shape), "tokens": number, **measure(calls, device)}
        with torch.compiler.set_stance("fail_on_recompile"):
            row["symbolic"] = measure_compiled(calls, for_any, device)
        row["static compile"] = measure_compiled(calls, for_each, device)
        print(row, flush=True)
        rows.append(row)
    return rows


def compile_ahead(shape: Shape, tokens: int) -> None:
    """In a process of its own: the caches on disk keep what it compiles."""
    Calls(shape, tokens, 2).fused()(0)
    torch._dynamo.reset()
    if shape in SHAPES:
        Calls(shape, tokens, 2).through(compiled_for_each_size(shape))(0)
        fused_for_any_size(shape)
    torch.cuda.synchronize()


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| Hq/Hk/D | tokens | copy | fused | fused / copy | static compile | by | symbolic tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fused, copy, static = row["fused"], row["copy"], row["static compile"]
        name = f"{row['shape']} | {row['tokens']} | {copy:.2f} | **{fused:.2f}**"
        lines.append(f"| {name} | {fused / copy:.2f} | {static:.2f} | {static / fused:.2f} | {row['symbolic']:.2f} |")
    return "\n".join(lines)


def variant_table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| variant | tokens | copy of its bytes | fused | fused / copy |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        fused, copy = row["fused"], row["copy"]
        lines.append(f"| {row['variant']} | {row['tokens']} | {copy:.2f} | {fused:.2f} | {fused / copy:.2f} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """How many times as long as a copy each way takes, by tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in record["shapes"]))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(2.6 * len(shapes), 3), sharey=True, layout="constrained")
    for shape, axis in zip(shapes, axes if len(shapes) > 1 else [axes], strict=True):
        rows = [row for row in record["shapes"] if row["shape"] == shape]
        for way in ("static compile", "fused"):
            axis.plot([row["tokens"] for row in rows], [row[way] / row["copy"] for row in rows], marker="o", label=way)
        axis.axhline(1, color="grey", linewidth=1, label="device copy")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=shape)
    first = axes[0] if len(shapes) > 1 else axes
    first.set_ylabel("time / time of a device copy")
    first.legend(frameon=False, fontsize=8)
    figure.suptitle(", ".join(str(value) for value in record["machine"].values()), fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def render(folder: Path) -> None:
    """kernel.md and kernel.svg from kernel.json."""
    record = json.loads((folder / "kernel.json").read_text())
    heading = ", ".join(str(value) for value in record["machine"].values())
    parts = [
        "# The fused kernel",
        f"{heading}. Microseconds a call; `python examples/benchmarks/kernel.py`: its head says what is measured.",
        table(record["shapes"]),
        f"## Variants of {PLAIN}",
        variant_table(record["variants"]),
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "kernel.md").write_text(text)
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no kernel.svg: matplotlib is not installed; --render makes it later")
    else:
        plot(record, folder / "kernel.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tokens", default="1,8,64,256,1024,4096,16384")
    parser.add_argument("--heads", default=None, help="only this shape, as in 32/8/128")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--render", action="store_true", help="only the table and the plot, from kernel.json")
    options = parser.parse_args()
    if options.render:
        return render(options.output)
    if not torch.cuda.is_available():
        parser.exit(2, "kernel.py measures a GPU, and PyTorch finds none here\n")
    tokens = [int(number) for number in options.tokens.split(",")]
    shapes = [shape for shape in SHAPES if options.heads in (None, str(shape))]
    few = [number for number in tokens if number in (64, 1024, 16384)]
    cases = [(shape, number) for shape in shapes for number in tokens]
    cases += [(shape, number) for shape in VARIANTS.values() for number in few]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.starmap(compile_ahead, dict.fromkeys(cases), chunksize=1)
    # Each shape and number of tokens is a compilation of its own.
    torch._dynamo.config.recompile_limit = 2 * len(cases)
    device = torch.device("cuda")
    rows = [row for shape in shapes for row in measure_shape(shape, tokens, device)]
    variants = []
    for name, shape in VARIANTS.items():
        for number in few:
            variants.append({"variant": name, "tokens": number, **measure(calls_that_fit(shape, number), device)})
            print(variants[-1], flush=True)
    machine = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "unit": "microseconds a call", "shapes": rows, "variants": variants}
    (options.output / "kernel.json").write_text(json.dumps(record, indent=1) + "\n")
    render(options.output)


if __name__ == "__main__":
    main()
