"""The Triton kernel in a graph: a launch that Inductor makes itself."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.graph.edit import Emitter, fake_mode_of
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.torch_compat import kernel_side_table, triton_kernel_wrapper_functional
from fx_fusion.kernels.insert import Results, value_after
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, with_typed_caches
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import plan, with_warps


def insert_launch(emit: Emitter, call: Call[Node]) -> Results:
    """Launch the kernel for `call`. Its results are tensors that the graph makes, and that the launch writes."""
    values = call.map(value_of)
    with fake_mode_of(values.k_cache):
        launch = plan(with_typed_caches(values))
    tensors: dict[str, Node | None] = {
        **call.tensors,
        "q_out": _empty_like(emit, call.q),
        "k_out": _empty_like(emit, call.k) if call.options.return_k else None,
    }
    if call.k_cache is call.v_cache:
        # One tensor is one argument: two would be two values, of which one would lose the other's writes.
        tensors["v_cache"] = None
    symbolic = {name: size for name, size in launch.arguments.items() if isinstance(size, torch.SymInt)}
    constant = {
        **{name: None for name, node in tensors.items() if node is None},
        **{name: size for name, size in launch.arguments.items() if name not in symbolic},
        **launch.constants,
    }
    present = {name: node for name, node in tensors.items() if node is not None}
    written = [name for name in ("k_cache", "v_cache", "q_out", "k_out") if name in present]
    inserted = emit.call_with_value(
        {name: value_after(present[name]) for name in written},
        triton_kernel_wrapper_functional,
        kernel_idx=kernel_side_table.add_kernel(with_warps(launch.tile.num_warps)),
        constant_args_idx=kernel_side_table.add_constant_args(constant),
        grid=[(*launch.grid, 1)],
        tma_descriptor_metadata={},
        kwargs={**present, **symbolic},
        tensors_to_clone=written,
    )
    # Sizes and strides are arguments of the launch: the tensors must arrive with the very strides they have here.
    inserted.meta["eager_input_vals"] = ((), map_aggregate(inserted.kwargs, value_of))
    after = {name: emit.call(operator.getitem, inserted, name) for name in written}
    caches = {call.k_cache: after["k_cache"], call.v_cache: after.get("v_cache", after["k_cache"])}
    return Results((after["q_out"], after.get("k_out")), caches)


def _empty_like(emit: Emitter, node: Node) -> Node:
    value = value_of(node)
    with value.fake_mode:
        empty = value.new_empty(value.shape)
    return emit.call_with_value(
        empty, aten.empty.memory_format, list(value.shape), dtype=value.dtype, device=value.device, pin_memory=False
    )
