"""The static walk that makes sampling a proof.

Two functions that agree on random points are equal if both are analytic: then their difference, being analytic, is
zero everywhere or almost nowhere. So before anything is sampled, every step on the data path must be analytic, and
every dtype on it must round no more coarsely, and compute no more finely, than the fused kernel does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations as opset
from fx_fusion.graph.paths import Branch

#: What :func:`certify` declines with.
CODES = ("proof.not_analytic", "proof.rounding", "rope.output_dtype")


def certify(branch: Branch) -> None:
    """Raise Decline unless sampling proves what `branch` computes.

    Raises:
        Decline: ``proof.not_analytic``, ``proof.rounding`` or ``rope.output_dtype``, naming the step.
    """
    data_dtype: torch.dtype = branch.data.meta["val"].dtype
    for node in branch.nodes:
        if not opset.is_analytic(node):
            raise Decline(
                "proof.not_analytic",
                f"{node} ({node.target}) is not known to be analytic: samples cannot prove it",
                [node],
            )
        if node.target in opset.ROOTS:
            _certify_root(node)
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
        if opset.is_movement(node):
            continue
        if node not in conversion:
            raise Decline("split.v_not_copied", f"{node} ({node.target}) changes a value that should be copied", [node])
        dtype: torch.dtype = node.meta["val"].dtype
        if dtype != final and dtype.is_floating_point and not opset.holds(dtype, source):
            found = f"{node} rounds to {dtype} on the way from {source} to {final}"
            raise Decline("proof.rounding", found, [node])


def _certify_dtype(node: Node, data_dtype: torch.dtype) -> None:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return
    if not (value.is_floating_point() or value.is_complex()):
        raise Decline("proof.not_analytic", f"{node} turns data into {value.dtype}", [node])
    dtype = value.dtype.to_real()
    if not opset.holds(dtype, data_dtype):
        found = f"{node} is {value.dtype}, coarser than the projection's {data_dtype}"
        raise Decline("proof.rounding", found, [node])
    if dtype == torch.float64 and data_dtype != torch.float64:
        raise Decline("proof.rounding", f"{node} computes in float64, the fused kernel in float32", [node])


def _certify_root(node: Node) -> None:
    """A root (or a power that is one) is analytic only while its argument is positive.

    Under RMSNorm that is a sum over the lanes plus eps. Without the sum, ``sqrt(x * x)`` is ``|x|`` and can spell a
    clamp that random data never reaches.
    """
    if not opset.takes_root(node):
        return
    argument = node.args[0]
    while isinstance(argument, Node) and argument.target not in opset.REDUCTIONS:
        if not (_is_shift_or_scale(argument) or opset.is_movement(argument) or opset.is_cast(argument)):
            break
        argument = argument.args[0]
    if not isinstance(argument, Node) or argument.target not in opset.REDUCTIONS or _reduced(argument) < 2:
        found = f"{node} takes a root of something that is not a sum over lanes plus a constant"
        raise Decline("proof.not_analytic", found, [node])


def _is_shift_or_scale(node: Node) -> bool:
    return node.target in opset.AFFINE and isinstance(node.args[0], Node) and not isinstance(node.args[1], Node)


def _reduced(node: Node) -> int:
    """How many elements each sum of the reduction takes."""
    before: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    given: Any = node.args[1] if len(node.args) > 1 else None
    dims: list[int] = given or list(range(before.dim()))
    sizes = [before.shape[dim] for dim in dims] if before.dim() else []
    return torch.Size(size for size in sizes if isinstance(size, int)).numel() if sizes else 1
