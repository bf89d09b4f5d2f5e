"""Host time of one fused call on a GPU, by each way to it.

    python examples/benchmarks/launch_host_cost.py

* launch: a plain Triton launch, its arguments prepared: what any kernel with as many arguments costs;
* operation: ``torch.ops.fx_fusion.qk_norm_rope_cache``, called directly: it looks its plan up, checks and allocates;
* compiled fused, compiled stock: a compiled projection and prologue, outside a CUDA graph, with fx_fusion's one launch
  and with stock Inductor's several.

One token, so that the device waits for the host. Prints a line of JSON: microseconds, median and quartile spread.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3_vl_serving import Attention, DecoderConfig, MRotaryEmbedding

from fx_fusion.kernels.call import to_arguments
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel, plan
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call

SHAPE = Shape(32, 8, 128, 128, "bfloat16")
REPEATS, CALLS = 31, 200


class Prologue(Attention):
    """The serving example's attention up to the stores."""

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        q = self.q_norm(q.view(*q.shape[:-1], -1, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(*k.shape[:-1], -1, self.head_dim)).view(k.shape)
        q, k = self.rotary(positions, q, k)
        for cache, value in ((self.attention.k_cache, k), (self.attention.v_cache, v)):
            cache.view(-1, *cache.shape[2:])[slots] = value.view(x.shape[0], -1, self.head_dim)
        return q


def microseconds(call: Callable[[], object]) -> list[float]:
    """Median over repeats, and the spread between the quartiles. The device's queue is emptied between repeats."""
    for _ in range(3):
        call()
    samples: list[float] = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - started) / CALLS * 1e6)
    low, middle, high = statistics.quantiles(samples, n=4)
    return [round(middle, 1), round(high - low, 1)]


def launch(device: torch.device) -> Callable[[], object]:
    call = typical_call(SHAPE, 1, device)
    planned, program = plan(call), kernel()
    results = torch.empty_like(call.q), None
    arguments = [*call.tensors.values(), *results, *planned.arguments.values(), *planned.constants.values()]
    return lambda: program[planned.grid](*arguments, num_warps=planned.tile.num_warps)


def operation(device: torch.device) -> Callable[[], object]:
    call = typical_call(SHAPE, 1, device)
    tensors, told = tuple(call.tensors.values()), {**to_arguments(call.options), "implementation": "triton"}
    return lambda: OPERATION.overload(*tensors, **told)


def compiled(device: torch.device, **how: object) -> Callable[[], object]:
    config = DecoderConfig()
    model = Prologue(config, MRotaryEmbedding(config)).to(device)
    x = torch.randn(1, config.hidden_size, device=device)
    positions = torch.zeros(3, 1, dtype=torch.int64, device=device)
    slots = torch.tensor([3], device=device)
    run = torch.compile(model, dynamic=False, fullgraph=True, **how)
    return lambda: run(x, positions, slots)


@torch.no_grad()
def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("launch_host_cost.py measures launches on a GPU, and PyTorch finds none here")
    device = torch.device("cuda")
    fused = {"fx_fusion.kernel": "triton", "fx_fusion.require": 1}
    results = {
        "launch": microseconds(launch(device)),
        "operation": microseconds(operation(device)),
        "compiled fused": microseconds(compiled(device, backend="fx_fusion", options=fused)),
        "compiled stock": microseconds(compiled(device)),
    }
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"microseconds": results, "device": torch.cuda.get_device_name(), **versions}))


if __name__ == "__main__":
    main()
