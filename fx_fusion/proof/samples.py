"""Float64 samples, for regions that no finite field can interpret.

Two functions that agree on random points are equal if both are analytic: then their difference, being analytic, is zero
everywhere or almost nowhere. In floats this holds up to a tolerance: it is evidence and no proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.paths import Branch
from fx_fusion.proof.reference import Reference
from fx_fusion.proof.region_function import TOLERANCE, Probe, relative_difference

#: Scales of data and of operands in float64: around one, where eps dominates, and where it vanishes; zero, where a
#: constant added on the way is all that is left, however small; and far out, where it is a term of higher order.
SCALES = ((1.0, 1.0), (1e-4, 1.0), (1e4, 1.0), (0.0, 1.0), (1e15, 1e30))


def sample(probe: Probe, reference: Reference, generator: torch.Generator) -> float:
    """The largest relative difference in float64 over all samples.

    Raises:
        Decline: ``proof.not_analytic`` for a step that samples tell nothing about, ``proof.mismatch`` with the
            difference and the scale at which it showed.
    """
    check_analytic(probe.branch)
    worst = 0.0
    for scale, leaf_scale in SCALES:
        data = scale * torch.randn(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
        leaves = signed(probe.random_leaves(generator), generator)
        leaves = {leaf: leaf_scale * value for leaf, value in leaves.items()}
        difference = relative_difference(probe.run(data, leaves), reference.run(data, leaves))
        if not difference < TOLERANCE:
            found = (
                f"in float64 the region and the fused operation differ by {difference:.1e} on input of scale {scale:g}"
            )
            raise Decline("proof.mismatch", found, [probe.branch.out])
        worst = max(worst, difference)
    return worst


def signed(leaves: Mapping[Node, torch.Tensor], generator: torch.Generator) -> dict[Node, torch.Tensor]:
    """Both signs occur in weights and angles."""
    return {
        leaf: value * (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1)
        for leaf, value in leaves.items()
    }  # fmt: skip


def check_analytic(branch: Branch) -> None:
    """Raise Decline ``proof.not_analytic`` unless every step of `branch` is analytic."""
    for node in branch.nodes:
        if not operations.is_analytic(node):
            found = f"{node} ({node.target}) is not known to be analytic: samples cannot prove it"
            raise Decline("proof.not_analytic", found, [node])
        if node.target in operations.ROOTS:
            check_root(node)


def check_root(node: Node) -> None:
    """A root (or a power that is one) is analytic only while its argument is positive.

    Under RMSNorm that is a sum over the lanes plus eps. Without the sum, ``sqrt(x * x)`` is ``|x|`` and can spell a
    clamp that random data never reaches.
    """
    if not operations.takes_root(node):
        return
    argument = node.args[0]
    while isinstance(argument, Node) and argument.target not in operations.REDUCTIONS:
        if not (_is_shift_or_scale(argument) or operations.is_movement(argument) or operations.is_cast(argument)):
            break
        argument = argument.args[0]
    if not isinstance(argument, Node) or argument.target not in operations.REDUCTIONS or _reduced(argument) < 2:
        found = f"{node} takes a root of something that is not a sum over lanes plus a constant"
        raise Decline("proof.not_analytic", found, [node])


def _is_shift_or_scale(node: Node) -> bool:
    return node.target in operations.AFFINE and isinstance(node.args[0], Node) and not isinstance(node.args[1], Node)


def _reduced(node: Node) -> int:
    """How many elements each sum of the reduction takes."""
    before: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    given: Any = node.args[1] if len(node.args) > 1 else None
    dims: list[int] = given or list(range(before.dim()))
    sizes = [before.shape[dim] for dim in dims] if before.dim() else []
    return torch.Size(size for size in sizes if isinstance(size, int)).numel() if sizes else 1
