"""Calls of the operation that stand in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph

from fx_fusion.graph.custom_calls import FusedCall
from fx_fusion.graph.torch_compat import auto_functionalized_v2
from fx_fusion.kernels.call import tensor_names
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION


def fused_calls(graph: Graph) -> Iterator[FusedCall]:
    """Every call of the operation in `graph`, whatever its kernel; a launch that Inductor makes itself is none."""
    names = [name for name in tensor_names(OPERATION.call_type) if name not in OPERATION.written]
    for node in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
        if node.args[0] is not OPERATION.overload:
            continue
        given = dict(node.kwargs)
        bases: Any = given.pop("_all_bases")
        k_cache, v_cache = (bases[given.pop(f"_{name}_base_index")] for name in OPERATION.written)
        tensors: Any = {name: given.pop(name, None) for name in names}
        held = {user.args[1]: user for user in node.users}
        yield FusedCall(node, tensors, given, k_cache, v_cache, held.get(0), held.get(1))
