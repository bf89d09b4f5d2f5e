"""Host time of one call of the fused operation: what the registration costs on top of the kernel's own launches.

    python examples/benchmarks/op_host_cost.py

The same reference function is called directly, through ``Library.define``/``impl`` (as fx_fusion registers it) and
through ``torch.library.custom_op`` with the same schema. Tensors are tiny, so time is host time. Prints a line of JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from fx_fusion.kernels.call import to_arguments
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION

REPEATS, CALLS = 31, 200

custom = torch.library.custom_op(
    "fx_fusion_benchmark::custom",
    OPERATION.run,
    mutates_args=OPERATION.written,
    schema=OPERATION.schema.removeprefix(OPERATION.name),
)


def microseconds(call: Callable[[], object]) -> list[float]:
    """Median over repeats, and the spread between the quartiles."""
    samples: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - started) / CALLS * 1e6)
    low, middle, high = statistics.quantiles(samples, n=4)
    return [round(middle, 1), round(high - low, 1)]


def main() -> None:
    torch.set_num_threads(1)
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = torch.randn(2, 1, 1, 8)
    slots = torch.tensor([[3]])
    k_cache, v_cache = torch.zeros(2, 1, 8, 1, 16)
    options = Options(
        k_layout=CacheLayout.of(k_cache), v_layout=CacheLayout.of(v_cache), k_scale_value=None, v_scale_value=None,
        q_eps=1e-6, k_eps=1e-6, gemma_norm=False, rotary_dim=16, is_neox=True, axes=(0,) * 8, saturate=False,
        skip_negative_slots=False, return_k=False,
    )  # fmt: skip
    call = Call(q, k, v, None, None, cos, sin, None, slots, None, None, None, k_cache, v_cache, options)
    tensors, told = tuple(call.tensors.values()), {**to_arguments(options), "implementation": "reference"}
    with torch.no_grad():
        results = {
            "direct": microseconds(lambda: reference.qk_norm_rope_cache(call)),
            "library": microseconds(lambda: OPERATION.overload(*tensors, **told)),
            "custom_op": microseconds(lambda: custom(*tensors, **told)),
        }
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"microseconds_median_and_quartile_spread": results, **versions}))


if __name__ == "__main__":
    main()
