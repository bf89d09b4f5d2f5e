"""What happened, layer by layer. A report outlives the compilation: a warm compile cache finds it again by its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fx_fusion.cache_folder import cache_folder
from fx_fusion.decline import IDLE
from fx_fusion.graph.torch_compat import counters

State = Literal["rewritten", "recognised", "declined"]

_COUNTER = "fx_fusion:"


@dataclass(frozen=True)
class LayerReport:
    """One candidate.

    Attributes:
        state: ``rewritten`` (one call now), ``recognised`` (read and proved, but no kernel serves here) or
            ``declined``.
        kernel: what runs, if rewritten.
        read: what was read off, for people.
        reading: the same for programs.
        eligible: for each fast kernel, what its contract objects to (None: it could serve on its platform).
        proof: ``proved`` or ``sampled``; None if declined, and for a user's fusion.
        error_bits: if proved, the chance that the region is another function is below ``2**-error_bits``.
        literals: literals of the region that stand for other numbers in the proof: the float, and for which.
        error: otherwise, the largest relative difference to the fused operation in float64.
        assumed: declared meanings of opaque operations that it rests on, and how each was compared with its operation.
        code, reason, node, source: why not, where; `source` is the user's ``file:line``.
        stage: the furthest that the pass came, if declined (``key, norm``).
        module: whose forward holds the layer (``layers.0.self_attn``), where it has a name.
    """

    fusion: str
    state: State
    kernel: str | None = None
    read: str = ""
    reading: dict[str, Any] = field(default_factory=dict[str, Any])
    eligible: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    proof: str | None = None
    error_bits: int | None = None
    literals: dict[str, str] = field(default_factory=dict[str, str])
    error: float | None = None
    assumed: list[str] = field(default_factory=list[str])
    code: str | None = None
    reason: str | None = None
    node: str | None = None
    source: str | None = None
    module: str | None = None
    stage: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The former name of `reading`."""
        return self.reading

    def __str__(self) -> str:
        if self.state == "declined":
            stage = f" (reached: {self.stage})" if self.stage else ""
            place = f"\n      at {self.source}{stage}" if self.source else ""
            return f"declined    {self.code}: {self.reason}{place}"
        kernel = f" by {self.kernel}" if self.kernel else ""
        why = f"\n      {self.code}: {self.reason}" if self.code else ""
        assumed = "".join(f"\n      assumed: {meaning}" for meaning in self.assumed)
        return f"{self.state}{kernel}    {self.read}; {self.proof_words}{assumed}{why}"

    @property
    def proof_words(self) -> str:
        """What is known of a layer that was read."""
        if self.proof == "proved":
            stands = "".join(f", up to {literal} = {number}" for literal, number in self.literals.items())
            return f"proved (error below 2^-{self.error_bits}){stands}"
        return f"{'sampled' if self.proof else 'proved'}, error {self.error:.1e}"


@dataclass(frozen=True)
class FusionReport:
    """One compiled graph.

    Attributes:
        layers: every candidate, in graph order, and what could be none.
        stores: how many inputs the graph writes in place; 0 if none of them is a cache.
        nodes: size of the graph before the pass.
        kernel: the kernel asked for.
        seconds: time spent in the pass (``reading`` includes the proof).
    """

    layers: tuple[LayerReport, ...]
    stores: int
    nodes: int
    kernel: str
    seconds: dict[str, float]

    @property
    def fused(self) -> list[LayerReport]:
        """Layers that are one call in the compiled graph."""
        return [layer for layer in self.layers if layer.state == "rewritten"]

    @property
    def recognised(self) -> list[LayerReport]:
        """Layers that were read and proved, rewritten or not."""
        return [layer for layer in self.layers if layer.state != "declined"]

    @property
    def declined(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.state == "declined"]

    def eligible(self, kernel: str) -> list[LayerReport]:
        """Recognised layers that the contract of `kernel` (``aiter``, ``triton``) admits."""
        return [layer for layer in self.recognised if layer.eligible.get(kernel, "unknown") is None]

    @property
    def concerns(self) -> bool:
        """Is there anything in the graph for a fusion to do: a cache store, or a place that a fusion looked at?"""
        return self.stores > 0 or any(layer.code not in IDLE for layer in self.layers)

    @property
    def id(self) -> str:
        """Names the report's content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:24]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> FusionReport:
        content = json.loads(text)
        content["layers"] = tuple(_layer(**layer) for layer in content["layers"])
        return FusionReport(**content)

    def __str__(self) -> str:
        total = len(self.layers)
        lines = [f"fx_fusion: {len(self.fused)} of {total} layers fused, {len(self.recognised)} recognised"]
        lines[0] += f" (kernel={self.kernel}, {self.nodes} nodes, {self.seconds.get('total', 0.0):.2f} s)"
        for first, last, layer in runs(self.layers):
            name = f"{first}" if first == last else f"{first}-{last}"
            lines.append(f"  {name:>5}  {layer}")
        return "\n".join(lines)


def _layer(facts: dict[str, Any] | None = None, **content: Any) -> LayerReport:
    """Of a report's content; `reading` had another name once."""
    return LayerReport(**content) if facts is None else LayerReport(reading=facts, **content)


def runs(layers: Sequence[LayerReport]) -> list[tuple[int, int, LayerReport]]:
    """(first, last, what both are): neighbours that read the same are shown once."""
    found: list[tuple[int, int, LayerReport]] = []
    for i, layer in enumerate(layers):
        if found and str(found[-1][2]) == str(layer):
            found[-1] = (found[-1][0], i, layer)
        else:
            found.append((i, i, layer))
    return found


class Reports:
    """Reports of this process and of the compile cache.

    Inductor stores what a pass adds to ``counters["inductor"]`` with the compiled graph, and adds it again when a
    warm cache supplies the graph without running the pass. So a counter's name carries the id of a report file that
    lies beside the cache.
    """

    def __init__(self) -> None:
        self._known: dict[str, FusionReport] = {}
        self._latest: FusionReport | None = None
        self._seen: dict[str, int] = {}

    def publish(self, report: FusionReport) -> None:
        """Called by the pass."""
        path = cache_folder() / f"{report.id}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{id(report)}.partial")
            partial.write_text(report.to_json())
            partial.replace(path)
        self._known[report.id] = report
        counters["inductor"][_COUNTER + report.id] += 1
        self._accept(report)
        self._seen = self.snapshot()

    def clear(self) -> None:
        """Forget what was compiled so far, as :func:`last_report` sees it."""
        self._latest = None
        self._seen = self.snapshot()

    def snapshot(self) -> dict[str, int]:
        """How often each report's graph was compiled or loaded so far."""
        return {name: count for name, count in counters["inductor"].items() if name.startswith(_COUNTER)}

    def since(self, before: dict[str, int]) -> list[FusionReport]:
        """Reports of the graphs that were compiled, or loaded from a cache, since `before`."""
        now = self.snapshot()
        return [self._load(name.removeprefix(_COUNTER)) for name in now if now[name] > before.get(name, 0)]

    def latest(self) -> FusionReport | None:
        """The latest report of a graph with a cache store; failing that, the latest of all."""
        for report in self.since(self._seen):
            self._accept(report)
        self._seen = self.snapshot()
        return self._latest

    def _accept(self, report: FusionReport) -> None:
        if report.concerns or self._latest is None or not self._latest.concerns:
            self._latest = report

    def _load(self, report_id: str) -> FusionReport:
        if report_id not in self._known:
            path = cache_folder() / f"{report_id}.json"
            if not path.exists():
                missing = LayerReport(
                    "unknown", "declined", code="report.missing", reason=f"the report file {path} is gone"
                )
                return FusionReport((missing,), stores=0, nodes=0, kernel="unknown", seconds={})
            self._known[report_id] = FusionReport.from_json(path.read_text())
        return self._known[report_id]


REPORTS = Reports()


def last_report() -> FusionReport | None:
    """The report of the latest compiled graph that held a cache store, or None before any compilation.

    It is also there when a warm compile cache supplied the graph and the pass did not run.
    """
    return REPORTS.latest()
