"""What is known of each operation, a row for each. ``operations.py`` has what follows from it."""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fx_fusion.graph.torch_compat import HAS_FMA

aten = torch.ops.aten
prims = torch.ops.prims


class Trait(enum.Flag):
    """What may be known of an operation."""

    MOVES = enum.auto()
    """One tensor in, the same values out, elsewhere."""
    IN_ORDER = enum.auto()
    """The same values in the same order, in another shape."""
    ALIASES = enum.auto()
    """The result is the input's memory: a chain of them over a cache is an address, never a copy."""
    JOINS = enum.auto()
    """Several tensors in, their values out."""
    SELECTS = enum.auto()
    """Values picked by a mask or an index, which must not itself depend on the data."""
    PAIRS = enum.auto()
    """Between pairs of reals and complex numbers: the same values, two at a time."""
    CASTS = enum.auto()
    """The values rounded to another dtype."""
    COMPUTES = enum.auto()
    """Arithmetic: analytic everywhere."""
    ROOT = enum.auto()
    """Analytic only where its argument stays positive; the certificate asks for a sum under it."""
    REDUCES = enum.auto()
    """Sums over dimensions."""
    AFFINE = enum.auto()
    """Shifts or scales its first argument, if the second is a number."""
    SMOOTH = enum.auto()
    """Analytic on all numbers, or where it is finite at all, and no part of RMSNorm and RoPE."""
    LOGARITHM = enum.auto()
    """Analytic only where its argument stays positive."""
    PRODUCT = enum.auto()
    """Of matrices or vectors."""
    CENTRES = enum.auto()
    """Subtracts a mean: what a LayerNorm is made of."""
    UNDEFINED = enum.auto()
    """Memory whose content is not defined: any two are equal."""
    BY_STRIDES = enum.auto()
    """Depends on how its argument lies in memory: no function of values."""
    ADDS = enum.auto()
    """Adds to, or combines with, what the tensor holds at indices."""
    NOTHING = 0


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        tokens: the rule of ``proof/token_reduction.py`` for how tokens pass it; empty if there is none.
        rare: a kind of analytic step that a function either needs or cannot have, however it is spelled. (So are roots
            and logarithms; whether a power is a root depends on the exponent.)
        value: of what writes into its first argument at indices: which argument holds the values.
        takes: of what puts a part back into its first argument: the view that takes that part out.
        copies: of what may copy to another device: which argument.
    """

    traits: Trait = Trait.NOTHING
    tokens: str = ""
    rare: str = ""
    value: int | None = None
    takes: Any = None
    copies: int | None = None


_VIEW = Row(Trait.MOVES | Trait.ALIASES, "view")
_RESHAPE = Row(Trait.MOVES | Trait.ALIASES | Trait.IN_ORDER, "reshape")
_REORDER = Row(Trait.MOVES, "reorder")
_POINTWISE = Row(Trait.COMPUTES, "pointwise")
_AFFINE = Row(Trait.COMPUTES | Trait.AFFINE, "pointwise")
_ROOT = Row(Trait.ROOT, "pointwise")
_SUM = Row(Trait.COMPUTES | Trait.REDUCES, "reduction")
_PAIR = Row(Trait.PAIRS, "pairs")
_SMOOTH = Row(Trait.SMOOTH)
_EXPONENTIAL = Row(Trait.SMOOTH, rare="exponential")
_TRIGONOMETRIC = Row(Trait.SMOOTH, rare="trigonometric")
_ERROR_FUNCTION = Row(Trait.SMOOTH, rare="error function")
_LOGARITHM = Row(Trait.LOGARITHM)
_PRODUCT = Row(Trait.PRODUCT, rare="product")
_CENTRES = Row(Trait.CENTRES)
_UNDEFINED = Row(Trait.UNDEFINED)
_ADDS = Row(Trait.ADDS)

#: What is known, by what a node calls.
TABLE: Mapping[Any, Row] = {
    aten.reshape.default: _RESHAPE,
    aten.view.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.permute.default: _VIEW,
    aten.t.default: _VIEW,
    aten.transpose.int: _VIEW,
    aten.unsqueeze.default: _VIEW,
    aten.squeeze.default: _VIEW,
    aten.squeeze.dim: _VIEW,
    aten.squeeze.dims: _VIEW,
    aten.expand.default: _VIEW,
    aten.slice.Tensor: _VIEW,
    aten.select.int: _VIEW,
    aten.alias.default: _VIEW,
    aten.detach.default: _VIEW,
    aten.split.Tensor: _VIEW,
    aten.split_with_sizes.default: _VIEW,
    aten.unbind.int: _VIEW,
    operator.getitem: Row(Trait.MOVES | Trait.ALIASES, "item"),
    aten.as_strided.default: Row(Trait.ALIASES | Trait.BY_STRIDES),
    aten.as_strided_copy.default: Row(Trait.BY_STRIDES),
    aten.view.dtype: Row(Trait.ALIASES),
    aten.clone.default: Row(Trait.MOVES, "pointwise"),
    aten.flip.default: _REORDER,
    aten.roll.default: _REORDER,
    prims.rev.default: _REORDER,
    aten.repeat.default: Row(Trait.MOVES, "repeat"),
    # several tensors
    aten.cat.default: Row(Trait.JOINS, "cat"),
    aten.stack.default: Row(Trait.JOINS, "stack"),
    aten.copy.default: Row(Trait.JOINS, "pointwise", copies=1),
    aten.select_scatter.default: Row(Trait.JOINS, "select_scatter", takes=aten.select.int),
    aten.slice_scatter.default: Row(Trait.JOINS, "slice_scatter", takes=aten.slice.Tensor),
    aten.as_strided_scatter.default: Row(Trait.BY_STRIDES, takes=aten.as_strided.default),
    # by mask or index
    aten.where.self: Row(Trait.SELECTS, "pointwise"),
    aten.index.Tensor: Row(Trait.SELECTS, "index"),
    aten.gather.default: Row(Trait.SELECTS, "gather"),
    aten.index_select.default: Row(Trait.SELECTS, "index_select"),
    aten.embedding.default: Row(Trait.SELECTS),
    # into a tensor, at indices
    aten.index_put.default: Row(value=2),
    aten.index_copy.default: Row(value=3),
    aten.scatter.src: Row(value=3),
    aten.index_add.default: _ADDS,
    aten.index_reduce.default: _ADDS,
    aten.scatter_add.default: _ADDS,
    aten.scatter.reduce: _ADDS,
    aten.scatter_reduce.two: _ADDS,
    # another dtype or device
    prims.convert_element_type.default: Row(Trait.CASTS, "pointwise"),
    aten._to_copy.default: Row(Trait.CASTS, "pointwise", copies=0),
    prims.device_put.default: Row(copies=0),
    aten.copy_.default: Row(copies=1),
    aten.view_as_complex.default: _PAIR,
    aten.view_as_real.default: _PAIR,
    aten.complex.default: Row(Trait.PAIRS, "pointwise"),
    # arithmetic
    aten.add.Tensor: _AFFINE,
    aten.add.Scalar: _AFFINE,
    aten.mul.Tensor: _AFFINE,
    aten.mul.Scalar: _AFFINE,
    aten.div.Tensor: _AFFINE,
    aten.div.Scalar: _AFFINE,
    aten.sub.Tensor: _POINTWISE,
    aten.sub.Scalar: _POINTWISE,
    aten.rsub.Tensor: _POINTWISE,
    aten.rsub.Scalar: _POINTWISE,
    aten.neg.default: _POINTWISE,
    aten.reciprocal.default: _POINTWISE,
    aten.square.default: _POINTWISE,
    aten.addcmul.default: _POINTWISE,
    aten.addcdiv.default: _POINTWISE,
    **({prims.fma.default: _POINTWISE} if HAS_FMA else {}),
    aten.mean.dim: _SUM,
    aten.sum.dim_IntList: _SUM,
    aten.sqrt.default: _ROOT,
    aten.rsqrt.default: _ROOT,
    aten.pow.Tensor_Scalar: _ROOT,
    # what users' patterns hold besides
    aten.exp.default: _EXPONENTIAL,
    aten.exp2.default: _EXPONENTIAL,
    aten.expm1.default: _EXPONENTIAL,
    aten.sigmoid.default: _EXPONENTIAL,
    aten.tanh.default: _EXPONENTIAL,
    aten.sin.default: _TRIGONOMETRIC,
    aten.cos.default: _TRIGONOMETRIC,
    aten.sinh.default: _EXPONENTIAL,
    aten.cosh.default: _EXPONENTIAL,
    aten.pow.Scalar: _EXPONENTIAL,
    aten.erf.default: _ERROR_FUNCTION,
    aten.erfc.default: _ERROR_FUNCTION,
    aten.log.default: _LOGARITHM,
    aten.log1p.default: _LOGARITHM,
    aten.log2.default: _LOGARITHM,
    aten.log10.default: _LOGARITHM,
    aten.sum.default: _SMOOTH,
    aten.mean.default: _SMOOTH,
    aten.cumsum.default: _SMOOTH,
    aten.var.correction: _SMOOTH,
    aten.constant_pad_nd.default: _SMOOTH,
    aten.mm.default: _PRODUCT,
    aten.addmm.default: _PRODUCT,
    aten.bmm.default: _PRODUCT,
    aten.baddbmm.default: _PRODUCT,
    aten.mv.default: _PRODUCT,
    aten.addmv.default: _PRODUCT,
    aten.dot.default: _PRODUCT,
    aten.var_mean.correction: Row(Trait.CENTRES | Trait.SMOOTH),
    aten.native_layer_norm.default: _CENTRES,
    aten.native_group_norm.default: _CENTRES,
    aten.empty.memory_format: _UNDEFINED,
    aten.empty_strided.default: _UNDEFINED,
    aten.empty_like.default: _UNDEFINED,
    aten.new_empty.default: _UNDEFINED,
    aten.new_empty_strided.default: _UNDEFINED,
}
