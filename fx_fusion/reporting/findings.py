"""What each reader found of a layer, in words, from the facts of a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fx_fusion.report import LayerReport


class Finding(NamedTuple):
    """`role` is the part of the graph that it is about: see :class:`fx_fusion.fusion.NodeRole`."""

    role: str
    reader: str
    words: str


def findings(layer: LayerReport) -> list[Finding]:
    """In the order in which the readers ask. Of a fusion that keeps other facts, those in general."""
    if layer.state == "declined":
        return []
    reads = (
        _of_prologue(layer.facts) if {"columns", "rotary_dim", "cache_size"} <= set(layer.facts) else _any(layer.facts)
    )
    return [*reads, *_verdicts(layer)]


def _any(facts: dict[str, Any]) -> Iterator[Finding]:
    for name, value in facts.items():
        yield Finding("region", name, str(value))


def _of_prologue(facts: dict[str, Any]) -> Iterator[Finding]:
    columns = "; ".join(f"{name}: {words}" for name, words in facts["columns"].items())
    yield Finding("split", "split", f"{facts['projection']} projection; {columns}")
    yield Finding("norm", "RMSNorm", _norm(facts["norm"]))
    lanes = f"{facts['rotary_dim']} of {facts['head_dim']} lanes, {facts['rope']} pairs"
    yield Finding("rope", "rotation", lanes)
    yield Finding("lookup", "angles", _angles(facts))
    computed = ", computed in the graph" if facts["index_arithmetic"] else ""
    size, stride = ", ".join(facts["cache_size"]), ", ".join(facts["cache_stride"])
    words = f"[{size}] with strides [{stride}], by {facts['addressed_by']}{computed}; {facts['cache_dtype']}"
    yield Finding("store", "cache store", words)
    if facts["return_k"]:
        yield Finding("store", "fresh key", "the rotated key is used besides its store, so the call returns it too")


def _norm(norm: dict[str, Any] | None) -> str:
    if norm is None:
        return "none: the heads are rotated as projected"
    q, k = norm["q_eps"], norm["k_eps"]
    eps = f"eps {q:g}" if q == k and q is not None else f"eps {q} of q, {k} of k"
    return f"each head alone, {eps}, times {'1 + weight' if norm['gemma'] else 'weight'}"


def _angles(facts: dict[str, Any]) -> str:
    if facts["angles"] != "table":
        return "cosine and sine rows, one a token"
    if facts["mrope_section"]:
        order = "interleaved" if facts["mrope_interleaved"] else "sectioned"
        return f"a table, looked up by three axes of positions: mRoPE {facts['mrope_section']} {order}"
    return f"a table, looked up by {len(set(facts['axes'] or [0]))} axis of positions"


def _verdicts(layer: LayerReport) -> Iterator[Finding]:
    error = f"; largest difference {layer.error:.0e}" if layer.error else ""
    yield Finding("data", "proof", f"every step is analytic, and equal to the fused call in float64{error}")
    for kernel, reason in layer.eligible.items():
        yield Finding("call", f"kernel {kernel}", "could serve" if reason is None else f"cannot: {reason}")
