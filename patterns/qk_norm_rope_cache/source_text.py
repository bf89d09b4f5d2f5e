"""A match as the Python that a person would write: one function that calls the fused operation, and where it goes."""

from __future__ import annotations

import ast
import itertools
import linecache
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import frames, source_line
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.kernels.call import changed_defaults
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, scale_of
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads
from fx_fusion.patterns.qk_norm_rope_cache.lower import lower
from fx_fusion.patterns.qk_norm_rope_cache.match import Match, Stored
from fx_fusion.patterns.qk_norm_rope_cache.roles import node_roles

#: The parts of a layer that the call computes; what it reads stays where it is.
_REPLACED = ("split", "norm", "rope", "store")


@dataclass(frozen=True)
class Operand:
    """A parameter of the written function: `name`, the graph's value, and where the user has it from."""

    name: str
    node: Node
    words: str


@dataclass(frozen=True)
class Place:
    """Lines `first` to `last` of `function` in `file`; `lines` are those of them that a replaced node comes from."""

    file: str
    function: str
    first: int
    last: int
    lines: frozenset[int]


# --- the function ---------------------------------------------------------------------------------------------------


def operands(match: Match, labels: Mapping[Node, str]) -> list[Operand]:
    """What the function takes, in the order of its parameters."""
    named = {
        "q": match.query.data, "k": match.key.data, "v": match.value_store.data,
        "q_weight": match.query_heads.norm.weight, "k_weight": match.key_heads.norm.weight,
        **_angles(match), **_indices(match), **_scales(match),
        "k_cache": match.key_store.store.cache, "v_cache": match.value_store.store.cache,
    }  # fmt: skip
    merged: dict[Node, list[str]] = {}
    for name, node in named.items():
        if node is not None:
            merged.setdefault(node, []).append(name)
    return [Operand(_joined(names), node, _origin(node, labels)) for node, names in merged.items()]


def _angles(match: Match) -> dict[str, Node | None]:
    if match.lookup is None:
        return {"cos": match.rope.cos.leaf, "sin": match.rope.sin.leaf}
    return {"cos": match.lookup.cos.table, "sin": match.lookup.sin.table, "positions": match.lookup.positions}


def _indices(match: Match) -> dict[str, Node | None]:
    blocks = match.key_store.addresses.blocks
    return {"slots": match.slots.node, "blocks": blocks and blocks.node}


def _scales(match: Match) -> dict[str, Node | None]:
    scales = {"k_scale": match.key_store.scale, "v_scale": match.value_store.scale}
    return {name: scale for name, scale in scales.items() if isinstance(scale, Node)}


def _joined(names: Sequence[str]) -> str:
    """One name for one tensor that serves as several: qkv, cos_sin, kv_cache."""
    if len(names) == 1:
        return names[0]
    tails = {name.partition("_")[2] for name in names}
    heads = [name.partition("_")[0] for name in names]
    joined = "".join(heads) if all(len(head) == 1 for head in heads) else "_".join(heads)
    return f"{joined}_{tails.pop()}" if len(tails) == 1 and tails != {""} else joined


def _origin(node: Node, labels: Mapping[Node, str]) -> str:
    value: torch.Tensor = node.meta["val"]
    what = f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"
    if node in labels:
        return f"{labels[node]}, {what}"
    source = source_line(node)
    if source is None:
        return what
    file, _, line = source.rpartition(":")
    text = linecache.getline(file, int(line)).strip()
    return f"{what}, from {source}: {text}"


def unwritable(match: Match) -> str | None:
    """What the written function has no words for; None if it says all that the call says."""
    for stored in (match.key_store, match.value_store):
        addresses = stored.addresses
        if addresses.stored is not None and not addresses.stored.by_sign:
            return f"which tokens are stored is told by a mask, {addresses.stored.index}"
        for index in (addresses.slots, addresses.blocks):
            if index is not None and not index.per_token:
                return f"an index of each sequence, {index}, addresses the cache"
        if addresses.slot_group or addresses.lane_group:
            return "the cache lies in groups (the shuffle layout)"
        if stored.dtype != stored.store.cache.meta["val"].dtype:
            return f"the cache holds {stored.dtype} in a tensor of another dtype"
    return "the cache is filled by a slice, not by slots" if match.slots.node is None else None


def function(name: str, match: Match, labels: Mapping[Node, str], implementation: str) -> str:
    """The source of a function `name` that computes what the match does, with every argument that was read off.

    It takes what :func:`operands` lists, and the number of sequences if there is more than one; it returns the rotated
    queries (and keys, where they are used besides their store) in the shape that the replaced lines gave them.
    """
    given = operands(match, labels)
    names = {operand.node: operand.name for operand in given}
    per_batch = match.grid[0] != 1
    parameters = [operand.name for operand in given] + (["batch"] if per_batch else [])
    batch = "batch" if per_batch else "1"
    results = "rotated_q, rotated_k" if match.return_k else "rotated_q, _"
    returned = [_as_before("rotated_q", match.query.out, match.query_heads)]
    if match.return_k:
        returned.append(_as_before("rotated_k", match.key.out, match.key_heads))
    documented = [f"        {operand.name}: {operand.words}" for operand in given]
    if per_batch:
        documented.append(f"        batch: number of sequences ({match.grid[0]} as traced)")
    call = lower(match, SourceEmitter(names), (batch, "-1"))
    arguments = [*_tensor_arguments(match, names, call), *_options(call, implementation)]
    lines = [
        f"def {name}({', '.join(parameters)}):",
        '    """Split, RMSNorm, rotation and cache store in one call. The caches are written in place.',
        "",
        "    Args:",
        *documented,
        '    """',
        f"    {results} = fx_fusion.qk_norm_rope_cache(",
        *(f"        {argument}," for argument in arguments),
        "    )",
        f"    return {', '.join(returned)}",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Expression:
    """Source text of a value, and slices of it that are still to be written."""

    code: str
    picked: Mapping[int, str] = field(default_factory=dict[int, str])

    def __str__(self) -> str:
        if not self.picked:
            return self.code
        last = max(self.picked)
        return f"{self.code}[{', '.join(self.picked.get(dim, ':') for dim in range(last + 1))}]"


class SourceEmitter:
    """Writes each step as the PyTorch that a person would write. What it cannot write, :func:`unwritable` tells."""

    def __init__(self, names: Mapping[Node, str]) -> None:
        self._names = names

    def of(self, node: Node) -> _Expression:
        return _Expression(self._names.get(node, node.name))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> _Expression:
        source, *rest = args
        return _WRITTEN[target](source, *rest)

    def size(self, size: Any) -> Any:
        return size if isinstance(size, str) else _numbers([size])[0]

    def has_shape(self, value: _Expression, shape: Sequence[Any]) -> bool:
        """Of caches, which are written as they lie; what has tokens is always brought into its grid."""
        return not any(isinstance(size, str) for size in shape)


def _reshaped(source: _Expression, shape: Sequence[Any]) -> _Expression:
    sizes = [size if isinstance(size, str) else str(_numbers([size])[0]) for size in shape]
    return _Expression(f"{source}.reshape({', '.join(sizes)})")


def _sliced(source: _Expression, dim: int, start: int, stop: int, step: int) -> _Expression:
    words = f"{start or ''}:{stop}" + (f":{step}" if step != 1 else "")
    return replace(source, picked={**source.picked, dim: words})


def _as_real(source: _Expression) -> _Expression:
    return _Expression(f"torch.view_as_real({source})")


def _resolved(source: _Expression) -> _Expression:
    return _Expression(f"{source}.resolve_conj()")


_WRITTEN: Mapping[Any, Callable[..., _Expression]] = {
    aten.reshape.default: _reshaped,
    aten.slice.Tensor: _sliced,
    aten.view_as_real.default: _as_real,
    aten.resolve_conj.default: _resolved,
}


def _tensor_arguments(match: Match, names: Mapping[Node, str], call: Call[_Expression]) -> Iterator[str]:
    stored = {"k_cache": match.key_store, "v_cache": match.value_store}
    for name, expression in call.tensors.items():
        if name in stored:
            yield f"{name}={_cache(names[stored[name].store.cache], stored[name])}"
        elif name not in ("k_scale", "v_scale"):
            yield f"{name}={expression}"


def _cache(name: str, stored: Stored) -> str:
    """The cache as [blocks, slots, heads, lanes]: in words that people use if there are some, else by its strides."""
    value: torch.Tensor = stored.store.cache.meta["val"]
    addresses = stored.addresses
    size, stride, offset = (_numbers(each) for each in (addresses.size, addresses.stride, [addresses.offset]))
    like = torch.empty_strided(_numbers(value.shape), _numbers(value.stride()), dtype=value.dtype, device="meta")
    for words, view in _familiar(like):
        strides = zip(size, stride, view.stride(), strict=True)
        if list(view.shape) == size and offset == [0] and all(a == b for length, a, b in strides if length > 1):
            return name + words
    start = f", {name}.storage_offset() + {offset[0]}" if offset[0] else ""
    return f"{name}.as_strided({tuple(size)}, {tuple(stride)}{start})"


_FAMILIAR_ORDERS: dict[tuple[int, ...], str] = {(0, 1, 2, 3): "", (0, 2, 1, 3): ".transpose(1, 2)"}


def _familiar(cache: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if cache.dim() == 3:
        for order in itertools.permutations(range(3)):
            words = "" if order == (0, 1, 2) else f".permute{order}"
            yield f"{words}.unsqueeze(0)", cache.permute(order).unsqueeze(0)
    if cache.dim() == 4:
        for order in itertools.permutations(range(4)):
            yield _FAMILIAR_ORDERS.get(order, f".permute{order}"), cache.permute(order)


def _numbers(sizes: Iterable[Any]) -> list[int]:
    """As traced, where a size is symbolic."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in sizes]


def _options(call: Call[_Expression], implementation: str) -> Iterator[str]:
    told = call.options
    for name in ("q_eps", "k_eps", "gemma_norm", "rotary_dim", "is_neox"):
        yield f"{name}={getattr(told, name)!r}"
    yield f"axes={written_axes(told.axes)}"
    scales = {
        "k_scale": scale_of(call.k_scale, told.k_scale_value),
        "v_scale": scale_of(call.v_scale, told.v_scale_value),
    }
    yield from (f"{name}={scale}" for name, scale in scales.items() if scale is not None)
    yield from (f"{name}=True" for name in ("saturate", "skip_negative_slots") if getattr(told, name))
    yield from (f"{name}={value!r}" for name, (_, value) in changed_defaults(told).items())
    yield f"return_k={told.return_k}"
    yield f'implementation="{implementation}"'


def written_axes(axes: Sequence[int]) -> str:
    """The axis of each pair, as short as it can be read."""
    runs = [f"[{axis}] * {len(list(group))}" for axis, group in itertools.groupby(axes)]
    if len(runs) <= 3:
        return " + ".join(runs)
    turns = next((n for n in range(len(axes) // 3, 1, -1) if list(axes[: 3 * n]) == [0, 1, 2] * n), 0)
    rest = [f"[{axis}] * {len(list(group))}" for axis, group in itertools.groupby(axes[3 * turns :])]
    return " + ".join([f"[0, 1, 2] * {turns}", *rest]) if turns and len(rest) <= 3 else str(list(axes))


def _as_before(name: str, old: Node, layout: RotatedHeads) -> str:
    if layout.heads_first:
        name = f"{name}.transpose(1, 2)"
    if len(layout.token_dims) == 2:
        return name
    shape = _numbers(old.meta["val"].shape)
    return f"{name}.reshape(-1, {', '.join(map(str, shape[1:]))})"


# --- where it goes --------------------------------------------------------------------------------------------------


def place(analysis: GraphAnalysis, match: Match) -> Place | None:
    """The innermost function of the user's that all replaced nodes come from, and its lines; None if none is known."""
    replaced = [node for node, part in node_roles(analysis, match).items() if part.role in _REPLACED]
    stacks = [stack for node in replaced if (stack := frames(node))]
    if not stacks:
        return None
    depth = 0
    while all(len(stack) > depth + 1 for stack in stacks) and len({stack[depth] for stack in stacks}) == 1:
        depth += 1
    if len({(stack[depth].file, stack[depth].function) for stack in stacks}) > 1:
        depth = max(0, depth - 1)
    file, function_name = stacks[0][depth].file, stacks[0][depth].function
    touched = frozenset(stack[depth].line for stack in stacks)
    first, last = _statements("".join(linecache.getlines(file)), touched)
    return Place(file, function_name, first, last, touched)


def _statements(source: str, lines: frozenset[int]) -> tuple[int, int]:
    """The lines of the statements that hold `lines`."""
    first, last = min(lines), max(lines)
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return first, last
    simple = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and node.end_lineno is not None
    ]
    for node in simple:
        if any(node.lineno <= line <= int(node.end_lineno or line) for line in lines):
            first, last = min(first, node.lineno), max(last, int(node.end_lineno or last))
    return first, last


def quoted(where: Place) -> str:
    """The lines as comments; those that the call makes superfluous, wholly or in part, begin with a minus."""
    rows = [f"# {where.file}, {where.function}, lines {where.first}-{where.last}:"]
    for number in range(where.first, where.last + 1):
        sign = "-" if number in where.lines else " "
        rows.append(f"# {sign} {number:>5}  {linecache.getline(where.file, number).rstrip()}".rstrip())
    return "\n".join(rows)


def identifier(words: str) -> str:
    """`words` as a part of a Python name."""
    return re.sub(r"\W+", "_", words).strip("_") or "layer"
