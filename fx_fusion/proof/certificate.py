"""The static walk over dtypes: where does a region round, and as what does it compute?

What a region computes is proved apart from rounding. So on the data path every dtype must round no more coarsely, and
compute no more finely, than the fused kernel does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.paths import Branch

#: What :func:`certify` declines with.
CODES = ("proof.not_analytic", "proof.rounding", "rope.output_dtype")


def certify(branch: Branch) -> None:
    """Raise Decline unless `branch` rounds as the fused kernel may.

    Raises:
        Decline: ``proof.not_analytic``, ``proof.rounding`` or ``rope.output_dtype``, naming the step.
    """
    data_dtype: torch.dtype = branch.data.meta["val"].dtype
    for node in branch.nodes:
        _certify_dtype(node, data_dtype)
    out_dtype = branch.out.meta["val"].dtype
    if out_dtype != data_dtype:
        found = f"{branch.out} is {out_dtype}, its projection {data_dtype}"
        raise Decline("rope.output_dtype", found, [branch.out])


def certify_copy(nodes: Iterable[Node], conversion: Collection[Node], source: torch.dtype, final: torch.dtype) -> None:
    """Raise Decline unless `nodes` only move values, but for the steps of their `conversion`, which may round coarser
    than `source` only for good: to `final`.
    """
    for node in nodes:
        if operations.is_movement(node):
            continue
        if node not in conversion:
            raise Decline("split.v_not_copied", f"{node} ({node.target}) changes a value that should be copied", [node])
        dtype: torch.dtype = node.meta["val"].dtype
        if dtype != final and dtype.is_floating_point and not operations.holds(dtype, source):
            found = f"{node} rounds to {dtype} on the way from {source} to {final}"
            raise Decline("proof.rounding", found, [node])


def _certify_dtype(node: Node, data_dtype: torch.dtype) -> None:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return
    if not (value.is_floating_point() or value.is_complex()):
        raise Decline("proof.not_analytic", f"{node} turns data into {value.dtype}", [node])
    dtype = value.dtype.to_real()
    if not operations.holds(dtype, data_dtype):
        found = f"{node} is {value.dtype}, coarser than the projection's {data_dtype}"
        raise Decline("proof.rounding", found, [node])
    if dtype == torch.float64 and data_dtype != torch.float64:
        raise Decline("proof.rounding", f"{node} computes in float64, the fused kernel in float32", [node])
