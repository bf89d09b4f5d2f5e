"""Is it the same function? Values exactly, rounding row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.proof.evidence import Evidence, Sampled
from fx_fusion.proof.field import Comparison, Differs, NotEvaluable, compare
from fx_fusion.proof.field.draw import needed_square, scaled_to_squares
from fx_fusion.proof.field.residues import Residues
from fx_fusion.proof.floats import check_rounding
from fx_fusion.proof.reference import Reference
from fx_fusion.proof.region_function import Probe
from fx_fusion.proof.samples import sample


def prove(probe: Probe, reference: Reference, generator: torch.Generator) -> Evidence:
    """What is known of the region: that it is the reference, or that it agrees with it on samples.

    Raises:
        Decline: ``proof.mismatch`` if it is another function or rounds otherwise, ``proof.degree``, and what
            :func:`~fx_fusion.proof.samples.sample` raises.
    """
    verdict = compare(_comparison(probe, reference))
    if isinstance(verdict, Differs):
        raise Decline("proof.mismatch", verdict.found, [*verdict.sites, probe.branch.out])
    if isinstance(verdict, NotEvaluable) and verdict.too_high:
        raise Decline("proof.degree", f"the region computes a polynomial of {verdict.what}", [probe.branch.out])
    evidence = _sampled(probe, reference, verdict, generator) if isinstance(verdict, NotEvaluable) else verdict
    check_rounding(probe, reference, generator)
    return evidence


def _sampled(probe: Probe, reference: Reference, verdict: NotEvaluable, generator: torch.Generator) -> Sampled:
    return Sampled(sample(probe, reference, generator), verdict.what, verdict.sites)


def _comparison(probe: Probe, reference: Reference) -> Comparison:
    data = probe.branch.data

    def region(inputs: Any, at: Callable[[Any], None]) -> Tensor:
        return probe.run(inputs[data], {leaf: inputs[leaf] for leaf in probe.leaves}, at=at)

    def expected(inputs: Any) -> Tensor:
        return reference.run(inputs[data], {leaf: inputs[leaf] for leaf in probe.leaves})

    def with_roots(field: Residues, values: dict[Any, Tensor], fresh: Callable[..., Tensor]) -> None:
        rows = values[data][:, reference.columns]
        values[data][:, reference.columns] = scaled_to_squares(field, rows, reference.eps or 0.0, fresh)

    shapes = {data: (probe.tokens, probe.columns), **{leaf: probe.leaf_shape(leaf) for leaf in probe.leaves}}
    plain = Comparison(region, expected, shapes, text=_text(probe.branch.nodes))
    if reference.eps is None:
        return plain
    return replace(plain, prepare=with_roots, squares={needed_square(reference.eps)}, never={reference.eps})


def _text(nodes: tuple[Node, ...]) -> str:
    return "; ".join(
        f"{node} = {node.target}{node.args}{node.kwargs}" for node in nodes if not operations.is_symbolic(node)
    )
