"""What was read off one layer: typed, for the report, for pages and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.fx import Node

from fx_fusion.graph.edit import STAND_IN
from fx_fusion.graph.paths import strip_views
from fx_fusion.graph.sizes import same
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import is_packed_qkv
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, with_typed_caches
from fx_fusion.kernels.qk_norm_rope_cache.mrope import mrope_section
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.stored import Stored
from fx_fusion.patterns.qk_norm_rope_cache.match import Match
from fx_fusion.report import LayerReport

#: Where a cache only stands for one that an operation finds when it runs.
BY_NAME = "a layer's name"


@dataclass(frozen=True)
class Reading:
    """One layer, as a report keeps it: everything is a JSON value.

    Attributes:
        projection: ``packed`` (q, k, v side by side and nothing else), ``shared`` or ``separate``.
        columns: of q, k and v, which columns of the projection they are, in words.
        norm: ``q_eps``, ``k_eps`` and ``gemma``; None for no norm.
        rope: ``neox`` or ``gpt-j``.
        angles: ``table``, looked up by positions, or ``rows``.
        mrope_section, mrope_interleaved, axes: how pairs take their angles, of a table with three axes of positions.
        k_scale, v_scale: a number, or the name of a node.
        masked: some tokens may be stored nowhere.
        index_arithmetic: slots are computed in the graph; that stays outside the call, as a small kernel of its own.
        addressed_by: ``slot``, ``block and offset``, ``slice``, ``slot in each sequence's cache``; or ``a layer's
            name``, by which an operation finds cache and slots when it runs.
        return_k: the rotated key is used besides its store.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    projection: str
    columns: Mapping[str, str]
    norm: Mapping[str, Any] | None
    rope: str
    rotary_dim: int
    angles: str
    mrope_section: list[int] | None
    mrope_interleaved: bool | None
    axes: list[int] | None
    dtype: str
    cache_dtype: str
    cache_size: list[str]
    cache_stride: list[str]
    k_scale: float | str | None
    v_scale: float | str | None
    saturate: bool
    masked: bool
    index_arithmetic: bool
    addressed_by: str
    return_k: bool


def read(match: Match, call: Call[Tensor]) -> Reading:
    """Of a match and of the call that it amounts to, on fake tensors."""
    key, lookup, addresses, told = match.key_heads, match.lookup, match.key_store.addresses, call.options
    section = mrope_section(lookup.axes) if lookup and lookup.num_axes == 3 else None
    heads = {"q": match.query_heads.heads, "k": key.heads, "v": match.value_store.heads}
    return Reading(
        num_heads=heads["q"].num_heads,
        num_kv_heads=heads["k"].num_heads,
        head_dim=heads["k"].head_dim,
        projection=_projection(match, call),
        columns={name: _columns(each) for name, each in heads.items()},
        norm=None
        if (told.q_eps, told.k_eps) == (None, None)
        else {"q_eps": told.q_eps, "k_eps": told.k_eps, "gemma": key.norm.gemma or match.query_heads.norm.gemma},
        rope="neox" if told.is_neox else "gpt-j",
        rotary_dim=told.rotary_dim,
        angles="table" if lookup else "rows",
        mrope_section=list(section[0]) if section else None,
        mrope_interleaved=section[1] if section else None,
        axes=list(lookup.axes) if lookup else None,
        dtype=str(call.q.dtype),
        cache_dtype=str(with_typed_caches(call).k_cache.dtype),
        cache_size=[str(size) for size in addresses.size],
        cache_stride=[str(stride) for stride in addresses.stride],
        k_scale=_scale(match.key_store),
        v_scale=_scale(match.value_store),
        saturate=told.saturate,
        masked=told.skip_negative_slots,
        index_arithmetic=_computes_indices(match),
        addressed_by=_addressed_by(match),
        return_k=told.return_k,
    )


def of_report(layer: LayerReport) -> Reading | None:
    """What a report keeps of a layer; None for a layer of another fusion, or as another version kept it."""
    names = {field.name for field in fields(Reading)}
    return Reading(**layer.reading) if layer.fusion == OPERATION.name and layer.reading.keys() == names else None


def _projection(match: Match, call: Call[Tensor]) -> str:
    if match.query.data is not match.key.data:
        return "separate"
    return "packed" if is_packed_qkv(call) else "shared"


def _columns(heads: Heads) -> str:
    return f"{heads.num_heads} x {heads.head_dim} from {heads.offset}, {heads.stride} apart"


def _scale(stored: Stored) -> float | str | None:
    return str(stored.scale) if isinstance(stored.scale, Node) else stored.scale


def _computes_indices(match: Match) -> bool:
    indices = [index for index in (match.slots, match.key_store.addresses.blocks) if index is not None]
    return any(index.node is not None and strip_views(index.node).op != "placeholder" for index in indices)


def _addressed_by(match: Match) -> str:
    addresses = match.key_store.addresses
    if STAND_IN in match.key_store.store.cache.meta:
        return BY_NAME
    if addresses.blocks is not None:
        return "block and offset"
    if match.slots.node is None:
        return "slice"
    return "slot" if same(addresses.size[:1], [1]) else "slot in each sequence's cache"


# --- in words -------------------------------------------------------------------------------------------------------


def words(reading: Reading) -> str:
    """One line."""
    order = "interleaved" if reading.mrope_interleaved else "sectioned"
    size = "" if reading.addressed_by == BY_NAME else f" [{', '.join(reading.cache_size)}]"
    parts = [
        f"heads {reading.num_heads}/{reading.num_kv_heads}x{reading.head_dim} {reading.projection}",
        _norm_words(reading.norm),
        f"rope {reading.rope} {reading.rotary_dim}",
        f"mRoPE {reading.mrope_section} {order}" if reading.mrope_section else f"angles by {reading.angles}",
        f"cache{size} by {reading.addressed_by}"
        + (" (computed in the graph)" if reading.index_arithmetic else "")
        + (", some tokens masked" if reading.masked else ""),
        *_conversion_words(reading),
    ]
    return ", ".join(parts)


def _norm_words(norm: Mapping[str, Any] | None) -> str:
    if norm is None:
        return "no norm"
    q_eps, k_eps = (None if eps is None else f"eps {eps:g}" for eps in (norm["q_eps"], norm["k_eps"]))
    weight = " (1 + weight)" if norm["gemma"] else ""
    if q_eps == k_eps:
        return f"RMSNorm {q_eps}{weight}"
    return f"RMSNorm of q {q_eps or 'none'}, of k {k_eps or 'none'}{weight}"


def _conversion_words(reading: Reading) -> Iterator[str]:
    """What the cache gets if not the very values."""
    scales = {"k": reading.k_scale, "v": reading.v_scale}
    scaled = " and ".join(f"{name} / {scale}" for name, scale in scales.items() if scale is not None)
    converted = ""
    if reading.cache_dtype != reading.dtype:
        saturating = ", saturating" if reading.saturate else ""
        converted = f"as {reading.cache_dtype.removeprefix('torch.')}{saturating}"
    if scaled or converted:
        yield " ".join(filter(None, (scaled, converted)))
