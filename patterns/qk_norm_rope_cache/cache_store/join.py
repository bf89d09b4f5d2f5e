"""One store of both: ``kv_cache[slots] = torch.stack([k, v], 1)`` is a store of keys, and one of values.

A rotated head is a join too, of its halves or of what turns and what does not. So stores are paired first, and only
what has no partner is taken apart: a layer that stores keys alone has a partner that stores values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.paths import angles_after_projection, is_moved_from, strip_views
from fx_fusion.graph.store_site import Join, Store, joined
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.conversion import Conversion, read_conversion

Pair = tuple[Store, Store, Node]


def take_apart(
    analysis: GraphAnalysis, pairs: Iterable[Pair], single: Iterable[Store]
) -> tuple[list[Pair], list[Decline]]:
    """All pairs, in graph order, and why other stores are none: of what
    :func:`~fx_fusion.graph.store_site.pair_stores` found.

    Two joint stores, of two layers, are no pair: neither stores values alone.
    """
    found: list[Pair] = []
    declined: list[Decline] = []
    for a, b, origin in pairs:
        both_join = all(joined(read_conversion(store).value) for store in (a, b))
        divided = [_divide(analysis, store) for store in (a, b)] if both_join else []
        found += [pair for pair in divided if pair] if divided and all(divided) else [(a, b, origin)]
    for store in single:
        divided = _divide(analysis, store)
        if divided:
            found.append(divided)
        else:
            declined.append(_unpaired(analysis, store))
    found.sort(key=lambda pair: analysis.order[pair[0].writer])
    return found, declined


def _divide(analysis: GraphAnalysis, store: Store) -> Pair | None:
    """The two stores that `store` is, and the value that both come from; None if it joins no key and value."""
    conversion = read_conversion(store)
    parts = joined(conversion.value)
    origin, angles = _angles(analysis, conversion)
    if origin is None or len(parts) != 2 or angles[0] == angles[1]:
        return None
    after = frozenset(step.node for step in conversion.steps)
    first, second = (replace(store, join=Join(conversion.value, position, after)) for position in range(2))
    return first, second, strip_views(origin)


def _angles(analysis: GraphAnalysis, conversion: Conversion) -> tuple[Node | None, list[int]]:
    """What the values that are stored jointly come from, and how many tensors feed each besides."""
    first, *others = joined(conversion.value) or [conversion.value]
    meeting = analysis.latest_common_ancestors(first, others)
    origin = min(meeting.values(), key=analysis.order.__getitem__, default=None)
    if origin is None or any(is_moved_from(a, b) for a, b in itertools.permutations((first, *others), 2)):
        return None, []
    return origin, [angles_after_projection(analysis, origin, part) for part in (first, *others)]


def _unpaired(analysis: GraphAnalysis, store: Store) -> Decline:
    conversion = read_conversion(store)
    _, angles = _angles(analysis, conversion)
    if angles and not any(angles):
        parts = " and ".join(map(str, joined(conversion.value)))
        found = f"{store.writer} stores {parts}, joined, none of which is rotated; expected a rotated key and a value"
        return Decline("rope.missing", found, [store.writer])
    found = (
        f"{store.writer} stores into {store.cache}, and no other store has its value from the same projection; "
        "nor does it store a key and a value joined by cat or stack"
    )
    return Decline("store.unpaired", found, [store.writer])
