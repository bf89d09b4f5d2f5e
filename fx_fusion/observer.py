"""Who wants to know what the pass sees, node by node: ``explain`` and ``patch`` do, a compilation does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph

from fx_fusion.fusion import AnyFusion
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.report import FusionReport, LayerReport


class Observer:
    """Told of every step of one application of the pass, in order. These methods do nothing: override what you need.

    Nothing may be changed. Candidates and matches hold nodes of the graph, which the rewriting replaces: take from
    them what is needed before the method returns.
    """

    def names(self, inputs: Sequence[str]) -> None:
        """What the user calls the inputs of the next graph, in order, where that is known."""

    def starts(self, graph: Graph) -> None:
        """Nothing was changed yet."""

    def reads(self, fusion: AnyFusion, analysis: GraphAnalysis, candidate: Any, match: Any, layer: LayerReport) -> None:
        """Nothing changed yet. `match` is None where the layer is declined, and `candidate` where there is none."""

    def rewrites(self, layer: LayerReport, graph: Graph) -> None:
        """One layer was rewritten; its old nodes are still there, unused."""

    def ends(self, graph: Graph, report: FusionReport) -> None:
        """All layers are rewritten, the graph is in order."""


NOBODY = Observer()
