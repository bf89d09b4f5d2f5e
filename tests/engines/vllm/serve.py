"""Serve tiny models with the real engine, and print what each generated: ``python serve.py '[{"model": …}, …]'``.

Run in the engine's environment. For each object of the list a line ``RESULT`` with a JSON object, which holds ``error``
where the engine did not start. Keys: ``folder`` and ``model``; ``engine``, arguments of ``vllm.LLM``; ``compilation``,
of ``CompilationConfig``; ``vllm_compile``, whether vLLM's own backend compiles (on a CPU, it leaves that to Inductor);
``image``; ``prompts``; ``tokens``; ``times``, how often the prompts are served; ``change``, a context of :mod:`changes`
in which all of this happens.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(_name, _value)

sys.path.insert(0, str(Path(__file__).parent))

#: Whatever is defined in them goes with them.
_libraries: list = []

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [100, 200, 300], [17] * 20, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
IMAGE_PROMPT = [5, 1002, 1000, 1003, 6, 7, 8]


@contextlib.contextmanager
def vllm_compile_on_cpu():
    """Let the CPU platform keep vLLM's own backend, with its pass manager and its piecewise graphs."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def keep(cls, vllm_config):
        original.__func__(cls, vllm_config)
        config = vllm_config.compilation_config
        if config.mode == CompilationMode.DYNAMO_TRACE_ONCE:
            config.mode, config.backend = CompilationMode.VLLM_COMPILE, "inductor"
            config.ir_enable_torch_wrap, config.cudagraph_mode = True, CUDAGraphMode.NONE

    CpuPlatform.check_and_update_config = classmethod(keep)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


def define_missing_operations():
    """Operations of vLLM's GPU build that its passes compare nodes with: names, without an implementation."""
    import re

    import torch

    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    names: dict[str, set[str]] = {}
    for place in ("compilation", "model_executor/layers/fusion", "model_executor/layers/quantization/utils",
                  "model_executor/layers/rotary_embedding", "_aiter_ops.py"):  # fmt: skip
        files = [root / place] if (root / place).is_file() else (root / place).rglob("*.py")
        for file in files:
            for space, name in re.findall(r"torch\.ops\.(_C\w*|_moe_C)\.(\w+)(?:\.default|\.out)", file.read_text()):
                names.setdefault(space, set()).add(name)
    libraries = []
    for space, found in names.items():
        library = torch.library.Library(space, "FRAGMENT")
        for name in sorted(found):
            if not hasattr(getattr(torch.ops, space), name):
                library.define(f"{name}() -> ()")
                library.define(f"{name}.out() -> ()")
        libraries.append(library)
    return libraries


def serve(spec: dict) -> dict:
    """What was generated: token ids and log-probabilities of each prompt, what the plug-in saw, and the reports."""
    from vllm import LLM, SamplingParams
    from vllm.config import CompilationConfig

    own = spec.get("vllm_compile", False)
    if own and not _libraries:
        importlib.import_module("vllm._custom_ops")
        _libraries.extend(define_missing_operations())
    compilation = spec.get("compilation", {})
    if own:
        compilation = {"compile_sizes": [], "pass_config": {"fuse_rope_kvcache_cat_mla": False}, **compilation}
    engine = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, "seed": 0,
        "disable_log_stats": False,
        **({} if spec.get("image") else {"skip_tokenizer_init": True}), **spec.get("engine", {}),
    }  # fmt: skip
    if "_vl" in spec["model"]:
        engine["limit_mm_per_prompt"] = {"image": int(bool(spec.get("image"))), "video": 0}
        engine["mm_processor_cache_gb"] = 0
    with vllm_compile_on_cpu() if own else contextlib.nullcontext():
        llm = LLM(f"{spec['folder']}/{spec['model']}", compilation_config=CompilationConfig(**compilation), **engine)
    prompts = [{"prompt_token_ids": each} for each in spec.get("prompts", PROMPTS)]
    if spec.get("image"):
        prompts.append({"prompt_token_ids": IMAGE_PROMPT, "multi_modal_data": {"image": _picture()}})
    wanted = SamplingParams(
        temperature=0, max_tokens=spec.get("tokens", 12), detokenize=False, ignore_eos=True, logprobs=1
    )
    served = []
    for _ in range(spec.get("times", 1)):
        served += [output.outputs[0] for output in llm.generate(prompts, wanted, use_tqdm=False)]
    return {
        "tokens": [list(each.token_ids) for each in served],
        "logprobs": [
            [of[token].logprob for of, token in zip(each.logprobs, each.token_ids, strict=True)] for each in served
        ],
        **_seen(),
        **_about(llm),
    }


def _picture():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (96, 128, 3), dtype=np.uint8))


def _about(llm) -> dict:
    config = llm.llm_engine.vllm_config.compilation_config
    layers = [each for each in config.static_forward_context.values() if hasattr(each, "attn_backend")]
    return {
        "mode": config.mode.name,
        "preemptions": sum(each.value for each in llm.get_metrics() if each.name == "vllm:num_preemptions"),
        "splitting_ops": config.splitting_ops,
        "backends": sorted({each.attn_backend.get_name() for each in layers}),
    }


def _seen() -> dict:
    """Nothing where the plug-in is off: then none of it may be imported."""
    if "fx_fusion" not in sys.modules:
        return {"plugin": False}
    from fx_fusion.engines.vllm.operation import SEEN
    from fx_fusion.report import REPORTS

    return {
        "plugin": True,
        "seen": {name: vars(each) for name, each in SEEN.items()},
        "reports": [str(each) for each in REPORTS.since(_reports_before)],
        "passes": _passes[0],
    }


#: How often a graph pass ran in this process, and the reports of earlier engines.
_passes = [0]
_reports_before: dict = {}


def count_passes() -> None:
    from fx_fusion import fusion_pass

    apply = fusion_pass.apply

    def counted(*args, **kwargs):
        _passes[0] += 1
        return apply(*args, **kwargs)

    fusion_pass.apply = counted


def one(spec: dict) -> dict:
    """As `serve`, and the engine is gone afterwards."""
    import torch

    if "fx_fusion" in sys.modules:
        from fx_fusion.report import REPORTS

        importlib.import_module("fx_fusion.engines.vllm.operation").SEEN.clear()
        _passes[0] = 0
        _reports_before.update(REPORTS.snapshot())
    torch._dynamo.reset()
    try:
        with _change(spec.get("change")):
            return serve(spec)
    except BaseException as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


def _change(name: str | None):
    import changes

    return getattr(changes, name)() if name else contextlib.nullcontext()


def main() -> None:
    if os.environ.get("FX_FUSION_VLLM"):
        count_passes()
    for spec in json.loads(sys.argv[1]):
        print("RESULT " + json.dumps(one(spec)), flush=True)


if __name__ == "__main__":
    main()
