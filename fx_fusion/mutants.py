"""Mutation testing of graphs: one constant, operand or operation of a fused region is changed at random.

Each mutant must be refused, or be rewritten into what the mutant itself computes. A mutant is a whole functional
post-grad graph, as the pass sees it, in which one thing between the projections and the stores, or the query's
consumer, is different; nothing here asks the pass where that is.

    for mutant in Mutants.of(MyAttention(), inputs, count=300, seed=0):
        fused, report = rewritten(mutant)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fx_fusion import opset
from fx_fusion.config import Config
from fx_fusion.decline import first_source_line
from fx_fusion.functional import quiet
from fx_fusion.fusion_pass import apply
from fx_fusion.report import FusionReport

aten = torch.ops.aten
prims = torch.ops.prims

#: How many proposals in a row may be discarded or already seen before the graph counts as exhausted.
_PATIENCE = 500


@dataclass(frozen=True)
class Mutant:
    """``module(*inputs)`` is the graph ``original`` with one thing changed."""

    description: str
    module: GraphModule
    inputs: tuple[Any, ...]
    projections: tuple[str, ...]
    """The matrix products (or graph inputs, where there are none) that the region starts from, by node name."""


@dataclass
class Mutants:
    """Distinct mutants of one graph, in an order that `seed` fixes; ``discarded`` counts those that could not run.

    `where` picks the nodes of the region that are changed: all of them, unless told otherwise.
    """

    original: Mutant
    count: int
    seed: int
    where: Callable[[Node], bool] = lambda _: True
    discarded: int = field(default=0, init=False)

    @staticmethod
    def of(
        fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, count: int, seed: int
    ) -> Mutants:
        """Mutants of the graph of ``fn(*args, **kwargs)``, which is traced, and run once."""
        return Mutants(capture(fn, args, kwargs), count, seed)

    def __iter__(self) -> Iterator[Mutant]:
        chance = random.Random(self.seed)
        seen: set[str] = set()
        found = idle = 0
        while found < self.count and idle < _PATIENCE:
            idle += 1
            graph = copy.deepcopy(self.original.module.graph)
            change = _propose(graph, chance, self.where)
            if change is None or change in seen:
                continue
            seen.add(change)
            module = _traced(self.original, graph)
            if module is None:
                self.discarded += 1
                continue
            found, idle = found + 1, 0
            yield Mutant(change, module, self.original.inputs, self.original.projections)


def rewritten(mutant: Mutant) -> tuple[GraphModule, FusionReport]:
    """A copy of the mutant after the pass, with the reference kernel, and what the pass says."""
    module = GraphModule(mutant.module, copy.deepcopy(mutant.module.graph))
    report = apply(module.graph, Config(kernel="reference"))
    module.recompile()
    return module, report


def capture(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Mutant:
    """The post-grad graph of ``fn(*args, **kwargs)``, unchanged, with copies of the inputs that it was called with.

    Of several graphs, the one that stores into an input.

    Raises:
        ValueError: there are several graphs, and not exactly one stores into an input.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    found: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def inner(gm: GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
        view_to_reshape(gm)
        gm.recompile()

        def call(inputs: list[Any]) -> Any:
            arguments = list(inputs)
            inputs.clear()
            found.append((gm, tuple(copies(arguments))))
            return gm(*arguments)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        hook: Any = inner
        return compile_fx(gm, list(example_inputs), inner_compile=hook, config_patches={"force_disable_caches": True})

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(fn, backend=backend, dynamic=False)(*args, **(kwargs or {}))
    finally:
        torch._dynamo.reset()
    storing = [(gm, inputs) for gm, inputs in found if any(_is_store(node) for node in gm.graph.nodes)]
    chosen = storing if len(found) > 1 else found
    if len(chosen) != 1:
        raise ValueError(
            f"of {len(found)} graphs {len(storing)} store into an input; expected one graph, or one that does"
        )
    gm, inputs = chosen[0]
    _, projections = region(gm.graph)
    return Mutant("unchanged", gm, inputs, tuple(node.name for node in projections))


def copies(values: Sequence[Any]) -> list[Any]:
    """Copies with the same strides; what shared storage still does."""
    return copy.deepcopy([value.detach() if isinstance(value, torch.Tensor) else value for value in values])


def region(graph: Graph) -> tuple[list[Node], list[Node]]:
    """The nodes between the projections and the stores or the query's consumer, frontier included; the projections.

    Back from every store (where there is none, from every output) as far as matrix products, forward from each float
    found (the query shares the projection or the angles), and back again.
    """
    stores = [node for node in graph.nodes if _is_store(node)]
    inside: dict[Node, None] = {}
    starts: dict[Node, None] = {}
    _walk_back([node.args[1] for node in stores] or list(graph.output_node().all_input_nodes), inside, starts)
    forward = [node for node in (*inside, *starts) if _is_float(node)]
    reached: list[Node] = []
    while forward:
        for user in forward.pop().users:
            if _is_step(user) and user not in inside and user not in reached:
                reached.append(user)
                forward.append(user)
    _walk_back(reached, inside, starts)
    return [node for node in graph.nodes if node in inside], [node for node in graph.nodes if node in starts]


def _walk_back(stack: list[Any], inside: dict[Node, None], starts: dict[Node, None]) -> None:
    while stack:
        node = stack.pop()
        if _is_product(node):
            starts[node] = None
        if node in inside or not _is_step(node):
            continue
        inside[node] = None
        stack.extend(node.all_input_nodes)


def _is_step(node: Node) -> bool:
    return node.op == "call_function" and not _is_product(node) and not _is_store(node)


def _is_product(node: Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and any(word in name for word in ("mm.", "attention", "linear", "convolution"))


def _is_store(node: Node) -> bool:
    return node.op == "call_function" and node.target is aten.copy_.default


def _is_float(value: Any) -> bool:
    tensor = _value(value)
    return tensor is not None and tensor.is_floating_point()


def _value(value: Any) -> torch.Tensor | None:
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    return tensor if isinstance(tensor, torch.Tensor) else None


# --- a mutant is a graph that could have been traced ------------------------------------------------------------------


def _traced(original: Mutant, graph: Graph) -> GraphModule | None:
    """`graph` as a module, or None where it could not have been traced, or does not run."""
    with quiet():
        if not (_refresh(graph) and _is_well_formed(graph) and _is_survivable(graph)):
            return None
    module = GraphModule(original.module, graph)
    return module if _runs(module, original.inputs) else None


def _refresh(graph: Graph) -> bool:
    """Fake values for the nodes that the change reaches; False if some operation refuses its operands."""
    changed: set[Node] = set()
    for node in graph.nodes:
        stale = node.meta.pop("mutated", False) or not changed.isdisjoint(node.all_input_nodes)
        if node.op != "call_function" or not stale:
            continue
        before = node.meta.get("val")
        try:
            node.meta["val"] = _fake_run(node)
        except Exception:
            return False
        if _layouts(before) != _layouts(node.meta["val"]):
            changed.add(node)
    return True


def _fake_run(node: Node) -> Any:
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: a.meta["val"] if isinstance(a, Node) else a)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, node.meta.get("val"))) if hasattr(leaf, "fake_mode")]
    with tensors[0].fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _layouts(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value)
    return [
        (leaf.shape, leaf.dtype, leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]


def _is_well_formed(graph: Graph) -> bool:
    """AOTAutograd copies back what has the input's own shape and dtype, and nothing else."""
    pairs = [map(_value, node.args) for node in graph.nodes if _is_store(node)]
    return all(a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def _is_survivable(graph: Graph) -> bool:
    """Attention on a CPU divides by how many heads of queries a head of keys serves. Where that is none it takes the
    process along: a division by zero in C++ is no exception.
    """
    attentions = [node for node in graph.nodes if "scaled_dot_product" in str(node.target)]
    pairs = [[value.shape for value in map(_value, node.args[:2]) if value is not None] for node in attentions]
    return all(query.numel() and key.numel() and query[1] % key[1] == 0 for query, key in pairs)


def _runs(module: GraphModule, inputs: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            module(*copies(inputs))
    except Exception:
        return False
    return True


# --- changes ----------------------------------------------------------------------------------------------------------


def _propose(graph: Graph, chance: random.Random, where: Callable[[Node], bool]) -> str | None:
    """Change one thing of the region, and tell what; None if the choice does not apply to the node chosen."""
    stores = [node for node in graph.nodes if _is_store(node)]
    nodes = [node for node in (*region(graph)[0], *stores) if where(node)]
    steps = [node for node in nodes if not opset.is_movement(node)]
    # Most nodes of a region only move values: half of the changes go to the others.
    node = chance.choice(steps if steps and chance.random() < 0.5 else nodes)
    change = (_insert if _is_store(node) else chance.choice(_CHANGES))(graph, node, chance)
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
    like = _value(old)
    if like is None:
        return None
    earlier = list(graph.nodes)[: list(graph.nodes).index(node)]
    others = [
        other
        for other in earlier
        if other is not old and (v := _value(other)) is not None and (v.shape, v.dtype) == (like.shape, like.dtype)
    ]
    if not others:
        return None
    new = chance.choice(others)
    node.replace_input_with(old, new)
    _mark(node)
    return f"{old} replaced by {new}"


def _drop(graph: Graph, node: Node, chance: random.Random) -> str | None:
    """The operation goes; one of its operands of the same shape takes its place."""
    like = _value(node)
    if like is None:
        return None
    same = [p for p in node.all_input_nodes if (v := _value(p)) is not None and v.shape == like.shape]
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
    source = _value(node.args[0])
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
    edge = node.args[1] if _is_store(node) else chance.choice(node.all_input_nodes)
    assert isinstance(edge, Node)
    tensor = _value(edge)
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
