"""What the pass knows about ATen operations: which move values, which compute analytically, which are opaque.

Three questions are asked of an operation on the path from a projection to a store:

* does it only *move* values (``is_movement``), so that running it on element numbers shows where each one goes;
* does it compute an *analytic* function (``is_analytic``), so that two regions agreeing on random input agree
  everywhere;
* is it a boundary (``is_opaque``): a matrix product, or an operation outside ATen.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph.torch_compat import HAS_FMA, OpOverload

aten = torch.ops.aten
prims = torch.ops.prims

#: The same values in the same order, in another shape.
RESHAPE = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})

#: One tensor in, the same values out, elsewhere.
MOVEMENT = RESHAPE | frozenset(
    {
        aten.permute.default, aten.t.default,
        aten.transpose.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.flip.default,
        aten.roll.default, aten.repeat.default, prims.rev.default, operator.getitem,
    }
)  # fmt: skip

#: What aliases its input: a chain of them over a cache is an address, never a copy.
VIEW = MOVEMENT - {aten.clone.default, aten.flip.default, aten.roll.default, aten.repeat.default, prims.rev.default} | {
    aten.as_strided.default,
    aten.view.dtype,
}

#: Several tensors in, their values out.
JOIN = frozenset(
    {
        aten.cat.default, aten.stack.default, aten.slice_scatter.default, aten.select_scatter.default,
        aten.copy.default,
    }
)  # fmt: skip

#: Values picked by a mask or an index, which must not itself depend on the data.
SELECTION = frozenset(
    {aten.where.self, aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.embedding.default}
)

#: Between pairs of reals and complex numbers: the same values, two at a time.
COMPLEX = frozenset({aten.view_as_complex.default, aten.view_as_real.default, aten.complex.default})

CAST = frozenset({prims.convert_element_type.default, aten._to_copy.default})

#: What Dynamo makes of ``addcmul_`` with a factor, in the versions of PyTorch that have it.
_FUSED_MULTIPLY_ADD = frozenset({prims.fma.default} if HAS_FMA else ())

ARITHMETIC = _FUSED_MULTIPLY_ADD | frozenset(
    {
        aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
        aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default,
        aten.reciprocal.default, aten.square.default, aten.addcmul.default, aten.addcdiv.default,
        aten.mean.dim, aten.sum.dim_IntList,
    }
)  # fmt: skip

#: Analytic only where their argument stays positive; the certificate asks for a sum under them.
ROOTS = frozenset({aten.sqrt.default, aten.rsqrt.default, aten.pow.Tensor_Scalar})

#: What a LayerNorm is made of.
CENTRED_NORMS = frozenset({aten.var_mean.correction, aten.native_layer_norm.default, aten.native_group_norm.default})

REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList})

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_mm", "_int_mm", "einsum"})


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


def is_analytic(node: Node) -> bool:
    """May `node` lie on the data path of a region that is proved by sampling?"""
    return (
        is_movement(node)
        or is_cast(node)
        or is_join(node)
        or is_selection(node)
        or is_arithmetic(node)
        or (node.op == "call_function" and node.target in COMPLEX)
    )


def is_opaque(node: Node) -> bool:
    """A natural boundary: a graph input, a matrix product, or an operation outside ATen."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem and not is_symbolic(node)
    if node.target.namespace not in ("aten", "prims"):
        return True
    name = node.target._schema.name.split("::")[1]
    return name in _PRODUCTS or "scaled_dot_product" in name


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
