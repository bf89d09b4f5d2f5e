"""What the pass asks of operations: which move values, which compute analytically, which are opaque.

Three questions are asked of an operation on the path from a projection to a store:

* does it only *move* values (``is_movement``), so that running it on element numbers shows where each one goes;
* does it compute an *analytic* function (``is_analytic``), so that two regions agreeing on random input agree
  everywhere;
* is it a boundary (``is_opaque``): a matrix product, or an operation outside ATen.

What is known of each is a row of ``operation_table.py``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph.operation_table import TABLE, Row, Trait, aten
from fx_fusion.graph.operation_table import prims as prims
from fx_fusion.graph.torch_compat import OpOverload


def _with(trait: Trait) -> frozenset[Any]:
    return frozenset(target for target, row in TABLE.items() if trait in row.traits)


RESHAPE = _with(Trait.IN_ORDER)
MOVEMENT = _with(Trait.MOVES)
VIEW = _with(Trait.ALIASES)
JOIN = _with(Trait.JOINS)
SELECTION = _with(Trait.SELECTS)
CAST = _with(Trait.CASTS)
ROOTS = _with(Trait.ROOT)
REDUCTIONS = _with(Trait.REDUCES)
ARITHMETIC = _with(Trait.COMPUTES)
AFFINE = _with(Trait.AFFINE)
PAIRS = _with(Trait.PAIRS)
#: May lie on the data path of a region that is proved by sampling.
ANALYTIC = MOVEMENT | JOIN | SELECTION | CAST | ARITHMETIC | ROOTS | PAIRS
SMOOTH = _with(Trait.SMOOTH)
LOGARITHMS = _with(Trait.LOGARITHM)
PRODUCTS = _with(Trait.PRODUCT)
BY_STRIDES = _with(Trait.BY_STRIDES)
CENTRED_NORMS = _with(Trait.CENTRES)
UNDEFINED = _with(Trait.UNDEFINED)
ADDERS = _with(Trait.ADDS)
#: Kinds of analytic steps that a function either needs or cannot have.
RARE = {target: row.rare for target, row in TABLE.items() if row.rare}
#: What writes a value at indices, and which of its arguments the value is.
WRITERS = {target: row.value for target, row in TABLE.items() if row.value is not None}
#: What puts a part back, and the view that takes that part out.
SCATTERS = {target: row.takes for target, row in TABLE.items() if row.takes is not None}
#: What may copy to another device, and which of its arguments it copies.
COPIES = {target: row.copies for target, row in TABLE.items() if row.copies is not None}

#: Matrix products that end a region, by the name in the schema, whatever the overload.
_BOUNDARIES = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_mm", "_int_mm", "einsum"})

_UNKNOWN = Row()
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def node_of(value: Any) -> Node:
    """`value`, which must be a node."""
    assert isinstance(value, Node), value
    return value


def value_of(value: Any) -> Any:
    """The fake value of a node; of anything else, itself."""
    return value.meta["val"] if isinstance(value, Node) else value


def row(node: Node) -> Row:
    """What is known of the operation that `node` calls."""
    return TABLE.get(node.target, _UNKNOWN)


def is_movement(node: Node) -> bool:
    return node.op == "call_function" and node.target in MOVEMENT


def is_cast(node: Node) -> bool:
    return node.op == "call_function" and node.target in CAST


def is_reinterpretation(node: Node) -> bool:
    """Does `node` take the bytes of each element for another dtype of the same size?"""
    if node.op != "call_function" or node.target is not aten.view.dtype:
        return False
    source = node.args[0]
    return isinstance(source, Node) and source.meta["val"].dtype.itemsize == node.meta["val"].dtype.itemsize


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Does the float `dtype` hold every number of the float `other`?"""
    if dtype == other:
        return True
    if 1 in (dtype.itemsize, other.itemsize):  # PyTorch promotes no float8
        return dtype.itemsize >= 4
    return torch.promote_types(dtype, other) == dtype


def is_join(node: Node) -> bool:
    return node.op == "call_function" and node.target in JOIN


def is_selection(node: Node) -> bool:
    return node.op == "call_function" and node.target in SELECTION


def is_arithmetic(node: Node) -> bool:
    return node.op == "call_function" and (node.target in ARITHMETIC or node.target in ROOTS)


def takes_root(node: Node) -> bool:
    """Is `node` a root, or a power that is one? A natural power is a product."""
    if node.target is aten.pow.Tensor_Scalar:
        exponent = node.args[1]
        return not (isinstance(exponent, (int, float)) and exponent >= 1 and float(exponent).is_integer())
    return node.target in ROOTS


def is_analytic(node: Node) -> bool:
    """May `node` lie on the data path of a region that is proved by sampling?"""
    return node.op == "call_function" and node.target in ANALYTIC


def is_opaque(node: Node) -> bool:
    """A natural boundary: a graph input, a matrix product, or an operation outside ATen."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem and not is_symbolic(node)
    if node.target.namespace not in ("aten", "prims"):
        return True
    name = node.target._schema.name.split("::")[1]
    return name in _BOUNDARIES or "scaled_dot_product" in name


def draws(node: Node) -> bool:
    """Does `node` draw random numbers, so that no other node, and no later run of it, holds the same values?

    A dropout that drops nothing draws none.
    """
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = {**_by_name(node, node.target._schema), **node.kwargs}
    trains = [given[name] for name in ("train", "training") if name in given]
    chances = [given[name] for name in _CHANCES if name in given and (trains or name != "p")]
    return not any(value is False for value in trains) and not any(type(p) in (int, float) and p == 0 for p in chances)


#: How the arguments are named that say how often a dropout drops; ``p`` says so only beside ``train``.
_CHANCES = ("p", "dropout", "dropout_p")


def _by_name(node: Node, schema: torch.FunctionSchema) -> dict[str, Any]:
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return {**defaults, **dict(zip(names, node.args, strict=False))}


def is_literal(node: Node) -> bool:
    """Is `node` made of literals alone (an iota, a mask computed from one)? A random number is none."""
    stack = [node]
    seen: set[Node] = set()
    while stack:
        top = stack.pop()
        if is_symbolic(top) or top in seen:
            continue
        if top.op != "call_function" or is_opaque(top) or draws(top) or len(seen) > 64:
            return False
        seen.add(top)
        stack.extend(top.all_input_nodes)
    return True


def is_symbolic(node: Node) -> bool:
    """Does `node` hold a number (a size) rather than a tensor?"""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_float_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_complex_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def is_int_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in _INTEGERS
