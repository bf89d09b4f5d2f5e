"""Rounding: the region and the reference in native dtypes, row by row.

What the values are is settled exactly (``field/``). What is left is how a computer's floats come near them. So both run
once more in the dtypes that the graph records, and every row (a head of a token) must agree to within rounding of its
own magnitude: among rows around one, rows whose squares overflow, and rows near the ends of the dtype's range. The
largest value of all says nothing about the small rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.proof.evaluate import Arithmetic
from fx_fusion.proof.reference import Reference
from fx_fusion.proof.region_function import TOLERANCE, Probe
from fx_fusion.proof.samples import signed

#: Largest error of a native run, relative to the largest value of a row. A model rounds at most eight times between the
#: projection and the store (cast, weight, and three a product sum), each by at most half a unit in the last place:
#: four ``finfo.eps``. float32 sums over head_dim add a few more.
NATIVE_TOLERANCE = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.float64: TOLERANCE,
}

#: Beside that an absolute error, whatever the row's magnitude. float16 has few exponents and all arithmetic on it is
#: float32: eight steps of its smallest numbers. Of the others, what is subnormal may be flushed to zero on the way.
NATIVE_FLOOR = {
    torch.bfloat16: torch.finfo(torch.bfloat16).tiny,
    torch.float16: 8 * torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps,
    torch.float32: torch.finfo(torch.float32).tiny,
    torch.float64: torch.finfo(torch.float64).tiny,
}

#: The magnitude of weights and angles: ordinary, and so small that what is added to them and taken off again shows.
_LEAF_SCALES = (1.0, 2.0**-8)


def magnitudes(dtype: torch.dtype) -> tuple[float, ...]:
    """Of rows: ordinary; whose squares overflow; at the upper end of the range, with room for a rotation and a weight;
    so small that the absolute error only just does not matter; and subnormal.
    """
    range_ = torch.finfo(dtype)
    least = 16 * NATIVE_FLOOR[dtype] / NATIVE_TOLERANCE[dtype]
    return 1.0, 1.3 * range_.max**0.5, range_.max / 16, least, range_.tiny / 4


def check_rounding(probe: Probe, reference: Reference, generator: torch.Generator) -> None:
    """Compare region and reference in native dtypes, row by row.

    Where the region is finite the reference must be finite and close; where the region overflows the reference may
    still be right.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the magnitude of the row that shows it.
    """
    dtype: torch.dtype = probe.branch.data.meta["val"].dtype
    scales = torch.tensor(magnitudes(dtype), dtype=torch.float64)
    ordinary = _ordinary(probe, generator)
    wide = signed(probe.random_leaves(generator), generator)
    for which, leaf_scale in _assignments(probe.tokens, len(reference.columns), len(scales)):
        leaves = {leaf: (leaf_scale * value).to(leaf.meta["val"].dtype.to_real()) for leaf, value in wide.items()}
        data = ordinary.clone()
        data[:, reference.columns] *= scales[which][..., None]
        _compare(probe, reference, data.to(dtype), leaves)


def _assignments(tokens: int, heads: int, count: int) -> Iterator[tuple[Tensor, float]]:
    """For each run, which of `count` magnitudes each row has, [tokens, heads], and the leaves' scale.

    Over all runs and tokens every head has every magnitude, and every scale is used.
    """
    step = min(tokens, count)
    runs = max(len(_LEAF_SCALES), -(-count // step))
    for run in range(runs):
        which = torch.arange(tokens)[:, None] + torch.arange(heads) + run * step
        yield which % count, _LEAF_SCALES[run % len(_LEAF_SCALES)]


def _ordinary(probe: Probe, generator: torch.Generator) -> Tensor:
    """[tokens, columns]: numbers between one and two, of both signs."""
    shape = (probe.tokens, probe.columns)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * (1 + torch.rand(shape, generator=generator, dtype=torch.float64))


def _compare(probe: Probe, reference: Reference, data: Tensor, leaves: Mapping[Node, Tensor]) -> None:
    dtype = data.dtype
    region = probe.run(data, leaves, Arithmetic.NATIVE).double().reshape(-1, reference.lanes)
    fused = reference.run(data, leaves).double().reshape(-1, reference.lanes)
    finite = region.isfinite()
    lost = finite & ~fused.isfinite()
    row = torch.where(fused.isfinite(), fused.abs(), 0).amax(-1, keepdim=True)
    allowed = NATIVE_TOLERANCE[dtype] * row + NATIVE_FLOOR[dtype]
    wrong = lost | (finite & ~((region - fused).abs() <= allowed))
    if not bool(wrong.any()):
        return
    at = int(wrong.any(-1).int().argmax())
    found = f"in {dtype} a row that the fused operation computes as up to {float(row[at, 0]):.3g}"
    if bool(lost[at].any()):
        raise Decline("proof.mismatch", f"{found} overflows there alone", [probe.branch.out])
    difference = float(torch.where(finite, (region - fused).abs(), 0)[at].max())
    raise Decline("proof.mismatch", f"{found} differs by {difference:.1e} from the region's", [probe.branch.out])
