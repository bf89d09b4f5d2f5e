"""What the pass costs in a compilation, beside Inductor's own pattern matcher and beside all that Inductor does.

    python examples/benchmarks/compile_time.py [--output FOLDER] [--layers 4,12,36,94] [--inductor 4,12]

The model is Transformers' Qwen3 decoder at the attention widths of Qwen3-VL-235B-A22B (hidden 4096, 64 heads of
queries, 4 of keys and values, 128 lanes each) in bfloat16, without a head. Its MLP is dense, of width 12288: this pass
has nothing to do with that model's experts. One decode step of 32 sequences over static caches of 32768 positions, on
the CPU. Every tensor is a fake one: graphs are traced and compiled in full, and never run.

Each number of layers is measured in a process of its own, on one thread, each way on a fresh copy of the graph that
Inductor hands to its custom passes:

* fx_fusion: the pass as a compilation calls it, once, so that what is done only the first time in a process counts too.
  The first layer is the time until it is read and proved; it holds what is done once for the graph (value numbers,
  finding all candidates). A further layer is the median of the others' reading and proof. Rewriting is that of all
  layers together; what is missing to the sum puts the graph in order.
* register_replacement: one pattern, written by hand for this very model, that takes the norm and the rotation of q and
  k to one call. It leaves the stores alone: a pattern and its replacement are functions, without mutation. It holds
  this model's operations in their order, its head_dim and its eps; at each match both functions are traced again, for
  its sizes. Its time is that of importing, registering (tracing) and applying it. It proves nothing.
* Inductor: `compile_fx` without the pass, from Dynamo's graph to loaded code (AOTAutograd, lowering, code, the C++
  compiler), with one compile thread and no caches; then, warmer, with the pass and `kernel=reference`. Dynamo's tracing
  comes before it and is not counted.

Wall seconds, and seconds of CPU time of the process, with its compilers where there are any. Writes compile_time.json,
compile_time.md and, with matplotlib, compile_time.svg; ``--render`` makes the latter two from an earlier
compile_time.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, EPS = 4096, 12288, 64, 4, 128, 1e-6
BATCH, CACHE = 32, 32768


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime

    def read(self) -> dict[str, float]:
        return {name: now - then for name, now, then in zip(("wall", "cpu"), self._now(), self.start, strict=True)}


# --- the graph ----------------------------------------------------------------------------------------------------


class _Traced(Exception):
    """Dynamo has given its graph; the compiled function is not to be called."""


def with_dynamo_graph(layers: int, use: Callable[[GraphModule, Sequence[Any]], None]) -> None:
    """Call `use` with Dynamo's graph of a decode step, and its inputs, all of them fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from transformers import Qwen3Config, Qwen3Model, StaticCache

    config = Qwen3Config(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=EPS, max_position_embeddings=CACHE,
    )  # fmt: skip

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        use(gm, example_inputs)

        def compiled(*_: Any) -> Any:
            raise _Traced

        return compiled

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3Model(config).eval()
        torch.set_default_dtype(torch.float32)
        cache = StaticCache(config=config, max_cache_len=CACHE)
        tokens = torch.zeros(BATCH, 1, dtype=torch.long)
        model(tokens, past_key_values=cache)  # the caches allocate themselves
        try:
            torch.compile(model, backend=backend, fullgraph=True)(tokens, past_key_values=cache)
        except _Traced:
            return
    raise RuntimeError("the model was not compiled as one graph")


def post_grad_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """What Inductor hands to its custom passes."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    captured: list[GraphModule] = []

    def keep(graph_module: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        view_to_reshape(graph_module)
        captured.append(graph_module)
        return graph_module.forward

    inner: Any = keep
    patches = {"force_disable_caches": True}
    compile_fx(copy.deepcopy(gm), list(example_inputs), inner_compile=inner, config_patches=patches)
    return captured[0]


def copy_of(gm: GraphModule) -> GraphModule:
    return GraphModule(gm, copy.deepcopy(gm.graph))


# --- fx_fusion ----------------------------------------------------------------------------------------------------


def measure_pass(gm: GraphModule) -> dict[str, Any]:
    from fx_fusion.config import Config
    from fx_fusion.fusion_pass import apply
    from fx_fusion.observer import Observer

    class Stamps(Observer):
        def __init__(self) -> None:
            self.read: list[dict[str, float]] = []

        def reads(self, *_: Any) -> None:
            self.read.append(clock.read())

    stamps, clock = Stamps(), Clock()
    report = apply(gm.graph, Config(kernel="reference"), observer=stamps)
    total = clock.read()
    further = [
        {name: after[name] - before[name] for name in after}
        for before, after in zip(stamps.read, stamps.read[1:], strict=False)
    ]
    return {
        "total": total,
        "first layer": stamps.read[0],
        "further layer": {name: statistics.median(each[name] for each in further) for name in total},
        "slowest further layer": {name: max(each[name] for each in further) for name in total},
        "rewriting": {"wall": report.seconds["rewriting"]},
        "rewritten": len(report.fused),
        "layers found": len(report.layers),
    }


# --- Inductor's pattern matcher -----------------------------------------------------------------------------------


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    y = (weight * y.to(x.dtype)).transpose(1, 2)
    a, b = y[..., : HEAD_DIM // 2], y[..., HEAD_DIM // 2 :]
    return (y * cos) + (torch.cat((-b, a), dim=-1) * sin)


def search(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _norm_rope(q, q_weight, cos, sin), _norm_rope(k, k_weight, cos, sin)


@torch.library.custom_op("fx_fusion_benchmark::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return search(q, k, q_weight, k_weight, cos, sin)


@qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k))  # type: ignore[return-value]


def measure_register_replacement(gm: GraphModule) -> dict[str, Any]:
    clock = Clock()
    from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement

    def replace(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return torch.ops.fx_fusion_benchmark.qk_norm_rope(q, k, q_weight, k_weight, cos, sin)

    patterns = PatternMatcherPass("fx_fusion_benchmark")
    make = {"dtype": torch.bfloat16}
    example = [
        *(torch.empty(BATCH, 1, heads, HEAD_DIM, **make) for heads in (HEADS, KV_HEADS)),
        *(torch.empty(HEAD_DIM, **make) for _ in "qk"),
        *(torch.empty(BATCH, 1, 1, HEAD_DIM, **make) for _ in ("cos", "sin")),
    ]
    register_replacement(search, replace, example, fwd_only, patterns)
    registering = clock.read()
    count = patterns.apply(gm)
    return {"total": clock.read(), "registering": registering, "rewritten": count}


# --- Inductor -----------------------------------------------------------------------------------------------------


def measure_inductor(gm: GraphModule, example_inputs: Sequence[Any], graph_pass: Any) -> dict[str, float]:
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"force_disable_caches": True, "compile_threads": 1}
    if graph_pass is not None:
        patches["post_grad_custom_pre_pass"] = graph_pass
    clock = Clock()
    compile_fx(copy.deepcopy(gm), list(example_inputs), config_patches=patches)
    return clock.read()


# --- all together -------------------------------------------------------------------------------------------------


def measure(layers: int, compiles: bool) -> dict[str, Any]:
    import fx_fusion
    from fx_fusion import Config

    torch.set_num_threads(1)
    row: dict[str, Any] = {"layers": layers}
    clock = Clock()

    def use(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        row["dynamo"] = clock.read()
        post_grad = post_grad_graph(gm, example_inputs)
        row["nodes"] = len(post_grad.graph.nodes)
        row["fx_fusion"] = measure_pass(copy_of(post_grad))
        row["register_replacement"] = measure_register_replacement(copy_of(post_grad))
        if compiles:
            row["inductor"] = measure_inductor(gm, example_inputs, None)
            graph_pass = fx_fusion.FusionPass(Config(kernel="reference"))
            row["inductor with the pass"] = measure_inductor(gm, example_inputs, graph_pass)

    with_dynamo_graph(layers, use)
    return row


def seconds(value: dict[str, float]) -> str:
    return f"{value['wall']:.2f} ({value['cpu']:.2f})"


def milliseconds(value: dict[str, float]) -> str:
    return f"{1e3 * value['wall']:.1f} ({1e3 * value['cpu']:.1f})"


def pass_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layers | nodes | rewritten | first layer, s | a further one, ms | slowest, ms | rewriting, s | all, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["fx_fusion"]
        parts = [seconds(ours["first layer"]), milliseconds(ours["further layer"])]
        parts += [milliseconds(ours["slowest further layer"]), f"{ours['rewriting']['wall']:.2f}"]
        parts += [f"**{seconds(ours['total'])}**"]
        lines.append(f"| {row['layers']} | {row['nodes']} | {ours['rewritten']} | {' | '.join(parts)} |")
    return "\n".join(lines)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layers | fx_fusion, s | rewritten | register_replacement, s | rewritten | Inductor, s | with pass, s | % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs, whole = row["fx_fusion"], row["register_replacement"], row.get("inductor")
        fused = row.get("inductor with the pass")
        share = f"{100 * ours['total']['cpu'] / whole['cpu']:.1f}" if whole else "not measured"
        parts = [seconds(ours["total"]), f"{ours['rewritten']} of {row['layers']}"]
        parts += [seconds(theirs["total"]), f"{theirs['rewritten']} of {row['layers']}, without stores"]
        parts += [seconds(whole) if whole else "not measured", seconds(fused) if fused else "not measured", share]
        lines.append(f"| {row['layers']} | {' | '.join(parts)} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Seconds of CPU time by layers, of each way."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for label, read in {
        "Inductor": lambda row: row.get("inductor"),
        "register_replacement (q, k)": lambda row: row["register_replacement"]["total"],
        "fx_fusion (q, k, v, stores)": lambda row: row["fx_fusion"]["total"],
    }.items():
        points = [(row["layers"], read(row)["cpu"]) for row in record["rows"] if read(row)]
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="layers", ylabel="CPU seconds")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(", ".join(str(value) for value in record["machine"].values()), fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def render(folder: Path) -> None:
    """compile_time.md and compile_time.svg from compile_time.json."""
    record = json.loads((folder / "compile_time.json").read_text())
    heading = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    parts = [
        "# What the pass costs in a compilation",
        f"{heading}. Wall seconds, CPU seconds in brackets; "
        "`python examples/benchmarks/compile_time.py`: its head says what is measured.",
        f"Transformers' Qwen3 decoder: {record['model']}.",
        "## The pass",
        pass_table(record["rows"]),
        "## Beside `register_replacement` and all of Inductor",
        comparison_table(record["rows"]),
        "The last column is the pass in Inductor's CPU time. `register_replacement` was given one pattern, written for "
        "this model, of the norm and rotation of q and k. It does not hold the stores, and proves nothing. "
        "Where wall and CPU seconds differ, the machine was shared.",
        *record.get("notes", []),
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "compile_time.md").write_text(text)
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no compile_time.svg: matplotlib is not installed; --render makes it later")
    else:
        plot(record, folder / "compile_time.svg")


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of layers, as in 4,12; got {text!r}") from None


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]} ({os.cpu_count()} cores)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--layers", type=numbers, default="4,12,36,94", help="two at least, each")
    parser.add_argument(
        "--inductor", type=numbers, default="4,12", help="numbers of layers, of those, that Inductor compiles in full"
    )
    parser.add_argument("--render", action="store_true", help="only the tables and the plot, from compile_time.json")
    options = parser.parse_args()
    if options.render:
        return render(options.output)
    if min(options.layers) < 2:
        parser.error(f"--layers: expected two at least, since the first layer costs more; got {min(options.layers)}")
    import transformers

    machine = {
        "CPU": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
        "Python": platform.python_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    model = (
        f"hidden {HIDDEN}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, a dense MLP of {MLP}, bfloat16; "
        f"decode of {BATCH} sequences, static caches of {CACHE} positions, fake tensors"
    )
    rows: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for layers in options.layers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (layers, layers in options.inductor)))
        print(rows[-1], flush=True)
        record = {"machine": machine, "model": model, "unit": "seconds", "rows": rows}
        (options.output / "compile_time.json").write_text(json.dumps(record, indent=1) + "\n")
    render(options.output)


if __name__ == "__main__":
    main()
