"""What PyTorch believes that the Triton kernel writes: its caches and its results, nothing else.

PyTorch reads it off the kernel's code. An input that it takes for written is a mutated input: CUDA graphs refuse it.
"""

from __future__ import annotations

import pytest
import torch
from prologue import HEAD_DIM, NUM_KV_HEADS, Prologue, arguments
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

from fx_fusion.config import Config
from fx_fusion.fusion_pass import apply
from fx_fusion.kernels import triton_launch

triton = pytest.importorskip("triton")
BLOCKS, BLOCK_SIZE = 4, 16


class Hopper:
    """Code is generated for it, as far as Triton's own representation; nothing runs."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def target(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())


class InBlocks(Prologue):
    def store(self, cache, slots, value):
        cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = value


class InOneTensor(Prologue):
    """Keys and values in one cache."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        return super().forward(x, positions, slots, k_cache[:, 0], k_cache[:, 1])


CASES = {
    "plain": (Prologue, (64, NUM_KV_HEADS, HEAD_DIM), {"k_cache", "v_cache", "q_out"}),
    "blocks": (InBlocks, (BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), {"k_cache", "v_cache", "q_out"}),
    "one tensor": (InOneTensor, (64, 2, NUM_KV_HEADS, HEAD_DIM), {"k_cache", "q_out"}),
}


@pytest.mark.parametrize("early", [False, True], ids=["as ever", "launched early"])
@pytest.mark.parametrize("name", CASES)
def test_pytorch_sees_what_the_kernel_writes(name, early, monkeypatch):
    monkeypatch.setattr(triton_launch, "launches_early", lambda device: early)
    module, cache, expected = CASES[name]
    calls = rewritten(module(), arguments(cache=cache)).find_nodes(
        op="call_function", target=triton_kernel_wrapper_functional
    )
    assert list(map(writes, calls)) == [expected]


def rewritten(module, args):
    """The graph of `module` with a call of the kernel, which is not run."""
    from torch._inductor.compile_fx import compile_fx

    seen = []

    class Enough(Exception):
        pass

    def stop(gm, inputs, **kwargs):
        seen.append(gm.graph)
        apply(gm.graph, Config(kernel="triton", target="cuda", strict=True))
        raise Enough

    def backend(gm, inputs):
        return compile_fx(gm, inputs, inner_compile=stop, config_patches={"force_disable_caches": True})

    with pytest.raises(Exception, match="Enough"), torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(*args)
    return seen[0]


def writes(node):
    kwargs = node.kwargs
    values = {name: value.meta["val"] for name, value in kwargs["kwargs"].items()}
    return set(triton_kernel_wrap.get_mutated_tensors(kwargs["kernel_idx"], kwargs["constant_args_idx"], values, {}))
