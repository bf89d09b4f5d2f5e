"""A package that brings a kernel of its own for the built-in operation: here one for a CPU, in plain PyTorch.

    python examples/own_kernel.py

The operation is declared once (fx_fusion/kernels/qk_norm_rope_cache/call.py). A kernel is one class: where it runs,
what it refuses, how it does a call. An installed package registers its kernels by an entry point of the group
``fx_fusion.kernels``, a function like `register` below; then ``doctor`` and ``tune`` know them, and ``auto`` chooses
among them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from qwen3_vl_serving import Decoder, DecoderConfig, generate
from torch import Tensor

import fx_fusion
from fx_fusion.__main__ import main as command

Call = fx_fusion.Call[Tensor]


class FlatNeox(fx_fusion.Implementation[Call]):
    """Neox rotation of whole heads, tokens in one flat batch, tables of angles, a cache of k's dtype."""

    name = "flat_neox"

    def version(self) -> str:
        return "1"

    def unavailable(self, target: fx_fusion.Target) -> str | None:
        return None if target.platform == "cpu" else f"flat_neox runs on CPUs, the target is {target.name}"

    def refuses(self, call: Call, target: fx_fusion.Target) -> str | None:
        told = call.options
        if call.q.shape[0] != 1:
            return f"argument q: expected one flat batch, found {call.q.shape[0]} sequences"
        if not told.is_neox or told.rotary_dim != call.q.shape[3]:
            return f"option rotary_dim: expected all {call.q.shape[3]} lanes in neox pairs, found {told.rotary_dim}"
        if call.positions is None or call.cos.shape[-1] != told.rotary_dim // 2:
            return "argument cos: expected a table [P, rotary_dim / 2] and positions, found rows"
        if None in (told.q_eps, told.k_eps, call.q_weight, call.k_weight) or told.gemma_norm:
            return "argument q_weight: expected a norm with a weight on q and on k, found another"
        if {call.k_cache.dtype, call.v_cache.dtype} != {call.k.dtype} or told.skip_negative_slots:
            return f"argument k_cache: expected {call.k.dtype} for every token, found {call.k_cache.dtype}"
        return None

    def run(self, call: Call, setting: Any = None) -> tuple[Tensor, Tensor]:
        told = call.options
        cos, sin = (_angles(table, call.positions, told.axes) for table in (call.cos, call.sin))
        q = _rotated(_normalised(call.q, call.q_weight, told.q_eps), cos, sin).to(call.q.dtype)
        k = _rotated(_normalised(call.k, call.k_weight, told.k_eps), cos, sin).to(call.k.dtype)
        block = torch.zeros_like(call.slots) if call.blocks is None else call.blocks
        told.k_layout.view(call.k_cache)[block, call.slots] = k
        told.v_layout.view(call.v_cache)[block, call.slots] = call.v
        return q, k if told.return_k else k.new_empty(0)


def _angles(table: Tensor, positions: Tensor, axes: tuple[int, ...]) -> Tensor:
    """[1, T, 1, rotary_dim / 2]: each pair of lanes takes its row by its own axis of `positions` [A, 1, T]."""
    return torch.stack([table[positions[axis], pair] for pair, axis in enumerate(axes)], -1).unsqueeze(2)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def register() -> None:
    """What the entry point names."""
    fx_fusion.register_kernel(FlatNeox())


@torch.no_grad()
def main() -> None:
    """Register it, have ``doctor`` look at it, and decode with whatever ``auto`` chooses."""
    register()
    command(["doctor"])
    device, config = torch.device("cpu"), DecoderConfig()
    torch.manual_seed(0)
    model = Decoder(config).eval()
    expected = generate(model, config, 4, device)
    model.clear_caches()
    compiled = torch.compile(model, backend="fx_fusion", fullgraph=True, dynamic=False)
    tokens = generate(compiled, config, 4, device)
    report = fx_fusion.last_report()
    assert report is not None
    print(report)
    assert tokens == expected
    print("tokens equal eager's")


if __name__ == "__main__":
    main()
