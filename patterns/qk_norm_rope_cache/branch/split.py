"""Split: which columns of the projection's output does a branch read, as heads at a constant distance?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.proof.evaluate import Arithmetic, evaluate
from fx_fusion.proof.region_function import Probe


@dataclass(frozen=True)
class Heads:
    """Head h, lane l of a token is column ``offset + h * stride + l`` of the `width` that the data has of it."""

    num_heads: int
    head_dim: int
    offset: int
    stride: int
    width: int


def element_numbers(probe: Probe) -> torch.Tensor:
    """[tokens, columns], each element its own number."""
    return torch.arange(probe.tokens * probe.columns).reshape(probe.tokens, probe.columns)


def read_columns(probe: Probe) -> torch.Tensor:
    """The columns that `probe`'s branch computes with, sorted; each token must read the same ones.

    Exact: element numbers are run through the movement that stands before the first computation.
    """
    if torch.Size(probe.data_shape).numel() % probe.tokens:
        found = f"{probe.branch.data} of shape {list(probe.data_shape)} does not hold {probe.tokens} tokens"
        raise Decline("split.layout", found, [probe.branch.data])
    images = _images(probe)
    values = evaluate(
        images, {probe.branch.data: element_numbers(probe).reshape(probe.data_shape)}, probe.sizes, Arithmetic.MOVE
    )
    used = torch.zeros(probe.tokens * probe.columns, dtype=torch.bool)
    for value in values:
        used[value.reshape(-1)] = True
    used = used.reshape(probe.tokens, probe.columns)
    if not bool((used == used[0]).all()):
        other = int((used != used[0]).any(1).int().argmax())
        first, second = (_summary(used[token].nonzero()[:, 0]) for token in (0, other))
        found = f"token 0 reads {first} of the projection, token {other} {second}; expected the same of each token"
        raise Decline("split.columns", found, [probe.branch.data])
    return used[0].nonzero()[:, 0]


def _images(probe: Probe) -> list[Node]:
    """The last values that still are the data, merely moved: where computation takes over."""
    inside = set(probe.branch.nodes)
    moved = {probe.branch.data}
    images: dict[Node, None] = {}
    for node in (probe.branch.data, *probe.branch.nodes):
        if node is not probe.branch.data:
            if not (
                _moves(node)
                and moved.issuperset(p for p in node.all_input_nodes if p in inside or p is probe.branch.data)
            ):
                continue
            moved.add(node)
        if any(user in inside and not _moves(user) for user in node.users) or node is probe.branch.out:
            images[node] = None
    return [node for node in images if operations.is_float_tensor(node)]


def _moves(node: Node) -> bool:
    return operations.is_movement(node) or operations.is_cast(node)


def read_heads(columns: torch.Tensor, head_dim: int, width: int, data: Node) -> Heads:
    """`columns` (sorted) as heads of `head_dim` consecutive columns at a constant distance."""
    if len(columns) % head_dim:
        raise Decline(
            "split.heads", f"{len(columns)} columns are read, which is no multiple of head_dim {head_dim}", [data]
        )
    grid = columns.reshape(-1, head_dim)
    starts = grid[:, 0]
    stride = int(starts[1] - starts[0]) if len(starts) > 1 else head_dim
    heads = Heads(len(starts), head_dim, int(starts[0]), stride, width)
    if not bool((grid == expected_columns(heads)).all()):
        found = f"the {_summary(columns)} are not heads of {head_dim} consecutive columns at a constant distance"
        raise Decline("split.columns", found, [data])
    return heads


def expected_columns(heads: Heads) -> torch.Tensor:
    """[num_heads, head_dim]: the column of each lane."""
    return heads.offset + torch.arange(heads.num_heads)[:, None] * heads.stride + torch.arange(heads.head_dim)


def take_heads(data: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[tokens, num_heads, head_dim] from [tokens, columns]."""
    return data[:, expected_columns(heads)]


def _summary(columns: torch.Tensor) -> str:
    return f"columns {int(columns[0])}..{int(columns[-1])} ({len(columns)} of them)" if len(columns) else "no column"
