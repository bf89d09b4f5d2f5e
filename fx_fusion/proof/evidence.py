"""What is known of a region that passed: proved, or sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.proof.field import Proved


@dataclass(frozen=True)
class Sampled:
    """The region agrees with the reference on random floats, and holds a step that cannot be compared exactly.

    Attributes:
        difference: the largest in float64, relative to the largest value.
        step: the operation without a meaning in a finite field.
        nodes: where it stands.
    """

    difference: float
    step: str
    nodes: tuple[Node, ...] = ()


Evidence = Proved | Sampled


def weakest(parts: Sequence[Evidence]) -> Evidence:
    """Of a whole whose parts are known by `parts`: their chances of error add up."""
    sampled = [part for part in parts if isinstance(part, Sampled)]
    if sampled:
        return replace(sampled[0], difference=max(part.difference for part in sampled))
    proved = [part for part in parts if isinstance(part, Proved)]
    return Proved(
        bits=math.floor(-math.log2(math.fsum(2.0**-part.bits for part in proved))),
        trials=min(part.trials for part in proved),
        degree=max(part.degree for part in proved),
        literals={literal: number for part in proved for literal, number in part.literals.items()},
    )


def require(evidence: Evidence | float, trust: str) -> None:
    """Raise Decline ``proof.sampled`` if `evidence` is less than `trust` asks for. A difference alone is accepted."""
    if trust == "sampled" or not isinstance(evidence, Sampled):
        return
    found = (
        f"{evidence.step} has no meaning in a finite field, so the region was sampled and not proved; write it with "
        "sums, products, quotients and square roots, or accept samples by the option fx_fusion.trust='sampled'"
    )
    raise Decline("proof.sampled", found, evidence.nodes)
