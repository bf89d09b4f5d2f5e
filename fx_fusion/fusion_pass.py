"""The pass: find, read and prove, check, choose a kernel, rewrite, report. Each arrow goes down."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion import config as configuration
from fx_fusion.config import Config
from fx_fusion.decline import IDLE, OPAQUE, Decline, first_source_line, module_path, reaching
from fx_fusion.fingerprint import Unreadable, fingerprint
from fx_fusion.fusion import REGISTRY, AnyFusion, Candidate
from fx_fusion.graph import tidy, transaction
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.torch_compat import (
    GraphPass,
    InferenceAwarePass,
    counters,
    disable_current_modes,
    sort_topologically,
    trace_structured,
)
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.operation import OPERATIONS, KernelUnavailable
from fx_fusion.kernels.qk_norm_rope_cache.fused_calls import fused_calls
from fx_fusion.kernels.target import Target
from fx_fusion.observer import NOBODY, Observer
from fx_fusion.proof.evidence import Evidence, Sampled, require
from fx_fusion.proof.field import Proved
from fx_fusion.report import REPORTS, FusionReport, LayerReport
from fx_fusion.semantics import hidden_stores
from fx_fusion.semantics.declare import MEANINGS
from fx_fusion.semantics.hidden_stores import stand_in
from fx_fusion.semantics.inline import Inlined, inline

log = logging.getLogger(__name__)

_rewrites_done = 0


class FusionPass(GraphPass):
    """An Inductor graph pass: ``torch.compile(m, options={"post_grad_custom_pre_pass": FusionPass()})``.

    Args:
        config: what to do; by default the fastest kernel that serves, as ``FX_FUSION_KERNEL`` may override.
        before: a pass that already holds the hook; it runs first.
        observer: who is told of every step (``explain`` in detail).
    """

    def __init__(self, config: Config | None = None, before: Any = None, observer: Observer = NOBODY) -> None:
        self._observer = observer
        self._config = config or Config(kernel=configuration.kernel_from_environment())
        self._before = before

    def __call__(self, graph: Graph, is_inference: bool | None = None) -> None:
        if self._before is not None:
            _call(self._before, graph, is_inference)
        training = not is_inference if is_inference is not None else _saves_for_backward(graph)
        REPORTS.publish(apply(graph, self._config, training=training, observer=self._observer))

    def uuid(self) -> Any:
        """Changes with everything that the result depends on; None (no caching) while that cannot be told."""
        before = self._before.uuid() if self._before is not None else ()
        registered, kernels, declared = REGISTRY.fingerprint(), _kernels_fingerprint(), MEANINGS.fingerprint()
        if None in (before, registered, kernels, declared) or configuration.fuel() is not None:
            return None
        settings = repr(self._config), configuration.disabled(), tuned.fingerprint(), hidden_stores.fingerprint()
        return ("fx_fusion", _source_hash(), kernels, registered, declared, settings, before)


def _call(graph_pass: Any, graph: Graph, is_inference: bool | None) -> None:
    for each in graph_pass if isinstance(graph_pass, (list, tuple)) else [graph_pass]:
        if InferenceAwarePass is not None and isinstance(each, InferenceAwarePass):
            each(graph, is_inference)
        else:
            each(graph)


def _kernels_fingerprint() -> tuple[tuple[str, str | None, str], ...] | None:
    """Name, version and code of every kernel of every operation; None if some code cannot be read."""
    kernels = [each for operation in OPERATIONS.values() for each in operation]
    try:
        return tuple((each.name, each.version(), fingerprint(each)) for each in kernels)
    except Unreadable:
        return None


def _saves_for_backward(graph: Graph) -> bool:
    """A training graph, as far as the graph itself shows: AOTAutograd names the inputs of its two halves."""
    return any(
        node.op == "placeholder" and str(node.target).startswith(("primals", "tangents")) for node in graph.nodes
    )


def _sources() -> list[Path]:
    """Every module of the package; `patterns` and `kernels` may be links, so links are followed."""
    found = os.walk(Path(__file__).parent, followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in found for name in names if name.endswith(".py"))


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def apply(graph: Graph, config: Config, *, training: bool = False, observer: Observer = NOBODY) -> FusionReport:
    """Apply every registered fusion to `graph`, in place.

    Raises:
        KernelUnavailable: ``config.kernel`` names a kernel that cannot serve a layer.
        Exception: whatever a reader raised, under ``config.strict``.
    """
    started = time.perf_counter()
    nodes = len(graph.nodes)
    stores = sum(1 for node in graph.nodes if node.target is torch.ops.aten.copy_.default)
    refusal = _refuse_graph(training)
    observer.starts(graph)
    done = _Applied()
    if refusal is not None:
        done.layers.append(_declined("graph", refusal))
    else:
        # Readers compute with real tensors, whatever mode the caller traces in (fake tensors, a default device).
        # In inference mode composite operations would stay whole, and mean nothing to whoever counts on their parts.
        with disable_current_modes(), cpu_by_default(), torch.inference_mode(False), torch.no_grad():
            stand_ins = stand_in(graph)
            inlined = inline(graph, stand_ins)
            for fusion in REGISTRY:
                _apply_fusion(graph, fusion, config, observer, inlined, done)
            hidden = _tell_of_semantics(done, inlined)
            stores = 0 if done.absent else stores + hidden + 2 * len(stand_ins)
            rewritten = any(layer.state == "rewritten" for layer in done.layers)
            inlined.restore(rewritten=rewritten)
            if rewritten:
                tidy.finish(graph)
            stand_ins.settle(fused_calls(graph))
    total = time.perf_counter() - started
    seconds = {"total": total, "rewriting": done.rewriting, "reading": total - done.rewriting}
    report = FusionReport(tuple(done.told), stores, nodes, config.kernel, seconds)
    observer.ends(graph, report)
    _announce(report)
    return report


@dataclass
class _Applied:
    """What came of fusions: `layers`, what those say that found nothing (`absent`), and seconds of `rewriting`."""

    layers: list[LayerReport] = field(default_factory=list[LayerReport])
    absent: list[LayerReport] = field(default_factory=list[LayerReport])
    rewriting: float = 0.0

    @property
    def told(self) -> list[LayerReport]:
        """For the report: that nothing was found is told where no fusion says more than that there is nothing."""
        says_more = any(layer.code not in IDLE for layer in self.layers)
        return self.layers if says_more else [*self.absent, *self.layers]


def cpu_by_default() -> contextlib.AbstractContextManager[Any]:
    """A device context costs on every call, so there is one only where the default device is another."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _refuse_graph(training: bool) -> Decline | None:
    if configuration.disabled():
        return Decline("graph.disabled", "FX_FUSION_DISABLE is set")
    if training:
        return Decline("graph.training", "the graph saves values for a backward pass; run it under torch.no_grad()")
    return None


def _tell_of_semantics(done: _Applied, inlined: Inlined) -> int:
    """Add what kept operations opaque, each reason once, and tell how many of them store out of sight.

    A store that is out of sight is not absent, and why an operation stayed opaque says more than that it did.
    """
    hidden = inlined.hidden_stores or inlined.hidden_attention
    reasons = [*inlined.declined, *(inlined.hidden_stores or (hidden if done.absent else []))]
    refused = {str(node) for decline in reasons for node in decline.nodes}
    declined = {(decline.code, decline.found): _declined("meaning", decline) for decline in reversed(reasons)}
    done.layers = [layer for layer in done.layers if not (layer.code in OPAQUE and layer.node in refused)]
    done.layers += reversed(declined.values())
    done.absent = [] if hidden else done.absent
    return len(hidden)


def _apply_fusion(
    graph: Graph, fusion: AnyFusion, config: Config, observer: Observer, inlined: Inlined, done: _Applied
) -> None:
    analysis = GraphAnalysis(graph)
    try:
        candidates, impossible = fusion.find(analysis)
        absent = None if candidates or impossible else fusion.absent(analysis)
    except Exception as error:
        done.layers.append(_declined(fusion.name, _internal(error, config)))
        return
    memo: dict[object, Any] = {}
    layers: list[LayerReport] = []
    matches: dict[int, tuple[Any, Any]] = {}
    for candidate in candidates:
        layer, match = _read(analysis, fusion, candidate, memo, config, inlined)
        if layer.state == "rewritten":
            matches[len(layers)] = candidate, match
        layers.append(layer)
        observer.reads(fusion, analysis, candidate, match, layer)
    refused = [_declined(fusion.name, decline) for decline in impossible]
    nothing = [] if absent is None else [_declined(fusion.name, absent)]
    for layer in (*refused, *nothing):
        observer.reads(fusion, analysis, None, None, layer)
    started = time.perf_counter()

    def rewrite(position: int) -> None:
        fusion.rewrite(graph, matches[position][1], str(layers[position].kernel))
        observer.rewrites(layers[position], graph)

    edits = {position: functools.partial(rewrite, position) for position in matches}
    failed = transaction.apply_each(graph, edits, one_by_one=observer is not NOBODY)
    for position, error in failed.items():
        layers[position] = _not_rewritten(fusion.name, error, config, matches[position][0].anchor)
    if len(failed) < len(matches):
        sort_topologically(graph)
    done.rewriting += time.perf_counter() - started
    done.layers += [*layers, *refused]
    done.absent += nothing


def _read(
    analysis: GraphAnalysis,
    fusion: AnyFusion,
    candidate: Candidate,
    memo: dict[object, Any],
    config: Config,
    inlined: Inlined,
) -> tuple[LayerReport, Any]:
    try:
        match = fusion.read(analysis, candidate, memo)
        assessed = fusion.assess(match)
        with reaching("proof"):
            require(assessed.known, config.trust)
        with reaching("placement"):
            fusion.check(analysis, match)
            inlined.check_stores(analysis.live, *fusion.stores(match))
    except Decline as decline:
        return _declined(fusion.name, decline, candidate.anchor), None
    except Exception as error:
        return _declined(fusion.name, _internal(error, config), candidate.anchor), None
    read = LayerReport(
        fusion.name,
        "recognised",
        read=assessed.words,
        reading=assessed.reading,
        eligible=assessed.eligible,
        **_shown(assessed.known),
        node=str(candidate.anchor),
        source=first_source_line([candidate.anchor]),
        module=module_path(candidate.anchor),
        assumed=inlined.assumed(match),
    )
    target = Target.parse(config.target) if config.target else Target.of(candidate.anchor.meta["val"].device)
    try:
        kernel = fusion.choose(match, config.kernel, target)
        _spend_fuel()
    except Decline as decline:
        return replace(read, code=decline.code, reason=decline.found, stage="contract"), match
    return replace(read, state="rewritten", kernel=kernel), match


def _shown(evidence: Evidence | float) -> dict[str, Any]:
    """As a report holds it."""
    if isinstance(evidence, Proved):
        literals = {repr(literal): number for literal, number in evidence.literals.items()}
        return {"proof": "proved", "error_bits": evidence.bits, "literals": literals}
    if isinstance(evidence, Sampled):
        return {"proof": "sampled", "error": evidence.difference}
    return {"error": evidence}


def _spend_fuel() -> None:
    global _rewrites_done
    limit = configuration.fuel()
    if limit is not None and _rewrites_done >= limit:
        raise Decline("graph.fuel", f"FX_FUSION_FUEL={limit} allows no further rewrite")
    _rewrites_done += 1


def _not_rewritten(fusion: str, error: Exception, config: Config, anchor: Node) -> LayerReport:
    """What is told of a layer whose rewrite failed, and was undone."""
    decline = error if isinstance(error, Decline) else _internal(error, config)
    decline.reached = decline.reached or "rewrite"
    return _declined(fusion, decline, anchor)


def _internal(error: Exception, config: Config) -> Decline:
    if config.strict or isinstance(error, KernelUnavailable):
        raise error
    log.warning("fx_fusion: a reader or a rewrite raised, the layer stays unfused", exc_info=error)
    return Decline("internal.error", f"{type(error).__name__}: {error}")


def _declined(fusion: str, decline: Decline, anchor: Node | None = None) -> LayerReport:
    nodes = [*decline.nodes, *([anchor] if anchor is not None else [])]
    return LayerReport(
        fusion,
        "declined",
        code=decline.code,
        reason=decline.found,
        node=str(nodes[0]) if nodes else None,
        source=first_source_line(nodes),
        module=next(filter(None, map(module_path, nodes)), None),
        stage=decline.reached or decline.code.split(".")[0],
    )


def _announce(report: FusionReport) -> None:
    counters["fx_fusion"]["graphs"] += 1
    counters["fx_fusion"]["rewritten"] += len(report.fused)
    counters["fx_fusion"]["recognised"] += len(report.recognised)
    for layer in report.declined:
        counters["fx_fusion"][f"declined {layer.code}"] += 1
    log.info("%s", report)
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": "fx_fusion_report", "encoding": "json"}, payload_fn=report.to_json
    )
