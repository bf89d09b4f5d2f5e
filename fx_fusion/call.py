"""Two ways to put the fused call into a graph: as an operation, or as a Triton kernel that Inductor launches itself.

Either is functional here: the caches go in and come out as values. Inductor makes the call work in place again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion import op
from fx_fusion.emit import Emitter
from fx_fusion.kernels import triton, triton_launch
from fx_fusion.kernels.cache_layout import as_float8
from fx_fusion.kernels.early_launch import constants_in_graph
from fx_fusion.nodes import value_of
from fx_fusion.opset import aten


@dataclass(frozen=True)
class Results:
    """What a call leaves: q and k rotated, and each cache as it is afterwards, by what it was before."""

    q: Node
    k: Node | None
    caches: dict[Node, Node]


def insert(
    emit: Emitter,
    kernel: str,
    operands: Mapping[str, Node | None],
    k_cache: Node,
    v_cache: Node,
    options: Mapping[str, Any],
    *,
    return_k: bool,
) -> Results:
    """Call `kernel`. `operands` and `options` are those of the operation, named as in its schema."""
    if kernel == "triton":
        return _insert_triton(emit, operands, k_cache, v_cache, options, return_k)
    return _insert_op(emit, kernel, operands, k_cache, v_cache, options, return_k)


def _insert_op(
    emit: Emitter,
    kernel: str,
    operands: Mapping[str, Node | None],
    k_cache: Node,
    v_cache: Node,
    options: Mapping[str, Any],
    return_k: bool,
) -> Results:
    bases = list(dict.fromkeys((k_cache, v_cache)))
    q, k = value_of(operands["q"]), value_of(operands["k"])
    with q.fake_mode:
        rotated = (q.new_empty(q.shape), k.new_empty(k.shape if return_k else (0,)))
    arguments = {
        **operands,
        **options,
        **{name: list(options[name]) for name in ("k_layout", "v_layout")},
        "return_k": return_k,
        "implementation": kernel,
        "_k_cache_base_index": bases.index(k_cache),
        "_v_cache_base_index": bases.index(v_cache),
        "_all_bases": bases,
    }
    values = (*rotated, *map(_after, bases))
    call = emit.call_with_value(values, auto_functionalized_v2, op.OVERLOAD, **arguments)
    return Results(
        emit.call(operator.getitem, call, 0),
        emit.call(operator.getitem, call, 1) if return_k else None,
        {base: emit.call(operator.getitem, call, 2 + i) for i, base in enumerate(bases)},
    )


def _insert_triton(
    emit: Emitter,
    operands: Mapping[str, Node | None],
    k_cache: Node,
    v_cache: Node,
    options: Mapping[str, Any],
    return_k: bool,
) -> Results:
    tensors: dict[str, Node | None] = {**operands, "k_cache": k_cache, "v_cache": v_cache}
    values: list[Any] = [value_of(node) for node in tensors.values()]
    told = {name: value for name, value in options.items() if name != "float8"}
    with values[-1].fake_mode:
        values[-2:] = [as_float8(cache, options.get("float8")) for cache in values[-2:]]
    launch = triton_launch.plan(*values, **told)
    tensors["q_out"] = _empty_like(emit, operands["q"])
    tensors["k_out"] = _empty_like(emit, operands["k"]) if return_k else None
    if k_cache is v_cache:
        # One tensor is one argument: two would be two values, of which one would lose the other's writes.
        tensors["v_cache"] = None
    symbolic = {name: size for name, size in launch.arguments.items() if isinstance(size, torch.SymInt)}
    constant = {
        **{name: None for name, node in tensors.items() if node is None},
        **{name: size for name, size in launch.arguments.items() if name not in symbolic},
        **constants_in_graph(launch.constants),
    }
    present = {name: node for name, node in tensors.items() if node is not None}
    written = [name for name in ("k_cache", "v_cache", "q_out", "k_out") if name in present]
    arguments = {
        "kernel_idx": kernel_side_table.add_kernel(triton.with_warps(launch.tile.num_warps)),
        "constant_args_idx": kernel_side_table.add_constant_args(constant),
        "grid": [(*launch.grid, 1)],
        "tma_descriptor_metadata": {},
        "kwargs": {**present, **symbolic},
        "tensors_to_clone": written,
    }
    after = {name: _after(present[name]) for name in written}
    call = emit.call_with_value(after, triton_kernel_wrapper_functional, **arguments)
    # Sizes and strides are arguments of the launch: the tensors must arrive with the very strides they have here.
    call.meta["eager_input_vals"] = ((), map_aggregate(call.kwargs, value_of))
    result = {name: emit.call(operator.getitem, call, name) for name in written}
    return Results(
        result["q_out"],
        result.get("k_out"),
        {k_cache: result["k_cache"], v_cache: result.get("v_cache", result["k_cache"])},
    )


def _after(node: Node) -> torch.Tensor:
    """The fake value of a tensor that the call writes, after the call.

    It gets storage of its own: a fake value that shares the input's would make Inductor see the reader of the new
    cache as a reader of the old one, and copy the cache.
    """
    value = value_of(node)
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _empty_like(emit: Emitter, node: Node | None) -> Node:
    value = value_of(node)
    with value.fake_mode:
        empty = value.new_empty(value.shape)
    return emit.call_with_value(
        empty, aten.empty.memory_format, list(value.shape), dtype=value.dtype, device=value.device, pin_memory=False
    )
