"""Which element of a tensor of integers arrives where: followed through movement, exactly, never by the values.

Indices are positions, slots or rows because they are moved from what holds them, each of them once and in order. That
they look like ``0, 1, 2`` at some sizes says nothing. So elements are numbered from far out, where no literal of the
graph is, and an integer function of indices (a clamp, a sort, a table of literals) is not looked through.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.operations import node_of, prims
from fx_fusion.graph.paths import is_one_of_several
from fx_fusion.graph.sizes import Sizes, same
from fx_fusion.proof.all_sizes import check_all_sizes
from fx_fusion.proof.evaluate import Arithmetic, evaluate

#: Elements are numbered from here on.
FIRST = 1 << 40


def numbered(node: Node, sizes: Sizes) -> torch.Tensor:
    """The elements of `node` at `sizes`, each its own number."""
    shape = sizes.shape(node.meta["val"])
    return (FIRST + torch.arange(torch.Size(shape).numel())).reshape(shape)


def moved_from(node: Node, sizes: Sizes) -> tuple[Node, torch.Tensor]:
    """The earliest value that `node` is moved from and all of whose elements arrive; and for each element of `node`,
    which one of it that is.

    Raises:
        Decline: ``region.sizes`` where a symbol does more than count on the way.
    """
    chain = [node]
    while operations.is_movement(chain[-1]) and not is_one_of_several(chain[-1]):
        chain.append(node_of(chain[-1].args[0]))
    for source in reversed(chain):
        arrived = evaluate([node], {source: numbered(source, sizes)}, sizes, Arithmetic.MOVE)[0] - FIRST
        if arrived.unique().numel() == torch.Size(sizes.shape(source.meta["val"])).numel():
            check_all_sizes([source], [node])
            return source, arrived
    raise AssertionError(f"{node} is not moved from itself")


def counts(node: Node, sizes: Sizes) -> bool:
    """Does `node` hold 0, 1, 2, … in this order, however many there are?"""
    try:
        source, arrived = moved_from(node, sizes)
    except Decline:
        return False
    given = {"start": 0, "step": 1, **source.kwargs}
    return (
        source.target is prims.iota.default
        and (given["start"], given["step"]) == (0, 1)
        and same([source.meta["val"].numel()], [node.meta["val"].numel()])
        and bool((arrived.reshape(-1) == torch.arange(arrived.numel())).all())
    )
