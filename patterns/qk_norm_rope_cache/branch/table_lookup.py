"""Rows of angles traced back to a table and positions, through movement and indexing only; exact, nothing sampled.

A lookup takes rows of a table at positions. Between the lookup and the angles, and between the positions and the
lookup, only movement is looked through: each element is followed by a number that no literal has. The table is what the
lookup indexes, or what that is a view of if the view keeps every row, so that a position means the same row of both
however it is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten, node_of
from fx_fusion.graph.paths import is_one_of_several
from fx_fusion.graph.sizes import Sizes, same
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Lanes, Rope, constant_step
from fx_fusion.proof.all_sizes import check_all_sizes
from fx_fusion.proof.evaluate import Arithmetic, evaluate
from fx_fusion.proof.index_maps import FIRST, numbered

#: What a lookup may be told rows with. In PyTorch a tensor of bytes or of truth values is no index but a mask.
_INDICES = (torch.int64, torch.int32)


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


@dataclass(frozen=True)
class _Taken:
    """`node` takes from dimension `dim` of `source` at `index`; ``columns``, of the source's shape but for that
    dimension, says which column of `table` each element is.
    """

    node: Node
    source: Node
    dim: int
    index: Node
    table: Node
    columns: torch.Tensor

    @property
    def further(self) -> int:
        """How many dimensions further on the index's own lie in the result."""
        return 0 if self.node.target is aten.gather.default else self.dim


_Trace = tuple[Columns, Node, int, bool, tuple[int, ...]]


def _trace(
    analysis: GraphAnalysis, lanes: Lanes, rotary_dim: int, is_neox: bool, sizes: Sizes, grid: tuple[int, int]
) -> _Trace | None:
    taken = _lookups(analysis, lanes.leaf, sizes)
    if len({each.table for each in taken}) != 1:
        return None
    for positions in _positions(analysis, [each.index for each in taken]):
        elements = _elements(analysis, lanes, taken, positions, sizes, grid)
        found = elements and _read(lanes, taken[0].table, positions, *elements, rotary_dim, is_neox, sizes, grid)
        if found:
            return found
    return None


def _read(
    lanes: Lanes,
    table: Node,
    positions: Node,
    row: torch.Tensor,
    column: torch.Tensor,
    rotary_dim: int,
    is_neox: bool,
    sizes: Sizes,
    grid: tuple[int, int],
) -> _Trace | None:
    """`row` and `column` [tokens, lanes] as a lookup; None if they are none."""
    step = constant_step(column[0])
    if step is None or not bool((column == column[0]).all()):
        return None
    for per_batch in (False, True) if grid[0] > 1 else (True,):
        found = _axes(row, sizes.shape(positions.meta["val"]), grid, per_batch)
        if found is None:
            continue
        num_axes, axes = found
        if num_axes > 1 and not isinstance(positions.meta["val"].shape[0], int):
            return None  # how many axes there are is known for these sizes only
        pairs = _pair_axes(axes, lanes.count, rotary_dim, is_neox)
        columns = Columns(table, int(column[0, 0]), step, lanes.count)
        return (columns, positions, num_axes, per_batch, pairs) if pairs else None
    return None


# --- where a lookup takes what from -----------------------------------------------------------------------------------


def _lookups(analysis: GraphAnalysis, leaf: Node, sizes: Sizes) -> list[_Taken]:
    """The lookups that `leaf` is moved from; none at all where anything else takes part."""
    found: dict[Node, _Taken] = {}
    seen: set[Node] = set()
    stack = [leaf]
    while stack:
        node = stack.pop()
        if node in seen or operations.is_symbolic(node) or operations.is_literal(node):
            continue
        seen.add(node)
        source = _indexed(node)
        if source is not None:
            taken = _taken(analysis, node, *source, sizes)
            if taken is None:
                return []
            found[node] = taken
        elif _is_looked_through(node):
            stack.extend(node.all_input_nodes)
        else:
            return []
    return list(found.values())


def _is_looked_through(node: Node) -> bool:
    """Does `node` hold what its inputs do, moved, joined, or chosen from?"""
    moves = operations.is_movement(node) and not is_one_of_several(node)
    return moves or operations.is_join(node) or operations.is_selection(node)


def _indexed(node: Node) -> tuple[Node, int, Node] | None:
    """What `node` looks up, in which dimension, and where; None where it takes nothing at indices that are computed."""
    if node.op != "call_function" or node.target not in operations.SELECTION or node.target is aten.where.self:
        return None
    source: Node = node_of(node.args[0])
    given: list[Any] = list(node.args[1:])
    if node.target is aten.embedding.default:
        dim, index = 0, given[0]
    elif node.target is aten.index.Tensor:
        indices: Any = given[0]
        places = [place for place, each in enumerate(indices) if each is not None]
        dim, index = places[0], indices[places[0]] if len(places) == 1 else None
    else:
        dim, index = given[0] % source.meta["val"].dim(), given[1]
    if not isinstance(index, Node) or operations.is_literal(index) or operations.is_literal(source):
        return None
    return source, dim, index


def _taken(analysis: GraphAnalysis, node: Node, source: Node, dim: int, index: Node, sizes: Sizes) -> _Taken | None:
    """The lookup with its table: the earliest value of which `source` is a view with all the rows, counted by `dim`."""
    if index.meta["val"].dtype not in _INDICES:
        return None
    chain = [source]
    while _is_view(chain[-1]):
        chain.append(node_of(chain[-1].args[0]))
    for table in reversed(chain):
        steps = chain[: chain.index(table)][::-1]
        columns = _columns_of(table, steps, source, dim, sizes)
        if columns is not None:
            return _Taken(node, source, dim, index, analysis.canonical(table), columns)
    return None


def _is_view(node: Node) -> bool:
    """Does `node` hold what its input does, elsewhere in memory perhaps, or a part of it?"""
    moves = operations.is_movement(node) and (node.target in operations.VIEW or node.target is aten.clone.default)
    return moves and not is_one_of_several(node)


def _columns_of(table: Node, steps: Sequence[Node], source: Node, dim: int, sizes: Sizes) -> torch.Tensor | None:
    """For each element of a row of `source`, its column of `table`; None unless row r of one is row r of the other,
    and both have as many.

    The steps are taken on strides alone: a step from row to row is `width` elements, and one within a row less.
    """
    if table.meta["val"].dim() != 2 or not same([table.meta["val"].shape[0]], [source.meta["val"].shape[dim]]):
        return None
    rows, width = sizes.shape(table.meta["val"])
    view = torch.empty_strided((rows, width), (width, 1), device="meta")
    try:
        for step in steps:
            view = _viewed(view, step, sizes)
    except (RuntimeError, ValueError):  # a reshape that no strides describe
        return None
    shape, strides = list(view.shape), list(view.stride())
    del shape[dim], strides[dim]
    last = view.storage_offset() + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if view.shape[dim] != rows or (rows > 1 and view.stride(dim) != width) or last >= width:
        return None
    return torch.arange(width).as_strided(shape, strides, view.storage_offset()).unsqueeze(dim)


def _viewed(view: Any, step: Node, sizes: Sizes) -> Any:
    if step.target is aten.clone.default:
        return view

    def concrete(argument: Any) -> Any:
        return sizes.value(argument) if isinstance(argument, Node) else argument

    target: Any = aten.view.default if step.target in operations.RESHAPE else step.target
    args, kwargs = map_aggregate((step.args[1:], step.kwargs), concrete)
    return target(view, *args, **kwargs)


# --- which position each row is at ------------------------------------------------------------------------------------


def _positions(analysis: GraphAnalysis, indices: Sequence[Node]) -> Iterator[Node]:
    """What may hold the positions: the one value that all `indices` are made of, or the indices themselves."""
    leaves = {analysis.canonical(leaf) for index in indices for leaf in _made_of(index)}
    if len(leaves) == 1 and next(iter(leaves)).meta["val"].dtype in _INDICES:
        yield from leaves
    whole = {analysis.canonical(index) for index in indices}
    if len(whole) == 1:
        yield from whole - leaves


def _made_of(node: Node) -> list[Node]:
    """What `node` is made of by movement, joins and literal selections; constants do not count."""
    leaves: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen or operations.is_symbolic(top) or operations.is_literal(top):
            continue
        seen.add(top)
        if _is_looked_through(top):
            stack.extend(top.all_input_nodes)
        else:
            leaves.append(top)
    return leaves


def _elements(
    analysis: GraphAnalysis, lanes: Lanes, taken: Sequence[_Taken], positions: Node, sizes: Sizes, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For each token and lane: which element of `positions` chose its row, and which column it takes; None where that
    is not all that they are made of.

    The columns of a complex table are counted in real numbers.
    """
    count = torch.Size(sizes.shape(positions.meta["val"])).numel()
    rows: dict[Node, torch.Tensor] = {}
    columns: dict[Node, torch.Tensor] = {}
    ends: dict[Node, None] = {}
    for each in taken:
        given = _everywhere(analysis, each.index, positions, numbered(positions, sizes))
        ends.update(dict.fromkeys(given))
        (chosen,) = evaluate([each.index], given, sizes, Arithmetic.MOVE)
        if not _within(chosen, count):
            return None
        shape = [*sizes.shape(each.source.meta["val"])]
        shape[each.dim] = count
        row = numbers_along(each.dim, shape)
        for found, table in ((rows, row), (columns, FIRST + each.columns.expand(shape))):
            (found[each.node],) = evaluate(
                [each.node], {each.source: table, each.index: chosen - FIRST}, sizes, Arithmetic.MOVE
            )
    check_all_sizes(ends, [lanes.leaf], {each.node: (each.index, each.further) for each in taken})
    moved = [evaluate([lanes.leaf], given, sizes, Arithmetic.MOVE)[0] for given in (rows, columns)]
    width = max(each.columns.max() for each in taken) + 1
    if not _within(moved[0], count) or not _within(moved[1], int(width)):
        return None
    row, column = (each - FIRST for each in moved)
    if operations.is_complex_tensor(lanes.leaf):
        row, column = torch.stack([row, row], -1), torch.stack([2 * column, 2 * column + 1], -1)
    row, column = (lanes.take(each.reshape(-1, lanes.width)) for each in (row, column))
    repeats = grid[0] * grid[1] // row.shape[0]
    return row.repeat(repeats, 1), column.repeat(repeats, 1)


def numbers_along(dim: int, shape: Sequence[int]) -> torch.Tensor:
    """Of `shape`: the place of each element along `dim`, counted from far out."""
    return (FIRST + torch.arange(shape[dim])).reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _within(numbers: torch.Tensor, count: int) -> bool:
    """Are all of `numbers` numbers of elements, and no literals?"""
    return numbers.dtype == torch.int64 and bool(((numbers >= FIRST) & (numbers < FIRST + count)).all())


def _everywhere(analysis: GraphAnalysis, out: Node, node: Node, value: torch.Tensor) -> dict[Node, torch.Tensor]:
    """`value` for all nodes above `out` that hold what `node` does (there is no CSE in inference)."""
    number = analysis.value_number(node)
    inputs: dict[Node, torch.Tensor] = {}
    seen: set[Node] = set()
    stack = [out]
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if analysis.value_number(top) == number:
            inputs[top] = value
        else:
            stack.extend(top.all_input_nodes)
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
