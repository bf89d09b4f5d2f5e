"""One line about a model: how many of its layers run the fused call, by which kernel, and why others do not.

Layers are counted as they run, in vLLM's own warm-up: that tells the same of a graph that was compiled, and of one that
a warm cache supplied. Reasons come from the reports of the graphs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fx_fusion.engines.vllm.cache_views import stores_here
from fx_fusion.engines.vllm.names import Attention
from fx_fusion.engines.vllm.operation import SEEN
from fx_fusion.report import REPORTS

#: Of a graph that stores nothing, or that no fusion was to look at.
_SILENT = ("store.missing", "report.missing")


def start_watching() -> dict[str, int]:
    """From now on a layer's calls count; what to give :meth:`Summary.of`."""
    SEEN.clear()
    return REPORTS.snapshot()


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        model: the architecture.
        layers: names of the layers that store keys and values by an operation of their own.
        fused: those of them that ran the fused call.
        kernels: what ran.
        reasons: what the reports say about the others, the most frequent first; and what backends stored themselves.
    """

    model: str
    layers: tuple[str, ...]
    fused: tuple[str, ...]
    kernels: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def missing(self) -> int:
        return len(self.layers) - len(self.fused)

    @staticmethod
    def of(config: Any, before: dict[str, int]) -> Summary:
        """Of the model of this `config`, whose graphs were compiled, or loaded, since `before`."""
        attention = config.compilation_config.static_forward_context.items()
        layers = tuple(name for name, layer in attention if isinstance(layer, Attention) and stores_here(layer))
        fused = tuple(name for name in layers if name in SEEN)
        kernels = dict.fromkeys(SEEN[name].kernel for name in fused)
        reasons = Counter(
            f"{layer.code}: {layer.reason}"
            for report in REPORTS.since(before)
            for layer in report.layers
            if layer.code is not None and layer.code not in _SILENT
        )
        told = [reason for reason, _ in reasons.most_common()] if len(fused) < len(layers) else []
        told += [why for why in dict.fromkeys(SEEN[name].why for name in fused) if why is not None]
        return Summary(config.model_config.architecture, layers, fused, tuple(kernels), tuple(told))

    def __str__(self) -> str:
        by = f" ({', '.join(self.kernels)})" if self.kernels else ""
        line = f"fx_fusion: {len(self.fused)} of {len(self.layers)} layers fused{by}, {self.model}"
        if self.missing and not self.reasons:
            line += ". The others' stores are in no graph that was compiled"
        return line + "".join(f"\n  {reason}" for reason in self.reasons)
