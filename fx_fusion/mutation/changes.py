"""What is changed in a graph to make a mutant of it: one constant, operand, operation or edge."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.decline import first_source_line
from fx_fusion.graph import operations
from fx_fusion.graph.torch_compat import pytree
from fx_fusion.mutation.region import is_store, region, tensor_of

aten = torch.ops.aten
prims = torch.ops.prims


def propose(graph: Graph, chance: random.Random, where: Callable[[Node], bool]) -> str | None:
    """Change one thing of the region, and tell what; None if the choice does not apply to the node chosen."""
    stores = [node for node in graph.nodes if is_store(node)]
    nodes = [node for node in (*region(graph)[0], *stores) if where(node)]
    steps = [node for node in nodes if not operations.is_movement(node)]
    # Most nodes of a region only move values: half of the changes go to the others.
    node = chance.choice(steps if steps and chance.random() < 0.5 else nodes)
    change = (_insert if is_store(node) else chance.choice(_CHANGES))(graph, node, chance)
    if change is None:
        return None
    line = first_source_line([node]) or "?"
    return f"{node} ({node.target}) at {line.rsplit('/', 1)[-1]}: {change}"


def _mark(*nodes: Node) -> None:
    for node in nodes:
        node.meta["mutated"] = True


def _constant(graph: Graph, node: Node, chance: random.Random) -> str | None:
    leaves, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    places = [i for i, leaf in enumerate(leaves) if type(leaf) in (int, float, bool)]
    if not places:
        return None
    place = chance.choice(places)
    old = leaves[place]
    new = chance.choice(_alternatives(old, graph))
    if new is old or (type(new) is type(old) and new == old):
        return None
    leaves[place] = new
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    node.args, node.kwargs = tuple(args), kwargs
    _mark(node)
    return f"literal {place}: {old} becomes {new}"


def _alternatives(old: Any, graph: Graph) -> list[Any]:
    if isinstance(old, bool):
        return [not old]
    literals = [
        leaf
        for node in region(graph)[0]
        for leaf in pytree.tree_leaves((node.args, node.kwargs))
        if type(leaf) is type(old)
    ]
    if isinstance(old, int):
        return [old + 1, old - 1, old + 1, old - 1, -old, 0, 2 * old, *dict.fromkeys(literals)]
    near = [old * (1 + 1e-3), old * (1 - 1e-6), old * (1 + 1e-5), old + 1.0, old - 1.0]
    return [*near, 2 * old, old / 2, -old, 0.0, 1.0, old * 1e3, *dict.fromkeys(literals)]


def _swap_operands(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """Two positional operands, or two members of a list (of a concatenation, of indices)."""
    lists = [i for i, arg in enumerate(node.args) if isinstance(arg, (list, tuple)) and len(arg) > 1]
    if lists and chance.random() < 0.7:
        place = chance.choice(lists)
        members: list[Any] = list(node.args[place])  # type: ignore[arg-type]
        i, j = chance.sample(range(len(members)), 2)
        members[i], members[j] = members[j], members[i]
        if members == list(node.args[place]):  # type: ignore[arg-type]
            return None
        node.update_arg(place, members)
        _mark(node)
        return f"members {i} and {j} of argument {place} swapped"
    if len(node.args) < 2:
        return None
    args = list(node.args)
    i, j = chance.sample(range(min(len(args), 3)), 2)
    if args[i] is args[j] or not isinstance(args[i], Node):
        return None
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)
    _mark(node)
    return f"arguments {i} and {j} swapped"


def _replace_operand(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """By another value of the same shape and dtype that is known at this point of the graph."""
    if not node.all_input_nodes:
        return None
    old = chance.choice(node.all_input_nodes)
    like = tensor_of(old)
    if like is None:
        return None
    earlier = list(graph.nodes)[: list(graph.nodes).index(node)]
    others = [
        other
        for other in earlier
        if other is not old and (v := tensor_of(other)) is not None and (v.shape, v.dtype) == (like.shape, like.dtype)
    ]
    if not others:
        return None
    new = chance.choice(others)
    node.replace_input_with(old, new)
    _mark(node)
    return f"{old} replaced by {new}"


def _drop(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """The operation goes; one of its operands of the same shape takes its place."""
    like = tensor_of(node)
    if like is None:
        return None
    same = [p for p in node.all_input_nodes if (v := tensor_of(p)) is not None and v.shape == like.shape]
    if not same:
        return None
    operand = chance.choice(same)
    _mark(*node.users)
    node.replace_all_uses_with(operand)
    return f"dropped, {operand} in its place"


_BINARY = [
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
]
_UNARY = [
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.cos.default, aten.sin.default,
    aten.neg.default, aten.abs.default, aten.square.default, aten.exp.default, aten.relu.default, aten.clone.default,
]  # fmt: skip
_REDUCTION = [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.prod.dim_int]
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]


def _operation(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """Another operation with the same operands, another dtype of a cast, accumulation into the cache."""
    target: Any = node.target
    if target in (prims.convert_element_type.default, aten._to_copy.default):
        return _recast(node, chance)
    if target is aten.index_put.default:
        node.args = (*node.args[:3], True)
        _mark(node)
        return "accumulates"
    if target is aten.pow.Tensor_Scalar:
        node.target, node.args = chance.choice([aten.square.default, aten.abs.default, aten.exp.default]), node.args[:1]
        _mark(node)
        return f"pow becomes {node.target}"
    if target in (aten.add.Tensor, aten.sub.Tensor) and chance.random() < 0.2:
        node.kwargs = {"alpha": chance.choice([2, -1, 0])}
        _mark(node)
        return f"alpha {node.kwargs['alpha']}"
    group = next((group for group in (_BINARY, _UNARY, _REDUCTION) if target in group), None)
    if group is None:
        return None
    new: Any = chance.choice([other for other in group if other is not target])
    node.target = new
    if new is aten.prod.dim_int:
        node.update_arg(1, node.args[1][0])  # type: ignore[index]
    _mark(node)
    return f"becomes {new}"


def _recast(node: Node, chance: random.Random) -> str | None:
    source = tensor_of(node.args[0])
    if source is None:
        return None
    dtype = chance.choice(_DTYPES)
    if dtype == node.meta["val"].dtype:
        return None
    node.target, node.args, node.kwargs = prims.convert_element_type.default, (node.args[0], dtype), {}
    _mark(node)
    return f"casts to {dtype}"


Steps = Sequence[tuple[Any, tuple[Any, ...]]]
"""Operations to apply one after another; ``X`` stands for the value on the edge, ``None`` for the last result."""

X = object()


def _float_steps(chance: random.Random, tensor: torch.Tensor) -> tuple[str, Steps]:
    bound = chance.choice([1e4, 1e30, 10.0, 1.0, 0.5])
    small = chance.choice([1e-3, 1e-6, 1e-9, 1e-12, -1e-6, 1e-30])
    factor = chance.choice([1 + 1e-3, 1 + 1e-5, 1 - 1e-6, 1 + 1e-8, 1.0, 2.0, -1.0, 0.5])
    coarse = chance.choice([torch.bfloat16, torch.float16, torch.int64])
    cast = prims.convert_element_type.default
    return chance.choice(
        [
            (f"clamp to {bound:g}", [(aten.clamp.default, (None, -bound, bound))]),
            (f"clamp_min {-bound:g}", [(aten.clamp_min.default, (None, -bound))]),
            ("abs", [(aten.abs.default, (None,))]),
            ("round", [(aten.round.default, (None,))]),
            ("relu", [(aten.relu.default, (None,))]),
            ("neg", [(aten.neg.default, (None,))]),
            ("nan_to_num", [(aten.nan_to_num.default, (None,))]),
            ("sign kept, magnitude by root of square", [(aten.square.default, (None,)), (aten.sqrt.default, (None,))]),
            ("leaky where", [
                (aten.mul.Tensor, (X, 0.5)), (aten.maximum.default, (None, X)),
            ]),
            (f"soft bound {bound:g} by roots", [
                (aten.sub.Tensor, (X, bound)), (aten.square.default, (None,)), (aten.sqrt.default, (None,)),
                (aten.sub.Tensor, (X, None)), (aten.add.Tensor, (None, bound)), (aten.mul.Tensor, (None, 0.5)),
            ]),
            (f"fake cast to {coarse}", [(cast, (None, coarse)), (cast, (None, tensor.dtype))]),
            (f"add {small:g}", [(aten.add.Tensor, (None, small))]),
            (f"mul {factor!r}", [(aten.mul.Tensor, (None, factor))]),
            (f"pow {1 + small:g}", [(aten.pow.Tensor_Scalar, (None, 1 + small))]),
            (f"add {small:g} of its square", [(aten.square.default, (X,)), (aten.mul.Tensor, (None, small)),
                                              (aten.add.Tensor, (X, None))]),
            ("add 0 times itself", [(aten.mul.Tensor, (X, 0.0)), (aten.add.Tensor, (X, None))]),
            ("divided by itself squared", [(aten.square.default, (X,)), (aten.div.Tensor, (X, None))]),
            *_moves(chance, tensor),
        ]
    )  # fmt: skip


def _int_steps(chance: random.Random, tensor: torch.Tensor) -> tuple[str, Steps]:
    n = chance.choice([1, -1, 2, 7, 16])
    return chance.choice(
        [
            (f"add {n}", [(aten.add.Tensor, (None, n))]),
            (f"mul {n}", [(aten.mul.Tensor, (None, n))]),
            (f"remainder {abs(n) + 1}", [(aten.remainder.Scalar, (None, abs(n) + 1))]),
            (f"fmod {abs(n) + 1}", [(aten.fmod.Scalar, (None, abs(n) + 1))]),
            (f"clamp_min {n}", [(aten.clamp_min.default, (None, n))]),
            (f"clamp_max {n}", [(aten.clamp_max.default, (None, n))]),
            ("neg", [(aten.neg.default, (None,))]),
            ("abs", [(aten.abs.default, (None,))]),
            ("bitwise_not", [(aten.bitwise_not.default, (None,))]),
            ("int32", [(prims.convert_element_type.default, (None, torch.int32))]),
            *_moves(chance, tensor),
        ]
    )


def _moves(chance: random.Random, tensor: torch.Tensor) -> list[tuple[str, Steps]]:
    """Elsewhere in the same shape."""
    if tensor.dim() == 0:
        return []
    dim = chance.randrange(tensor.dim())
    found: list[tuple[str, Steps]] = [
        (f"flip {dim}", [(aten.flip.default, (None, [dim]))]),
        (f"roll {dim}", [(aten.roll.default, (None, [1], [dim]))]),
        ("clone", [(aten.clone.default, (None,))]),
        (f"first of {dim} for all", [
            (aten.slice.Tensor, (None, dim, 0, 1)), (aten.expand.default, (None, list(tensor.shape))),
        ]),
    ]  # fmt: skip
    if tensor.dim() > 1:
        turned = [*range(tensor.dim())]
        i, j = chance.sample(turned, 2)
        turned[i], turned[j] = j, i
        back: list[tuple[Any, tuple[Any, ...]]] = [(aten.permute.default, (None, turned))]
        back.append((aten.reshape.default, (None, list(tensor.shape))))
        found.append((f"read with {i} and {j} transposed", back))
    return found


def _insert(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """A step on one edge, or on all edges of one value."""
    if not node.all_input_nodes:
        return None
    edge = node.args[1] if is_store(node) else chance.choice(node.all_input_nodes)
    assert isinstance(edge, Node)
    tensor = tensor_of(edge)
    if tensor is None or tensor.dtype == torch.bool:
        return None
    what, steps = (_float_steps if tensor.is_floating_point() else _int_steps)(chance, tensor)
    everywhere = chance.random() < 0.25 and edge.op == "call_function"
    first = node if not everywhere else edge.next
    users = list(edge.users) if everywhere else [node]
    last = edge
    with graph.inserting_before(first):
        for target, operands in steps:
            args = tuple(edge if a is X else last if a is None else a for a in operands)
            last = graph.call_function(target, args)
            last.meta = {"val": tensor, "mutated": True, "stack_trace": node.meta.get("stack_trace")}
    for user in users:
        user.replace_input_with(edge, last)
    _mark(*users)
    return f"{what} after {edge}" + (", for all its users" if everywhere else "")


_CHANGES: list[Callable[[Graph, Node, random.Random], str | None]] = [
    _constant, _constant, _swap_operands, _replace_operand, _replace_operand, _drop, _operation, _insert, _insert,
    _insert,
]  # fmt: skip
