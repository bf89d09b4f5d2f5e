"""Rows of angles traced back to a table and positions, through movement and indexing only; exact, nothing sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.sizes import Sizes
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Lanes, Rope, constant_step
from fx_fusion.proof.evaluate import Arithmetic, evaluate

#: Rows and columns are numbered from here on, so that no literal of the graph looks like one.
_FIRST = 1 << 40


@dataclass(frozen=True)
class Columns:
    """Lane or pair i takes column ``offset + i * step`` of `table` [P, width], a graph value.

    A complex table [P, width / 2] counts as the reals that it holds.
    """

    table: Node
    offset: int
    step: int
    count: int


@dataclass(frozen=True)
class Lookup:
    """cos and sin are columns of tables, at row ``positions[axes[pair], token]``."""

    cos: Columns
    sin: Columns
    positions: Node
    num_axes: int
    per_batch: bool
    axes: tuple[int, ...]


def trace_lookup(analysis: GraphAnalysis, rope: Rope, sizes: Sizes, grid: tuple[int, int]) -> Lookup | None:
    """The lookup behind the rows of `rope`; None where anything but a lookup made them: the rows stay operands."""
    try:
        cos = _trace(analysis, rope.cos, rope.rotary_dim, rope.is_neox, sizes, grid)
        sin = _trace(analysis, rope.sin, rope.rotary_dim, rope.is_neox, sizes, grid)
    except Decline:
        return None
    if cos is None or sin is None or cos[1:] != sin[1:]:
        return None
    positions, num_axes, per_batch, axes = cos[1:]
    return Lookup(cos[0], sin[0], positions, num_axes, per_batch, axes)


_Trace = tuple[Columns, Node, int, bool, tuple[int, ...]]


def _trace(
    analysis: GraphAnalysis, lanes: Lanes, rotary_dim: int, is_neox: bool, sizes: Sizes, grid: tuple[int, int]
) -> _Trace | None:
    leaves = _leaves(analysis, lanes.leaf)
    tables = [leaf for leaf in leaves if operations.is_float_tensor(leaf) or operations.is_complex_tensor(leaf)]
    indices = [leaf for leaf in leaves if operations.is_int_tensor(leaf)]
    if len(tables) != 1 or len(indices) != 1 or len(leaves) != 2 or tables[0].meta["val"].dim() != 2:
        return None
    table, positions = tables[0], indices[0]
    row, column = _elements(analysis, lanes, table, positions, sizes, grid)
    if not bool((column == column[0]).all()):
        return None
    step = constant_step(column[0])
    if step is None:
        return None
    for per_batch in (False, True) if grid[0] > 1 else (True,):
        found = _axes(row, sizes.shape(positions.meta["val"]), grid, per_batch)
        if found is not None:
            num_axes, axes = found
            if num_axes > 1 and not isinstance(positions.meta["val"].shape[0], int):
                return None  # how many axes there are is known for these sizes only
            pairs = _pair_axes(axes, lanes.count, rotary_dim, is_neox)
            return (
                (Columns(table, int(column[0, 0]), step, lanes.count), positions, num_axes, per_batch, pairs)
                if pairs
                else None
            )
    return None


def _leaves(analysis: GraphAnalysis, node: Node) -> list[Node]:
    """What `node` is made from by movement and lookups alone; equal values count once, constants not at all."""
    leaves: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen or operations.is_symbolic(top):
            continue
        seen.add(top)
        if operations.is_movement(top) or operations.is_join(top) or operations.is_selection(top):
            stack.extend(top.all_input_nodes)
        elif not operations.is_literal(top):
            leaves[analysis.canonical(top)] = None
    return list(leaves)


def _elements(
    analysis: GraphAnalysis, lanes: Lanes, table: Node, positions: Node, sizes: Sizes, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token and lane: which element of `positions` chose its row, and which column it takes.

    The columns of a complex table are counted in real numbers.
    """
    shape = sizes.shape(positions.meta["val"])
    count = torch.Size(shape).numel()
    rows, width = sizes.shape(table.meta["val"])
    rows = max(rows, count)
    chosen = torch.arange(count).reshape(shape)
    row_numbers = (_FIRST + torch.arange(rows)).unsqueeze(1).expand(rows, width)
    column_numbers = (_FIRST + torch.arange(width)).expand(rows, width)
    results: list[torch.Tensor] = []
    for numbers in (row_numbers, column_numbers):
        given = {table: numbers, positions: chosen.to(positions.meta["val"].dtype)}
        inputs = _everywhere(analysis, lanes.leaf, given)
        moved = evaluate([lanes.leaf], inputs, sizes, Arithmetic.MOVE)[0]
        if moved.dtype != torch.int64:
            raise Decline("rope.rows", f"{lanes.leaf} is not made of the table's elements alone", [lanes.leaf])
        results.append(moved - _FIRST)
    if operations.is_complex_tensor(lanes.leaf):
        row, column = results
        results = [torch.stack([row, row], -1), torch.stack([2 * column, 2 * column + 1], -1)]
    chosen_rows, columns = (lanes.take(each.reshape(-1, lanes.width)) for each in results)
    repeats = grid[0] * grid[1] // columns.shape[0]
    return chosen_rows.repeat(repeats, 1), columns.repeat(repeats, 1)


def _everywhere(analysis: GraphAnalysis, out: Node, values: dict[Node, torch.Tensor]) -> dict[Node, torch.Tensor]:
    """`values`, also for the other nodes above `out` that hold the same value (there is no CSE in inference)."""
    by_number = {analysis.value_number(node): value for node, value in values.items()}
    inputs: dict[Node, torch.Tensor] = {}
    stack = [out]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if analysis.value_number(node) in by_number:
            inputs[node] = by_number[analysis.value_number(node)]
        else:
            stack.extend(node.all_input_nodes)
    return inputs


def _axes(
    row: torch.Tensor, shape: Iterable[int], grid: tuple[int, int], per_batch: bool
) -> tuple[int, list[int]] | None:
    tokens = grid[0] * grid[1]
    per_axis = tokens if per_batch else grid[1]
    count = torch.Size(shape).numel()
    if count % per_axis:
        return None
    expected = torch.arange(tokens) if per_batch else torch.arange(grid[1]).repeat(grid[0])
    axis = (row - expected[:, None]).div(per_axis, rounding_mode="floor")
    if not bool((row == axis * per_axis + expected[:, None]).all()) or not bool((axis == axis[0]).all()):
        return None
    return count // per_axis, axis[0].tolist()


def _pair_axes(axes: list[int], count: int, rotary_dim: int, is_neox: bool) -> tuple[int, ...]:
    """Axes by pair; () if the two lanes of a pair take theirs from different axes."""
    half = rotary_dim // 2
    if count == half:
        return tuple(axes)
    first, second = (axes[:half], axes[half:]) if is_neox else (axes[0::2], axes[1::2])
    return tuple(first) if first == second else ()
