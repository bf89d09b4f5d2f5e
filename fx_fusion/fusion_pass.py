"""The pass: find, read and prove, check, choose a kernel, rewrite, report. Each arrow goes down."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import custom_graph_pass
from torch._logging import trace_structured
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

from fx_fusion import config as configuration
from fx_fusion.config import Config
from fx_fusion.decline import Decline, first_source_line, module_path, reaching
from fx_fusion.fusion import REGISTRY, Fusion
from fx_fusion.graph import tidy
from fx_fusion.graph.analysis import Facts
from fx_fusion.kernels.dispatch import KernelUnavailable
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.qk_norm_rope_cache.insert import fused_calls
from fx_fusion.kernels.target import Target
from fx_fusion.kernels.versions import aiter_version, triton_version
from fx_fusion.observer import NOBODY, Observer
from fx_fusion.report import REPORTS, FusionReport, LayerReport
from fx_fusion.semantics import hidden_stores
from fx_fusion.semantics.declare import MEANINGS
from fx_fusion.semantics.hidden_stores import stand_in
from fx_fusion.semantics.inline import Inlined, inline

#: Told whether the graph is for inference, where this version of torch tells a pass.
_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
_Base: Any = _InferenceAware or custom_graph_pass.CustomGraphPass

log = logging.getLogger(__name__)

_rewrites_done = 0


class FusionPass(_Base):
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
        registered = REGISTRY.fingerprint()
        declared = MEANINGS.fingerprint()
        if before is None or registered is None or declared is None or configuration.fuel() is not None:
            return None
        versions = triton_version(), aiter_version()
        settings = repr(self._config), configuration.disabled(), tuned.fingerprint(), hidden_stores.fingerprint()
        return ("fx_fusion", _source_hash(), versions, registered, declared, settings, before)


def _call(graph_pass: Any, graph: Graph, is_inference: bool | None) -> None:
    for each in graph_pass if isinstance(graph_pass, (list, tuple)) else [graph_pass]:
        if _InferenceAware is not None and isinstance(each, _InferenceAware):
            each(graph, is_inference)
        else:
            each(graph)


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
    layers: list[LayerReport] = []
    mutated = sum(1 for node in graph.nodes if node.target is torch.ops.aten.copy_.default)
    refusal = _refuse_graph(training)
    observer.starts(graph)
    rewriting = 0.0
    if refusal is not None:
        layers.append(_declined("graph", refusal))
    else:
        # Readers compute with real tensors, whatever mode the caller traces in (fake tensors, a default device).
        with _disable_current_modes(), cpu_by_default(), torch.no_grad():
            stand_ins = stand_in(graph)
            inlined = inline(graph, stand_ins)
            for fusion in REGISTRY:
                done, spent = _apply_fusion(graph, fusion, config, observer, inlined)
                layers.extend(done)
                rewriting += spent
            layers = _with_meanings(layers, inlined)
            rewritten = any(layer.state == "rewritten" for layer in layers)
            inlined.restore(rewritten=rewritten)
            if rewritten:
                tidy.finish(graph)
            stand_ins.settle(fused_calls(graph))
            mutated += 2 * len(stand_ins) + len(inlined.hidden_stores or inlined.hidden_attention)
    stores = 0 if any(layer.code == "store.missing" for layer in layers) else mutated
    if len(layers) > 1:
        layers = [layer for layer in layers if layer.code != "store.missing"]
    total = time.perf_counter() - started
    seconds = {"total": total, "rewriting": rewriting, "reading": total - rewriting}
    report = FusionReport(tuple(layers), stores, nodes, config.kernel, seconds)
    observer.ends(graph, report)
    _announce(report)
    return report


def cpu_by_default() -> contextlib.AbstractContextManager[Any]:
    """A device context costs on every call, so there is one only where the default device is another."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _refuse_graph(training: bool) -> Decline | None:
    if configuration.disabled():
        return Decline("graph.disabled", "FX_FUSION_DISABLE is set")
    if training:
        return Decline("graph.training", "the graph saves values for a backward pass; run it under torch.no_grad()")
    return None


def _with_meanings(layers: list[LayerReport], inlined: Inlined) -> list[LayerReport]:
    """`layers`, and what kept operations opaque, each reason once. A store that is hidden in one is not missing, and
    what an operation writes is told once.
    """
    reasons = [*inlined.declined, *inlined.hidden_stores]
    missing = any(layer.code == "store.missing" for layer in layers)
    if missing and not inlined.hidden_stores:
        reasons += inlined.hidden_attention
    declined = {(decline.code, decline.found): _declined("meaning", decline) for decline in reversed(reasons)}
    if any(layer.code == "meaning.hidden" for layer in declined.values()):
        layers = [layer for layer in layers if layer.code != "store.missing"]
    refused = {str(node) for decline in reasons for node in decline.nodes}
    layers = [layer for layer in layers if layer.code != "store.unknown_writer" or layer.node not in refused]
    return [*layers, *reversed(declined.values())]


def _apply_fusion(
    graph: Graph, fusion: Fusion, config: Config, observer: Observer, inlined: Inlined
) -> tuple[list[LayerReport], float]:
    facts = Facts(graph)
    try:
        candidates, impossible = fusion.find(facts)
    except Exception as error:
        return [_declined(fusion.name, _internal(error, config))], 0.0
    memo: dict[object, Any] = {}
    layers: list[LayerReport] = []
    matches: list[tuple[int, Any, str]] = []
    for candidate in candidates:
        layer, match = _read(facts, fusion, candidate, memo, config, inlined)
        if layer.state == "rewritten":
            matches.append((len(layers), match, str(layer.kernel)))
        layers.append(layer)
        observer.reads(fusion, facts, candidate, match, layer)
    refused = [_declined(fusion.name, decline) for decline in impossible]
    for layer in refused:
        observer.reads(fusion, facts, None, None, layer)
    started = time.perf_counter()
    for position, match, kernel in matches:
        try:
            fusion.rewrite(graph, match, kernel)
            observer.rewrites(layers[position], graph)
        except Exception as error:
            layers[position] = _declined(fusion.name, _internal(error, config))
    if matches:
        tidy.sort(graph)
    spent = time.perf_counter() - started
    layers.extend(refused)
    return layers, spent


def _read(
    facts: Facts, fusion: Fusion, candidate: Any, memo: dict[object, Any], config: Config, inlined: Inlined
) -> tuple[LayerReport, Any]:
    try:
        match = fusion.read(facts, candidate, memo)
        words, data, error = fusion.describe(match)
        eligible = fusion.eligible(match)
        with reaching("placement"):
            fusion.check(facts, match)
            stores = getattr(fusion, "stores", None)  # not every fusion writes a cache
            if stores is not None:
                inlined.check_stores(facts.live, *stores(match))
    except Decline as decline:
        return _declined(fusion.name, decline, candidate.anchor), None
    except Exception as error_:
        return _declined(fusion.name, _internal(error_, config), candidate.anchor), None
    read = LayerReport(
        fusion.name,
        "recognised",
        read=words,
        facts=data,
        eligible=eligible,
        error=error,
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


def _spend_fuel() -> None:
    global _rewrites_done
    limit = configuration.fuel()
    if limit is not None and _rewrites_done >= limit:
        raise Decline("graph.fuel", f"FX_FUSION_FUEL={limit} allows no further rewrite")
    _rewrites_done += 1


def _internal(error: Exception, config: Config) -> Decline:
    if config.strict or isinstance(error, KernelUnavailable):
        raise error
    log.warning("fx_fusion: a reader raised, the layer stays unfused", exc_info=error)
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
