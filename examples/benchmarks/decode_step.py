"""One decode step of a whole model: stock torch.compile beside backend="fx_fusion", under CUDA graphs.

    python examples/benchmarks/decode_step.py [--model qwen3-vl-8b] [--batch 1,8,32,128] [--context 1024] [--layers 36]

The model is examples/qwen3_vl_serving.py at the sizes of Qwen3-VL-8B's text model, or of Qwen3-30B-A3B (a token's eight
experts of 768 as one dense block of 6144), in bfloat16, with random weights.
Every sequence decodes its `context`-th token. Both variants are the same module, compiled for the very batch size; they
take turns, so that neither has the warmer GPU. A repeat is the mean of several steps; shown are the median over repeats
and, in brackets, the distance between the quartiles.

What to make of the result: that model's attention gathers its pages in plain PyTorch, and may give every query head a
copy of them, where no fused attention takes a mask and grouped heads. A serving engine does neither. At a large batch
times context attention is most of this step, in both variants, and the gain looks smaller than it would beside a paged
attention kernel; `--context 64` shows a step with little attention. The gain is stated as measured, whatever it is.

Writes decode_step.json, decode_step.md and, with matplotlib, decode_step.svg. A run keeps the batch sizes that an
earlier one left there for the same machine and model, so that a table can be made in several runs: compiling 36 layers
takes minutes for each batch size and variant.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from qwen3_vl_serving import Batch, Decoder, DecoderConfig  # noqa: E402

import fx_fusion  # noqa: E402
from fx_fusion.proof.region_function import relative_difference  # noqa: E402

QWEN3_VL_8B = DecoderConfig(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8,
    head_dim=128, mrope_section=(24, 20, 20),
)  # fmt: skip
QWEN3_30B_A3B = DecoderConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_layers=48, num_heads=32, num_kv_heads=4,
    head_dim=128, mrope_section=(24, 20, 20),
)  # fmt: skip
#: By name, and what the files of each are called.
MODELS = {"qwen3-vl-8b": (QWEN3_VL_8B, "decode_step"), "qwen3-30b-a3b": (QWEN3_30B_A3B, "decode_step_30b_a3b")}
TINY = DecoderConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    mrope_section=(6, 5, 5),
)  # fmt: skip

VARIANTS = ("stock", "fused")
WARM_UP = 4

Step = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Measured:
    """One variant at one batch size.

    Attributes:
        kernels: what a step puts on the device, copies left out; None where no device was profiled.
        fused_kernels: those of them that are ours.
        fused_layers: as the report of the compilation says.
        cuda_graph_skips: how often Inductor declined to capture; 0, or the step ran without a graph.
    """

    milliseconds: float
    quartile_spread: float
    tokens_per_second: float
    kernels: int | None
    fused_kernels: int | None
    fused_layers: int
    compile_seconds: float
    cuda_graph_skips: int


@dataclass(frozen=True)
class Warm:
    """What the first steps of a variant tell."""

    compile_seconds: float
    cuda_graph_skips: int
    fused_layers: int
    logits: Tensor


# --- model and step -----------------------------------------------------------------------------------------------


def make_model(config: DecoderConfig, device: torch.device) -> Decoder:
    """Made on the device and in bfloat16: 8 billion random numbers take minutes on a CPU."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Decoder(config)
    finally:
        torch.set_default_dtype(default)
    model = model.to(torch.bfloat16).eval()
    for layer in model.layers:
        layer.attention.attention.k_cache.normal_()
        layer.attention.attention.v_cache.normal_()
    return model


def blocks_of(context: int, config: DecoderConfig) -> int:
    return -(-context // config.block_size)


def make_step(config: DecoderConfig, batch: int, context: int, device: torch.device) -> Batch:
    """One text token of each of `batch` sequences, each the last of `context`; pages lie in no order."""
    blocks = blocks_of(context, config)
    tables = torch.randperm(config.num_blocks, device=device)[: batch * blocks].view(batch, blocks)
    last = context - 1
    return Batch(
        tokens=torch.randint(config.vocab_size, (batch,), device=device),
        positions=torch.full((3, batch), last, device=device),
        slot_mapping=tables[:, last // config.block_size] * config.block_size + last % config.block_size,
        block_tables=tables,
        context_lens=torch.full((batch,), context, device=device),
    )


def compiled(model: Decoder, variant: str, kernel: str, device: torch.device) -> Step:
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    if variant == "stock":
        return torch.compile(model, dynamic=False, fullgraph=True, mode=mode)
    options = {
        "fx_fusion.kernel": kernel, "fx_fusion.mode": mode, "fx_fusion.require": model.config.num_layers,
        "fx_fusion.strict": True,
    }  # fmt: skip
    return torch.compile(model, backend="fx_fusion", dynamic=False, fullgraph=True, options=options)


# --- measuring ----------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_steps(step: Step, batch: Batch, count: int, device: torch.device) -> float:
    """Milliseconds a step."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        torch.compiler.cudagraph_mark_step_begin()
        step(batch)
    synchronize(device)
    return 1e3 * (time.perf_counter() - started) / count


def warm_up(step: Step, batch: Batch, device: torch.device) -> Warm:
    """Compile, and repeat until CUDA graphs are recorded."""
    fx_fusion.report.REPORTS.clear()
    skips = cuda_graph_skips()
    started = time.perf_counter()
    logits = step(batch).clone()
    synchronize(device)
    seconds = time.perf_counter() - started
    run_steps(step, batch, WARM_UP, device)
    report = fx_fusion.last_report()
    return Warm(seconds, cuda_graph_skips() - skips, len(report.fused) if report else 0, logits)


def cuda_graph_skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def kernels_of(step: Step, batch: Batch, device: torch.device) -> tuple[int, int] | tuple[None, None]:
    """What one step puts on the device, copies left out: all kernels, and those that are ours."""
    if device.type != "cuda":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_steps(step, batch, 1, device)
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    return len(names), sum("qk_norm_rope_cache" in name for name in names)


def measure(
    model: Decoder, batch_size: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Of each variant. With both there is also ``logits_differ_by``, relative to the largest logit."""
    torch.compiler.reset()
    batch = make_step(model.config, batch_size, arguments.context, device)
    steps = {variant: compiled(model, variant, arguments.kernel, device) for variant in arguments.variants}
    warmed = {variant: warm_up(step, batch, device) for variant, step in steps.items()}
    samples: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(arguments.repeats):
        for variant, step in steps.items():
            samples[variant].append(run_steps(step, batch, arguments.steps, device))
    found: dict[str, Any] = {}
    for variant, step in steps.items():
        low, middle, high = statistics.quantiles(samples[variant], n=4)
        kernels, ours = kernels_of(step, batch, device)
        warm = warmed[variant]
        found[variant] = asdict(
            Measured(
                milliseconds=middle,
                quartile_spread=high - low,
                tokens_per_second=1e3 * batch_size / middle,
                kernels=kernels,
                fused_kernels=ours,
                fused_layers=warm.fused_layers,
                compile_seconds=warm.compile_seconds,
                cuda_graph_skips=warm.cuda_graph_skips,
            )
        )
    if len(steps) == len(VARIANTS):
        found["logits_differ_by"] = relative_difference(warmed["fused"].logits, warmed["stock"].logits)
    return found


# --- writing ------------------------------------------------------------------------------------------------------


def machine_of(device: torch.device) -> dict[str, str | None]:
    triton = sys.modules.get("triton")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "fx_fusion": fx_fusion.__version__,
    }


def merged(record: dict[str, Any], earlier: str | None) -> dict[str, Any]:
    """`record`, and the batch sizes that `earlier` has of the same machine and setup besides."""
    old = json.loads(earlier) if earlier else {}
    if any(old.get(name) != record[name] for name in ("machine", "setup")):
        return record
    batches = {**old["batches"], **record["batches"]}
    return {**record, "batches": {size: batches[size] for size in sorted(batches, key=int)}}


def markdown(record: dict[str, Any]) -> str:
    machine, setup = record["machine"], record["setup"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "device")
    model = f"{setup['num_layers']} layers, hidden {setup['hidden_size']}, heads {setup['num_heads']}"
    model += f"/{setup['num_kv_heads']}x{setup['head_dim']}, context {setup['context']}, bfloat16"
    lines = [
        "# One decode step",
        "",
        f"{machine['device']}, {versions}, {record['date']}. {model}, kernel={setup['kernel']}.",
        "",
        "`python examples/benchmarks/decode_step.py`: its head says what is measured, and what to make of it.",
        "",
        "| batch | ms stock | ms fused | gain | tokens/s stock | tokens/s fused | kernels stock | kernels fused |",
        "|---|---|---|---|---|---|---|---|",
        *(row(size, found) for size, found in record["batches"].items()),
    ]
    return "\n".join(lines) + "\n"


def row(size: str, found: dict[str, Any]) -> str:
    stock, fused = (found.get(variant) for variant in VARIANTS)
    gain = f"{100 * (stock['milliseconds'] / fused['milliseconds'] - 1):+.1f} %" if stock and fused else "-"
    times = [f"{v['milliseconds']:.3f} ({v['quartile_spread']:.3f})" if v else "-" for v in (stock, fused)]
    rates = [f"{v['tokens_per_second']:.0f}" if v else "-" for v in (stock, fused)]
    kernels = [str(v["kernels"]) if v and v["kernels"] is not None else "-" for v in (stock, fused)]
    return f"| {' | '.join([size, *times, gain, *rates, *kernels])} |"


def plot(record: dict[str, Any], path: Path) -> None:
    """Milliseconds a step as bars, side by side."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    batches = {size: found for size, found in record["batches"].items() if all(name in found for name in VARIANTS)}
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for shift, variant in zip((-0.2, 0.2), VARIANTS, strict=True):
        heights = [found[variant]["milliseconds"] for found in batches.values()]
        bars = axes.bar([place + shift for place in range(len(heights))], heights, width=0.4, label=variant)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set(
        xticks=range(len(batches)), xticklabels=list(batches), xlabel="batch", ylabel="ms a step",
        title=f"{record['machine']['device']}, context {record['setup']['context']}",
    )  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def write(record: dict[str, Any], folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    record = merged(record, path.read_text() if path.exists() else None)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(record))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {stem}.svg: matplotlib is not installed")
    else:
        plot(record, folder / f"{stem}.svg")
    print(markdown(record))


# --- the command --------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batch", default="1,8,32,128", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--model", default="qwen3-vl-8b", choices=MODELS)
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the script")
    parser.add_argument("--kernel", help="triton, aiter, auto or reference (default: triton, on the CPU reference)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=11, help="of each variant, in turns; at least 2")
    parser.add_argument("--steps", type=int, default=20, help="steps of one repeat")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "decode_step.py: PyTorch finds no GPU here; try --device cpu --tiny\n")
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2: one repeat has no spread")
    arguments.kernel = arguments.kernel or ("triton" if arguments.device == "cuda" else "reference")
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config, stem = MODELS[arguments.model]
    config = TINY if arguments.tiny else config
    config = replace(
        config,
        num_layers=arguments.layers or config.num_layers,
        max_position=arguments.context,
        num_blocks=max(arguments.batch) * blocks_of(arguments.context, config),
    )
    model = make_model(config, device)
    # The number of pages follows from the batch sizes of this run: it is not what tells two setups apart.
    setup = {**asdict(replace(config, num_blocks=0)), "context": arguments.context, "kernel": arguments.kernel}
    record = {
        "date": datetime.date.today().isoformat(), "setup": json.loads(json.dumps(setup)),
        "unit": "milliseconds a step", "repeats": arguments.repeats, "steps": arguments.steps,
    }  # fmt: skip
    for size in arguments.batch:
        found = measure(model, size, arguments, device)
        print(f"batch {size}: {json.dumps(found)}", flush=True)
        # Written after each: what is measured is kept if a later one fails.
        write({**record, "machine": machine_of(device), "batches": {str(size): found}}, arguments.output, stem)


if __name__ == "__main__":
    main()
