"""The operation that a fused layer calls: it finds the layer's cache and slots when it runs.

While vLLM measures memory there is no cache, and in a run without requests there may be no slots: then nothing is
stored. Where the layout of the cache is not known, the backend stores: norm and rotation are one call, the store
another.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_fusion.engines.vllm.cache_views import is_float8, reads_cache_only
from fx_fusion.engines.vllm.layout_check import checked_views
from fx_fusion.engines.vllm.names import (
    LayerNameType,
    direct_register_custom_op,
    get_attention_context,
    logger,
    resolve_layer_name,
)
from fx_fusion.graph.torch_compat import OpOverload
from fx_fusion.kernels.capture_guard import refuse_in_capture
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION as FUSED

Operands = tuple[Tensor | None, ...]
"""q, k, v, the weights, cos, sin and positions of a fused call."""


@dataclass
class Seen:
    """What became of a layer's calls.

    Attributes:
        kernel: what ran last.
        stores: how many calls stored keys and values themselves.
        fallbacks: how many left that to the backend.
        why: why they did.
    """

    kernel: str = ""
    stores: int = 0
    fallbacks: int = 0
    why: str | None = None


#: Of every layer that a fused call ran for in this process, by name.
SEEN: dict[str, Seen] = {}


@dataclass(frozen=True)
class Place:
    """Where keys and values of a layer lie, as the fused call takes it: one block, a slot a token."""

    kv_cache: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_layout: CacheLayout
    v_layout: CacheLayout

    @property
    def is_plain(self) -> bool:
        """Is the cache one row of slots, all the same distance apart?"""
        return self.k_layout.slot_group == self.v_layout.slot_group == 0


#: Of each layer, by the cache that it had then; or why it has none.
_places: weakref.WeakKeyDictionary[Any, tuple[Tensor, Place | str]] = weakref.WeakKeyDictionary()


def _qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    layer_name: LayerNameType,
    q_eps: float | None,
    k_eps: float | None,
    gemma_norm: bool,
    rotary_dim: int,
    is_neox: bool,
    axes: list[int],
    return_k: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fx_fusion.qk_norm_rope_cache`; q is [1, T, Hq, D], k and v are [1, T, Hk, D].

    Returns:
        q rotated; k rotated, empty without `return_k`; and an empty tensor, by which attention waits for the store.
    """
    name = resolve_layer_name(layer_name)
    _, layer, kv_cache, slots = get_attention_context(name)
    if not return_k and not reads_cache_only(layer):
        raise RuntimeError(
            f"fx_fusion: {layer.attn_backend.get_name()} reads keys that this compiled graph no longer computes: it "
            "was compiled for another attention backend. Remove vLLM's compile cache"
        )
    seen = SEEN.setdefault(name, Seen())
    operands = (q, k, v, q_weight, k_weight, cos, sin, positions)
    options = {
        "q_eps": q_eps,
        "k_eps": k_eps,
        "gemma_norm": gemma_norm,
        "rotary_dim": rotary_dim,
        "is_neox": is_neox,
        "axes": axes,
    }
    place = _place_of(layer, kv_cache, k.dtype)
    seen.kernel = _runs(implementation, place)
    if isinstance(place, Place):
        seen.stores += 1
        out = _fused(operands, layer, place, _slots_of(q, slots), options, return_k, seen.kernel)
        return *out, k.new_empty(0)
    rotated_q, rotated_k = _without_store(operands, options, seen.kernel)
    if place is not None and slots is not None:
        seen.fallbacks += 1
        _tell_once(seen, layer, place)
        layer.impl.do_kv_cache_update(layer, rotated_k[0], v[0], kv_cache, slots)
    return rotated_q, rotated_k if return_k else k.new_empty(0), k.new_empty(0)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    layer_name: LayerNameType,
    q_eps: float | None,
    k_eps: float | None,
    gemma_norm: bool,
    rotary_dim: int,
    is_neox: bool,
    axes: list[int],
    return_k: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape if return_k else (0,)), k.new_empty(0)


def _place_of(layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Place | str | None:
    """None where there is no cache yet."""
    if not kv_cache.numel():
        return None
    known = _places.get(layer)
    if known is None or known[0] is not kv_cache:
        known = _places[layer] = kv_cache, _look_at(layer, kv_cache, dtype)
    return known[1]


def _look_at(layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Place | str:
    found = checked_views(layer, kv_cache, dtype)
    if isinstance(found, str):
        return found
    k, v = found
    return Place(kv_cache, k, v, _one_block(k), _one_block(v))


def _one_block(cache: Tensor) -> CacheLayout:
    """The slots of all blocks in one row: in groups, unless the blocks follow one another evenly."""
    blocks, size, heads, lanes = cache.shape
    block_stride, *strides = cache.stride()
    even = block_stride == size * strides[0]
    group, group_stride = (0, 0) if even else (size, block_stride)
    return CacheLayout(1, blocks * size, heads, lanes, 0, *strides, slot_group=group, slot_group_stride=group_stride)


def _runs(implementation: str, place: Place | str | None) -> str:
    """The kernel for this place: aiter knows no slots in groups but those of its own layout."""
    if implementation == "aiter" and isinstance(place, Place) and not place.is_plain:
        return "triton"
    return implementation


def _slots_of(q: Tensor, slots: Tensor | None) -> Tensor:
    """A slot for each token, [1, T]: -1 for padding, and for all where nothing is to be stored."""
    tokens = q.shape[1]
    if slots is None:
        refuse_in_capture("a layer without slots runs")
        return torch.full((1, tokens), -1, dtype=torch.int64, device=q.device)
    if slots.shape[0] < tokens:
        slots = torch.nn.functional.pad(slots, (0, tokens - slots.shape[0]), value=-1)
    return slots[:tokens].unsqueeze(0)


def _fused(
    operands: Operands, layer: Any, place: Place, slots: Tensor, options: dict[str, Any], return_k: bool, kernel: str
) -> tuple[Tensor, Tensor]:
    quantised = is_float8(place.k_cache)
    scales = (layer._k_scale, layer._v_scale) if quantised else (None, None)
    layouts = {"k_layout": place.k_layout, "v_layout": place.v_layout}
    own = {"saturate": quantised, "return_k": return_k, "implementation": kernel}
    return _call(operands, slots, scales, (place.k_cache, place.v_cache), {**options, **layouts, **own})


def _without_store(operands: Operands, options: dict[str, Any], kernel: str) -> tuple[Tensor, Tensor]:
    """Norm and rotation alone: every token goes to a slot that is none, of a cache of one."""
    q, k = operands[0], operands[1]
    assert q is not None and k is not None
    nowhere = k.new_empty(1, 1, *k.shape[2:])
    slots = torch.full((1, q.shape[1]), -1, dtype=torch.int64, device=q.device)
    layouts = {"k_layout": CacheLayout.of(nowhere), "v_layout": CacheLayout.of(nowhere)}
    own = {"saturate": False, "return_k": True, "implementation": kernel}
    return _call(operands, slots, (None, None), (nowhere, nowhere), {**options, **layouts, **own})


def _call(
    operands: Operands,
    slots: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    caches: tuple[Tensor, Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The fused operation, on flat slots of which negative ones store nothing."""
    fixed = {"k_scale_value": None, "v_scale_value": None, "skip_negative_slots": True}
    return FUSED.overload(*operands, slots, None, *scales, *caches, **fixed, **options)


def _tell_once(seen: Seen, layer: Any, why: str) -> None:
    if seen.why == why:
        return
    known = any(each.why == why for each in SEEN.values())
    seen.why = why
    if not known:
        told = "fx_fusion: norm and rotation are one call, but %s stores itself: %s"
        logger.warning(told, layer.attn_backend.get_name(), why)


_LIBRARY = torch.library.Library("fx_fusion_vllm", "FRAGMENT")

direct_register_custom_op(
    "qk_norm_rope_store",
    _qk_norm_rope_store,
    mutates_args=[],
    fake_impl=_fake,
    target_lib=_LIBRARY,
    tags=(torch.Tag.needs_exact_strides,),
)

OPERATION: OpOverload = torch.ops.fx_fusion_vllm.qk_norm_rope_store.default
