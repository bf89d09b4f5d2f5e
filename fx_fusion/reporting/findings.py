"""What each reader found of a layer, in words, from the readings of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fx_fusion.patterns.qk_norm_rope_cache.reading import Reading, of_report
from fx_fusion.report import LayerReport


class Finding(NamedTuple):
    """`role` is the part of the graph that it is about: see :class:`fx_fusion.fusion.NodeRole`."""

    role: str
    reader: str
    words: str


def findings(layer: LayerReport) -> list[Finding]:
    """In the order in which the readers ask. Of a fusion that reads other things, those in general."""
    if layer.state == "declined":
        return []
    prologue = of_report(layer)
    reads = _any(layer.reading) if prologue is None else _of_prologue(prologue)
    return [*reads, *_verdicts(layer)]


def _any(reading: Mapping[str, Any]) -> Iterator[Finding]:
    for name, value in reading.items():
        yield Finding("region", name, str(value))


def _of_prologue(reading: Reading) -> Iterator[Finding]:
    columns = "; ".join(f"{name}: {words}" for name, words in reading.columns.items())
    yield Finding("split", "split", f"{reading.projection} projection; {columns}")
    yield Finding("norm", "RMSNorm", _norm(reading.norm))
    lanes = f"{reading.rotary_dim} of {reading.head_dim} lanes, {reading.rope} pairs"
    yield Finding("rope", "rotation", lanes)
    yield Finding("lookup", "angles", _angles(reading))
    computed = ", computed in the graph" if reading.index_arithmetic else ""
    size, stride = ", ".join(reading.cache_size), ", ".join(reading.cache_stride)
    words = f"[{size}] with strides [{stride}], by {reading.addressed_by}{computed}; {reading.cache_dtype}"
    yield Finding("store", "cache store", words)
    if reading.return_k:
        yield Finding("store", "fresh key", "the rotated key is used besides its store, so the call returns it too")


def _norm(norm: Mapping[str, Any] | None) -> str:
    if norm is None:
        return "none: the heads are rotated as projected"
    q, k = norm["q_eps"], norm["k_eps"]
    eps = f"eps {q:g}" if q == k and q is not None else f"eps {q} of q, {k} of k"
    return f"each head alone, {eps}, times {'1 + weight' if norm['gemma'] else 'weight'}"


def _angles(reading: Reading) -> str:
    if reading.angles != "table":
        return "cosine and sine rows, one a token"
    if reading.mrope_section:
        order = "interleaved" if reading.mrope_interleaved else "sectioned"
        return f"a table, looked up by three axes of positions: mRoPE {reading.mrope_section} {order}"
    return f"a table, looked up by {len(set(reading.axes or [0]))} axis of positions"


def _verdicts(layer: LayerReport) -> Iterator[Finding]:
    yield Finding("data", "proof", _proof(layer))
    for kernel, reason in layer.eligible.items():
        yield Finding("call", f"kernel {kernel}", "could serve" if reason is None else f"cannot: {reason}")


def _proof(layer: LayerReport) -> str:
    if layer.proof == "proved":
        return f"the same function as the fused call, {layer.proof_words}; it rounds alike, row by row"
    difference = f"; largest difference {layer.error:.0e}" if layer.error else ""
    return f"equal to the fused call on samples in float64{difference}"
