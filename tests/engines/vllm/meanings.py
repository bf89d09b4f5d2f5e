"""Declared meanings beside vLLM's own operations: ``python meanings.py``, in the engine's environment.

Prints one line ``RESULT`` with a JSON object: for each declared operation its schema (None where this build has none),
what keeps the meaning from being called like it, and the comparisons of both on the CPU.
"""

from __future__ import annotations

import importlib
import json

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fx_fusion.graph.sizes import Sizes
from fx_fusion.semantics.compare import COMPARISONS
from fx_fusion.semantics.declare import signature_mismatch
from fx_fusion.semantics.libraries.vllm import HIDDEN, MEANINGS

T, HQ, HK, D = 7, 8, 2, 64


def packed(dtype: torch.dtype) -> list[torch.Tensor]:
    """Heads of q and k, [T, H, D], that are views of one projection."""
    qkv = torch.empty(T, (HQ + 2 * HK) * D, dtype=dtype)
    return [part.view(T, -1, D) for part in qkv.split([HQ * D, HK * D, HK * D], -1)[:2]]


def calls(dtype: torch.dtype):
    """(name, what is special, operation, arguments by name, what is written)"""
    x, heads, weight = torch.empty(T, 256, dtype=dtype), torch.empty(T, HQ, D, dtype=dtype), torch.empty(D, dtype=dtype)
    wide = torch.empty(256, dtype=dtype)
    yield "vllm_ir::rms_norm", "heads", {"x": heads, "weight": weight, "epsilon": 1e-6}, ()
    yield "vllm_ir::rms_norm", "packed heads", {"x": packed(dtype)[0], "weight": weight, "epsilon": 1e-6}, ()
    yield "vllm_ir::rms_norm", "no weight", {"x": x, "weight": None, "epsilon": 1e-6}, ()
    norm = {"weight": weight, "epsilon": 1e-6}
    yield "_C::rms_norm", "heads", {"result": torch.empty_like(heads), "input": heads, **norm}, ("result",)
    views = {"result": torch.empty_like(heads), "input": packed(dtype)[0], **norm}
    yield "_C::rms_norm", "packed heads", views, ("result",)
    added = {"input": x, "residual": torch.empty_like(x), "weight": wide, "epsilon": 1e-6}
    yield "_C::fused_add_rms_norm", "rows", added, ("input", "residual")
    for rotary_dim, is_neox in ((D, True), (D, False), (D // 2, True)):
        table = torch.empty(50, rotary_dim, dtype=dtype)
        positions = torch.empty(T, dtype=torch.int64)
        rope = {"positions": positions, "head_size": D, "cos_sin_cache": table, "is_neox": is_neox}
        q, k = torch.empty(T, HQ * D, dtype=dtype), torch.empty(T, HK * D, dtype=dtype)
        special = f"rows, {rotary_dim} lanes, {'neox' if is_neox else 'gpt-j'}"
        yield "_C::rotary_embedding", special, {**rope, "query": q, "key": k}, ("query", "key")
        q, k = heads, torch.empty(T, HK, D, dtype=dtype)
        yield "_C::rotary_embedding", special.replace("rows", "heads"), {**rope, "query": q, "key": k}, ("query", "key")


def find(name: str) -> torch._ops.OpOverload | None:
    space, _, base = name.partition("::")
    base, _, overload = base.partition(".")
    return getattr(getattr(getattr(torch.ops, space), base, None), overload or "default", None)


def main() -> None:
    for module in ("vllm._custom_ops", "vllm.ir.ops", "vllm.model_executor.layers.attention.attention",
                   "vllm.model_executor.layers.rotary_embedding.mrope"):  # fmt: skip
        importlib.import_module(module)
    importlib.import_module("vllm.platforms").current_platform.import_kernels()
    meanings = {meaning.name: meaning for meaning in MEANINGS}
    schemas: dict[str, list[str | None]] = {}
    for name, meaning in meanings.items():
        op = find(name)
        schemas[name] = [str(op._schema), signature_mismatch(op, meaning.fn)] if op else [None, None]
    compared: dict[str, list] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, special, arguments, written in calls(dtype):
            op = find(name)
            if op is None:
                continue
            # Once, `out` of a norm was `result`: by place, as the meaning is called.
            names = [argument.name for argument in op._schema.arguments]
            here = {name: names[list(arguments).index(name)] if name == "result" else name for name in arguments}
            with FakeTensorMode() as mode:
                sample = {
                    here[key]: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for key, value in arguments.items()
                }
            written = tuple(here[name] for name in written)
            found = COMPARISONS.of(meanings[f"{name}.default"], op, sample, written, Sizes())
            title = f"{name}, {special}, {str(dtype).removeprefix('torch.')}"
            compared[title] = [found.differs, found.difference, str(found)]
    row, other = (torch.tensor([lanes * 16]).bfloat16() for lanes in ([256.0, 1.0], [1.0, 0.0]))
    torch.ops._C.fused_add_rms_norm(other, row, torch.ones(32, dtype=torch.bfloat16), 0.0)
    added = [other[0, 1].item(), row[0, 0].item()]
    hidden = {name: str(op._schema) if (op := find(name)) else None for name in HIDDEN}
    print("RESULT " + json.dumps({"schemas": schemas, "compared": compared, "hidden": hidden, "added": added}))


if __name__ == "__main__":
    main()
