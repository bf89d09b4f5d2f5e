"""The prologue in the epilogue of the projection, beside cuBLAS followed by the fused kernel.

    python examples/benchmarks/projection_epilogue.py [--output FOLDER] [--tokens 1,8,64] [--shapes 4096:32/8]

A NVIDIA GPU from compute capability 9.0 on. bfloat16, head_dim 128, one position a token, a cache of flat slots.
Every number is microseconds a layer, the median of 25 replays of a captured graph of 16 layers, five of each of five
captures, in which all ways take turns (in the JSON with the distance between the quartiles). Each layer has weights and
caches of its own, which together are several times the L2 cache. What is ahead of a layer: nothing but the layer before
it; or a kernel that norms its input, as in a model, whose time is included; or such a kernel that lets its dependent
begin at once.

"one kernel" is the best of the settings that are tried for that shape and number of tokens, of two kernels
(projection_epilogue_kernel.py). "PDL" is programmatic dependent launch: of the fused kernel behind cuBLAS, or of the
one kernel, which then asks for its first weights ahead of the wait; in the last column it lets the next layer begin
early too. "its product" is the best setting's kernel without its epilogue. "read" is a kernel that reads the weights
once. Beyond 128 tokens there is no one kernel. Writes projection_epilogue.json and projection_epilogue.md; ``--render``
makes the latter from an earlier JSON.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from projection_epilogue_problem import LAYERS, SHAPES, Layer, Problem, Setting, Shape, settings_for

#: What is ahead of each layer in a graph.
CHAINS = ("alone", "behind a norm", "behind a norm that triggers")
PAIRS = ("cuBLAS + fused", "cuBLAS + fused + PDL")
#: Each with what PDL stands for in a setting.
ONE_KERNEL = {"one kernel": ("",), "one kernel + PDL": ("first", "ahead"), "one kernel + PDL, next too": ("trigger",)}
COLUMNS = ("read", "its product", "cuBLAS", *PAIRS, *ONE_KERNEL)


# --- measuring ----------------------------------------------------------------------------------------------------


def capture(problem: Problem, layer: Layer, chain: str) -> torch.cuda.CUDAGraph:
    def layers() -> list[object]:
        kept = []
        for index in range(len(problem.weights)):
            if chain != "alone":
                problem.norm(trigger=chain == CHAINS[2])
            kept.append(layer(index))
        return kept

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = layers()
    del kept
    for _ in range(2):
        graph.replay()
    return graph


def replay(graph: torch.cuda.CUDAGraph, times: int = 4) -> float:
    """Microseconds a layer."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / times / LAYERS


def quick(problem: Problem, layer: Layer, chain: str = "alone") -> float:
    graph = capture(problem, layer, chain)
    found = statistics.median(replay(graph) for _ in range(5))
    graph.reset()
    return found


def in_turns(problem: Problem, ways: dict[str, Layer], chain: str, captures: int = 5) -> dict[str, list[float]]:
    """Median and distance between the quartiles of each way.

    Captured several times: where its tensors come to lie makes a difference of half a microsecond.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(captures):
        graphs = {name: capture(problem, layer, chain) for name, layer in ways.items()}
        for _ in range(5):
            for name, graph in graphs.items():
                samples[name].append(replay(graph))
        for graph in graphs.values():
            graph.reset()
    found = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = [round(middle, 2), round(high - low, 2)]
    return found


def same_bits(problem: Problem, layer: Layer, expected: Layer, replays: int) -> bool:
    """Whether every replay of `layer` gives the bits that `expected` gives once."""
    problem.poison()
    expected(0)
    first = [tensor.clone() for tensor in problem.results()]
    graph = capture(problem, layer, "alone")
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        problem.poison()
        graph.replay()
        for found, wanted in zip(problem.results(), first, strict=True):
            differ += (found.view(torch.int16) != wanted.view(torch.int16)).sum()
    graph.reset()
    return differ.item() == 0


def errors(problem: Problem, layer: Layer) -> list[float]:
    problem.poison()
    layer(0)
    return [float(f"{error:.3g}") for error in problem.errors()]


def measure(shape: Shape, tokens: int, replays: int) -> dict[str, Any]:
    problem = Problem(shape, tokens)
    ways: dict[str, Layer] = {"cuBLAS": problem.product}
    ways |= {name: problem.pair(early="PDL" in name) for name in PAIRS}
    settings, tried = shortlist(problem, errors(problem, ways[PAIRS[0]]))
    row: dict[str, Any] = {"shape": str(shape), "tokens": tokens, "settings": {}}
    best: dict[str, Setting] = {}
    for chain in CHAINS:
        here = dict(ways)
        chosen = {name: nearest_to_best(problem, settings, pdl, chain) for name, pdl in ONE_KERNEL.items()}
        if chain != "alone":
            del chosen["one kernel + PDL, next too"]
        here |= {f"{name}/{i}": problem.one_kernel(s) for name, few in chosen.items() for i, s in enumerate(few)}
        if chain == "alone":
            here["read"] = problem.quickest_read(quick)
            products = [setting for setting in chosen["one kernel"] if setting.kernel == "ring"]
            if products:
                here["its product"] = problem.one_kernel(replace(products[0], epilogue=False))
        found = in_turns(problem, here, chain)
        row["settings"][chain] = {}
        for name, few in chosen.items():
            times = [found.pop(f"{name}/{i}") for i in range(len(few))]
            if few:
                found[name] = min(times)
                setting = few[times.index(found[name])]
                row["settings"][chain][name] = str(setting)
                best.setdefault(name, setting)
        row[chain] = found
    for name, setting in best.items():
        ways[name] = problem.one_kernel(setting)
    row["errors of q, k and v"] = {name: errors(problem, way) for name, way in ways.items() if name != "cuBLAS"}
    row["same bits"] = {name: same_bits(problem, ways[name], ways[name], replays) for name in best}
    row["same bits"]["cuBLAS + fused + PDL as without"] = same_bits(problem, ways[PAIRS[1]], ways[PAIRS[0]], replays)
    row["tried"] = tried
    return row


def shortlist(problem: Problem, bound: list[float]) -> tuple[list[Setting], list[list[Any]]]:
    """The settings that are best without PDL, each with PDL too; and the times of all."""
    tried = []
    for setting in settings_for(problem.shape, problem.tokens):
        if is_right(problem, setting, bound):
            tried.append((quick(problem, problem.one_kernel(setting)), setting))
    tried.sort(key=lambda pair: pair[0])
    ordered = [setting for _, setting in tried]
    few = ordered[:8] + [next(s for s in ordered if s.split == split) for split in sorted({s.split for s in ordered})]
    early = [variant for setting in dict.fromkeys(few) for variant in setting.early()]
    right = [setting for setting in early if is_right(problem, setting, bound)]
    return [*dict.fromkeys(few), *right], [[round(time, 2), str(setting)] for time, setting in tried]


def is_right(problem: Problem, setting: Setting, bound: list[float]) -> bool:
    """No further from float64 than cuBLAS and the fused kernel are, but for what is rounded alike."""
    found = errors(problem, problem.one_kernel(setting))
    right = all(error <= 1.02 * limit for error, limit in zip(found, bound, strict=True))
    if not right:
        print("WRONG", problem.shape, problem.tokens, setting, found, flush=True)
    return right


def nearest_to_best(problem: Problem, settings: list[Setting], pdl: tuple[str, ...], chain: str) -> list[Setting]:
    """The two that a quick look finds best: what lies between them may be noise."""
    times = {setting: quick(problem, problem.one_kernel(setting), chain) for setting in settings if setting.pdl in pdl}
    return sorted(times, key=times.__getitem__)[:2]


def compile_ahead(case: tuple[Shape, int, Setting]) -> None:
    """In a process of its own: Triton's cache on disk keeps what it compiles."""
    shape, tokens, setting = case
    # Sizes are no part of what is compiled: one layer, and few columns.
    problem = Problem(replace(shape, hidden=setting.block * 4), tokens, layers=1)
    problem.shape = shape
    for variant in (setting, *setting.early()):
        try:
            problem.one_kernel(variant, warmup=True)(0)
        except Exception as error:
            print("does not compile:", variant, repr(error)[:300], flush=True)


# --- record -------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], chain: str) -> str:
    columns = [name for name in COLUMNS if any(name in row[chain] for row in rows)]
    lines = ["| K: heads | tokens | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for row in rows:
        times = [f"{row[chain][way][0]:.2f}" if way in row[chain] else "" for way in columns]
        lines.append(f"| {row['shape']} | {row['tokens']} | " + " | ".join(times) + " |")
    return "\n".join(lines)


def gains(rows: list[dict[str, Any]]) -> str:
    """What the one kernel takes less than the pair, with and without PDL; and what PDL takes off the pair."""
    head = [f"one kernel, {chain}" for chain in CHAINS] + [f"PDL of the fused kernel, {chain}" for chain in CHAINS[:2]]
    lines = ["| K: heads | tokens | " + " | ".join(head) + " |", "|---" * (2 + len(head)) + "|"]
    for row in rows:
        one = [less(row[chain], PAIRS, tuple(ONE_KERNEL)[:2]) for chain in CHAINS]
        early = [less(row[chain], PAIRS[:1], PAIRS[1:]) for chain in CHAINS[:2]]
        lines.append(f"| {row['shape']} | {row['tokens']} | " + " | ".join(one + early) + " |")
    return "\n".join(lines)


def less(times: dict[str, list[float]], before: tuple[str, ...], after: tuple[str, ...]) -> str:
    """Between the quicker of some and the quicker of others."""
    if not all(name in times for name in after):
        return ""
    return f"{min(times[name][0] for name in before) - min(times[name][0] for name in after):+.2f}"


def accuracy(rows: list[dict[str, Any]]) -> str:
    lines = ["| K: heads | tokens | cuBLAS + fused | one kernel | same bits |", "|---|---|---|---|---|"]
    for row in rows:
        found = row["errors of q, k and v"]
        shown = [" ".join(f"{e:.2e}" for e in found[way]) if way in found else "" for way in (PAIRS[0], "one kernel")]
        same = "yes" if all(row["same bits"].values()) else str(row["same bits"])
        lines.append(f"| {row['shape']} | {row['tokens']} | {shown[0]} | {shown[1]} | {same} |")
    return "\n".join(lines)


def best_settings(rows: list[dict[str, Any]]) -> str:
    lines = ["| K: heads | tokens | alone | PDL, behind a norm |", "|---|---|---|---|"]
    for row in rows:
        alone = row["settings"]["alone"].get("one kernel", "")
        early = row["settings"]["behind a norm"].get("one kernel + PDL", "")
        lines.append(f"| {row['shape']} | {row['tokens']} | {alone} | {early} |")
    return "\n".join(lines)


def render(folder: Path) -> None:
    """projection_epilogue.md from projection_epilogue.json."""
    record = json.loads((folder / "projection_epilogue.json").read_text())
    rows, replays = record["rows"], record["replays"]
    few = [row for row in rows if row["settings"]["alone"]]
    parts = [
        "# The prologue in the epilogue of the projection",
        ", ".join(str(value) for value in record["machine"].values()) + ". Microseconds a layer; the head of "
        "`examples/benchmarks/projection_epilogue.py` says what is measured.",
        "## Projection and prologue alone", table(rows, CHAINS[0]),
        "## Behind a kernel that norms the input, its time included", table(rows, CHAINS[1]),
        "## Behind one that lets its dependent begin at once", table(rows, CHAINS[2]),
        "## What is gained",
        "By the one kernel beside cuBLAS and the fused kernel, each with PDL or without, whichever is quicker; and by "
        "PDL of the fused kernel.",
        gains(rows),
        "## Settings", best_settings(few),
        "## Error against float64",
        f"Of q, k and v, relative to their norm; and whether {replays} replays gave the same bits, and the fused "
        "kernel with PDL those without.",
        accuracy(rows),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    (folder / "projection_epilogue.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tokens", default="1,8,16,32,64,128,256,1024")
    parser.add_argument("--shapes", default=",".join(map(str, SHAPES)))
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile ahead")
    parser.add_argument("--replays", type=int, default=1000, help="in which the bits must be the same")
    parser.add_argument("--render", action="store_true", help="only the tables, from projection_epilogue.json")
    options = parser.parse_args()
    if options.render:
        return render(options.output)
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        parser.exit(2, "projection_epilogue.py measures a NVIDIA GPU of compute capability 9.0 or more\n")
    shapes = [shape for shape in SHAPES if str(shape) in options.shapes.split(",")]
    tokens = [int(number) for number in options.tokens.split(",")]
    cases = list(itertools.product(shapes, tokens))
    # A compilation serves every shape.
    todo = {setting: (shape, number, setting) for shape, number in cases for setting in settings_for(shape, number)}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.map(compile_ahead, list(todo.values()), chunksize=1)
    machine = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    record: dict[str, Any] = {"machine": machine, "unit": "microseconds a layer: [median, distance of quartiles]"}
    record["replays"], record["rows"] = options.replays, []
    options.output.mkdir(parents=True, exist_ok=True)
    for shape, number in cases:
        record["rows"].append(measure(shape, number, options.replays))
        print(json.dumps({key: value for key, value in record["rows"][-1].items() if key != "tried"}), flush=True)
        (options.output / "projection_epilogue.json").write_text(json.dumps(record, indent=1) + "\n")
    render(options.output)


if __name__ == "__main__":
    main()
