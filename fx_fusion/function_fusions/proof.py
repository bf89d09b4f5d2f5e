"""A place and its pattern, compared on samples of many scales."""

from __future__ import annotations

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.agreement import pattern_side, region_side, same
from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.domain import TOLERANCE
from fx_fusion.function_fusions.equivalence import Comparison
from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.misses import Miss
from fx_fusion.function_fusions.numbers import literals_of
from fx_fusion.function_fusions.place import Place
from fx_fusion.function_fusions.samples import Sampler
from fx_fusion.function_fusions.tracer import Spelled, respelled
from fx_fusion.graph.analysis import Facts
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional


def prove(facts: Facts, place: Place, pattern: Functional, sizes: Sizes) -> float:
    """The largest relative difference in float64 between region and pattern, over all samples, at `sizes`.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the sample, ``proof.not_analytic``.
    """
    side = region_side(Ground.of(facts), place.tensors, place.results, sizes)
    mine, theirs = literals_of(place.nodes), literals_of(pattern.nodes)
    spelled = Spelled(pattern, Steps(pattern.graph.nodes), respelled(filter(_is_float, theirs), mine))
    comparison = Comparison(side, pattern_side(spelled, pattern.results, side))
    literals = [float(x) for x in (*mine, *theirs)]
    worst = 0.0
    for name, values, domain in Sampler(pattern, 4, literals, _turns(comparison), same(place.tensors)):
        difference, where = comparison.difference(values, domain)
        if not difference < TOLERANCE:
            found = f"in float64 {{0}} and the pattern differ by {difference:.1e} on {name}"
            raise Miss("proof.mismatch", found, [where])
        worst = max(worst, difference)
    untold = set(range(len(place.results))) - comparison.told
    if untold:
        raise Decline("proof.mismatch", "on no sample is there a value to compare", [place.results[min(untold)]])
    return worst


def _turns(comparison: Comparison) -> bool:
    """Is there a sine or cosine?"""
    turning = (aten.sin.default, aten.cos.default)
    return any(step.target in turning for side in (comparison.region, comparison.pattern) for step in side.steps)


def _is_float(value: object) -> bool:
    return type(value) is float
