"""A place and its pattern, compared on samples of many scales."""

from __future__ import annotations

from fx_fusion.function_fusions.agreement import pattern_side, region_side, sample
from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.equivalence import Comparison
from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.numbers import literals_of
from fx_fusion.function_fusions.place import Place
from fx_fusion.function_fusions.tracer import Spelled, respelled
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional


def prove(analysis: GraphAnalysis, place: Place, pattern: Functional, sizes: Sizes) -> float:
    """The largest relative difference in float64 between region and pattern, over all samples, at `sizes`.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the sample, ``proof.not_analytic``.
    """
    side = region_side(Ground.of(analysis), place.tensors, place.results, sizes)
    written = [number for number in literals_of(pattern.nodes) if isinstance(number, float)]
    spelled = Spelled(pattern, Steps(pattern.graph.nodes), respelled(written, literals_of(place.nodes)))
    comparison = Comparison(side, pattern_side(spelled, pattern.results, side))
    return sample(comparison, pattern, place.nodes, place.tensors, seed=4)
