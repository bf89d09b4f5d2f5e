"""Is the rewrite safe where it stands, and in a captured graph? Static, on fake tensors, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.store_site import Store
from fx_fusion.graph_capture.hazard_rules import copied_from, waits_for


def check_devices(operands: Iterable[Node]) -> None:
    """Every tensor that the kernel dereferences lies on one device: of one kind, and of one index."""
    places: dict[torch.device, Node] = {}
    for node in operands:
        places.setdefault(node.meta["val"].device, node)
    if len(places) < 2:
        return
    found = ", ".join(f"{node} on {device}" for device, node in places.items())
    on_host = [node for device, node in places.items() if device.type == "cpu"]
    if on_host:
        reason = f"the kernel reads every operand on its own device, found {found}; move {on_host[0]} there"
        raise Decline("placement.on_host", reason, [*on_host, *on_host[0].users])
    raise Decline("placement.device", f"expected every operand on one device, found {found}", list(places.values()))


def check_sources(operands: Iterable[Node], data: Collection[Node]) -> None:
    """On a GPU, no operand comes from a copy between host and device, or from what the host waits for.

    The fused call would be right, but the graph cannot be captured: the layer says so. `data`, what the projections
    give, is not followed: it depends on everything before it.
    """
    if any(node.meta["val"].device.type == "cpu" for node in data):
        return
    seen: set[Node] = set(data)
    stack = list(operands)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        source, wait = copied_from(node), waits_for(node)
        if source is not None and source.op != "get_attr":
            places = [value.meta["val"].device for value in (source, node)]
            found = f"{node} is a copy of {source}, from {places[0]} to {places[1]}, inside the graph"
            raise Decline("placement.transfer", f"{found}; expected a tensor that is there already", [node, source])
        if wait is not None:
            raise Decline("placement.waits", f"the host waits for a value on the way to an operand: {wait}", [node])
        stack.extend(node.all_input_nodes)


def check_scales(scales: Sequence[Node], cache: Node) -> None:
    """A scale that is a tensor is read where the kernel runs: one on the CPU would be copied there at every call."""
    device = cache.meta["val"].device
    for scale in scales:
        place = scale.meta["val"].device
        if place.type == "cpu" != device.type:
            found = f"the scale {scale} is a tensor on the CPU, {cache} lies on {device}"
            raise Decline("placement.scale_on_host", f"{found}; expected a number, or a tensor there", [scale])


def check_convex(analysis: GraphAnalysis, operands: Sequence[Node], results: Iterable[Node]) -> None:
    """No result of the call may be needed to compute one of its operands."""
    for result in results:
        path = analysis.between(result, operands)
        if path:
            raise Decline(
                "region.not_convex", f"{path[-1]} is an operand of the call and depends on {result}", [path[-1], result]
            )


def check_draws(analysis: GraphAnalysis, operands: Sequence[Node], results: Iterable[Node]) -> None:
    """What draws random numbers after the call must not have drawn before what the call needs: each draw depends on
    how many there were before it.
    """
    if len(analysis.draws) < 2:
        return
    after = [node for node in analysis.draws if any(analysis.between(result, [node]) for result in results)]
    for early in after:
        late = next((node for node in analysis.draws if analysis.order[node] > analysis.order[early]
                     and any(analysis.between(node, [operand]) for operand in operands)), None)  # fmt: skip
        if late is not None:
            found = f"{early} draws after the call would, {late} before it: they would change places"
            raise Decline("region.not_convex", found, [early, late])


def check_old_cache(analysis: GraphAnalysis, stores: Sequence[Store], operands: Sequence[Node]) -> None:
    """Whoever reads a cache from before the stores must be ordered before the call, or the cache would be copied.

    The call stores keys and values at once, so nothing may read what there is between the two stores either.
    """
    afters = {store.after for store in stores}
    for base in {store.base: None for store in stores if store.base not in afters}:
        for reader in _readers(analysis, base, stores):
            if not any(analysis.between(reader, [operand]) for operand in operands):
                raise Decline("store.old_cache_read", f"{reader} reads {base} as it was before the store", [reader])
    bases = {store.base for store in stores}
    for between in [scatter for store in stores if store.after in bases for scatter in store.scatters]:
        for reader in _readers(analysis, between, stores):
            raise Decline("store.old_cache_read", f"{reader} reads {between}, between the two stores", [reader])


def check_order(stores: Sequence[Store]) -> None:
    """A call stores keys and values at once: nothing may have been stored in between."""
    for cache in dict.fromkeys(store.cache for store in stores):
        into = list({store.writer: store for store in stores if store.cache is cache}.values())
        if len({store.base for store in into} & {store.after for store in into}) != len(into) - 1:
            found = f"between the stores of keys and of values, {cache} is stored into by others"
            raise Decline("store.order", found, [store.writer for store in into])


def check_storage(caches: Sequence[Node]) -> None:
    """Two inputs may be views of one tensor. Where the distance between them is symbolic, Inductor may copy one, and
    count its offset twice as it does.
    """
    values = [cache.meta["val"] for cache in dict.fromkeys(caches)]
    storages = {StorageWeakRef(value.untyped_storage()) for value in values}
    if len(storages) < len(values) and any(isinstance(value.storage_offset(), torch.SymInt) for value in values):
        found = f"{' and '.join(map(str, dict.fromkeys(caches)))} are views of one tensor, at symbolic places in it"
        raise Decline("placement.shared_storage", f"{found}; pass the tensor, or compile for static shapes", caches)


def _readers(analysis: GraphAnalysis, base: Node, stores: Sequence[Store]) -> Iterable[Node]:
    """Who reads `base` through views, but for the stores themselves."""
    writers = {store.writer for store in stores}
    replaced = {step for store in stores for step in store.last_steps}
    scatters = {scatter for store in stores for scatter in store.scatters}
    stack = [base]
    while stack:
        node = stack.pop()
        for user in analysis.users(node):
            if user.target in operations.VIEW:
                stack.append(user)
            elif (
                user in scatters or (user in writers and user.args[0] is node) or _only_feeds(analysis, user, replaced)
            ):
                continue
            elif user.target is not operations.aten.copy_.default:
                yield user


def _only_feeds(analysis: GraphAnalysis, node: Node, replaced: Collection[Node]) -> bool:
    """Is `node` used only by steps that the call replaces (what a masked store puts back)?"""
    users = analysis.users(node)
    return bool(users) and all(user in replaced for user in users)


def check_cache_address(cache: Node) -> None:
    """The cache must live at a stable address: a graph input, a parameter or a buffer."""
    if cache.op not in ("placeholder", "get_attr"):
        raise Decline("placement.cache", f"the cache {cache} is computed by the graph; expected a graph input", [cache])
