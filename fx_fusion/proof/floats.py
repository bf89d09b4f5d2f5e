"""Is it the same function? The region against the reference, on fresh random input.

In float64 the two agree to 1e-9 or they differ; in native dtypes they agree to the rounding that
:data:`NATIVE_TOLERANCE` justifies. The certificate makes agreement on samples agreement everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.proof.evaluate import Arithmetic
from fx_fusion.proof.region_function import TOLERANCE, Probe, relative_difference

Reference = Callable[[torch.Tensor, Mapping[Node, torch.Tensor]], torch.Tensor]
"""(data [tokens, columns], leaves) to what the branch's result should be."""

#: Largest error of a native run, relative to the largest value. A model rounds at most eight times between the
#: projection and the store (cast, weight, and three a product sum), each by at most half a unit in the last place:
#: four ``finfo.eps``. float32 sums over head_dim add a few more.
NATIVE_TOLERANCE = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.float64: TOLERANCE,
}

#: Scales of data and of operands in float64: around one, where eps dominates, and where it vanishes; zero, where a
#: constant added on the way is all that is left, however small; and far out, where it is a term of higher order.
SCALES = ((1.0, 1.0), (1e-4, 1.0), (1e4, 1.0), (0.0, 1.0), (1e15, 1e30))


def prove(probe: Probe, reference: Reference, generator: torch.Generator) -> float:
    """The largest relative difference in float64 over all samples.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the scale at which it showed.
    """
    worst = 0.0
    for scale, leaf_scale in SCALES:
        data = scale * torch.randn(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
        leaves = _signed(probe.random_leaves(generator), generator)
        leaves = {leaf: leaf_scale * value for leaf, value in leaves.items()}
        difference = relative_difference(probe.run(data, leaves), reference(data, leaves))
        if not difference < TOLERANCE:
            found = (
                f"in float64 the region and the fused operation differ by {difference:.1e} on input of scale {scale:g}"
            )
            raise Decline("proof.mismatch", found, [probe.branch.out])
        worst = max(worst, difference)
    _prove_native(probe, reference, generator)
    return worst


def _prove_native(probe: Probe, reference: Reference, generator: torch.Generator) -> None:
    """In native dtypes, at ordinary magnitude and where squares overflow float16.

    Where the region is finite the reference must be finite and close; where the region overflows the reference may
    still be right.
    """
    dtype: torch.dtype = probe.branch.data.meta["val"].dtype
    for scale in (1.0, 3e2):
        data = (scale * torch.randn(probe.tokens, probe.columns, generator=generator)).to(dtype)
        wide = _signed(probe.random_leaves(generator), generator)
        leaves = {leaf: value.to(leaf.meta["val"].dtype.to_real()) for leaf, value in wide.items()}
        region = probe.run(data, leaves, Arithmetic.NATIVE).double()
        expected = reference(data.double(), {leaf: value.double() for leaf, value in leaves.items()})
        finite = region.isfinite()
        difference = relative_difference(torch.where(finite, region, expected), expected)
        if not difference < NATIVE_TOLERANCE[dtype]:
            found = (
                f"in {dtype} the region and the fused operation differ by {difference:.1e} on input of scale {scale:g}"
            )
            raise Decline("proof.mismatch", found, [probe.branch.out])


def _signed(leaves: Mapping[Node, torch.Tensor], generator: torch.Generator) -> dict[Node, torch.Tensor]:
    """Both signs occur in weights and angles."""
    return {
        leaf: value * (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1)
        for leaf, value in leaves.items()
    }  # fmt: skip
