"""The fusion that comes with the package: split → rmsnorm → mrope → cache-store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fx_fusion.decline import Decline
from fx_fusion.fusion import Assessment, Fusion, NodeRole
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.custom_calls import operation
from fx_fusion.graph.edit import FakeEmitter
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.strided import may_overlap
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.target import Target
from fx_fusion.patterns.qk_norm_rope_cache import match as pattern
from fx_fusion.patterns.qk_norm_rope_cache import reading
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, layout
from fx_fusion.patterns.qk_norm_rope_cache.lower import lower, rewrite
from fx_fusion.patterns.qk_norm_rope_cache.match import Candidate, Match
from fx_fusion.patterns.qk_norm_rope_cache.roles import node_roles
from fx_fusion.placement import (
    check_cache_address,
    check_convex,
    check_devices,
    check_draws,
    check_old_cache,
    check_order,
    check_scales,
    check_sources,
    check_storage,
)
from fx_fusion.semantics.meaning import WITHOUT_STORE


@dataclass(frozen=True)
class Lowered:
    """A match, and the call that it amounts to, on fake tensors: what contracts are asked about.

    Attributes:
        made: the fake value of each step from the match's nodes to the call.
    """

    match: Match
    call: Call[Tensor]
    made: tuple[Any, ...]


class QkNormRopeCache(Fusion[Candidate, Lowered]):
    """The built-in fusion, as the registry knows it; ``match.py`` shows before and after."""

    name = "qk_norm_rope_cache"

    def find(self, analysis: GraphAnalysis) -> tuple[list[Candidate], list[Decline]]:
        return pattern.find(analysis)

    def absent(self, analysis: GraphAnalysis) -> Decline:
        return _no_store(analysis)

    def read(self, analysis: GraphAnalysis, candidate: Candidate, memo: dict[object, Any]) -> Lowered:
        match = pattern.read(analysis, candidate, memo)
        emit = FakeEmitter(match.key.out)
        return Lowered(match, lower(match, emit), tuple(emit.made))

    def assess(self, lowered: Lowered) -> Assessment:
        found = reading.read(lowered.match, lowered.call)
        eligible = OPERATION.eligible(lowered.call)
        return Assessment(reading.words(found), asdict(found), lowered.match.evidence, eligible)

    def choose(self, lowered: Lowered, kernel: str, target: Target) -> str:
        return OPERATION.choose(kernel, lowered.call, target)

    def check(self, analysis: GraphAnalysis, lowered: Lowered) -> None:
        match = lowered.match
        stores = [match.key_store.store, match.value_store.store]
        caches = [store.cache for store in stores]
        check_scales(match.scales, caches[0])
        check_sources(match.operands, [match.query.data, match.key.data, match.value_store.data])
        check_devices([*match.operands, *caches])
        check_convex(analysis, match.operands, match.results)
        check_draws(analysis, match.operands, match.results)
        for cache in dict.fromkeys(caches):
            check_cache_address(cache)
        check_storage(caches)
        check_order(stores)
        _check_apart(analysis, match)
        check_old_cache(analysis, stores, match.operands)

    def stores(self, lowered: Lowered) -> tuple[list[Node], set[Node]]:
        match = lowered.match
        stores = [match.key_store.store, match.value_store.store]
        scatters = [scatter for store in stores for scatter in store.scatters]
        return [store.writer for store in stores], {*match.results, *scatters}

    def roles(self, analysis: GraphAnalysis, lowered: Lowered) -> dict[Node, NodeRole]:
        return node_roles(analysis, lowered.match)

    def region(self, analysis: GraphAnalysis, candidate: Candidate, fault: Node | None) -> list[Node]:
        writers = [store.writer for store in candidate.stores]
        ends = [node for node in (candidate.anchor, fault, *writers) if node is not None]
        return [*analysis.between(candidate.origin, ends), *ends]

    def rewrite(self, graph: Graph, lowered: Lowered, kernel: str) -> None:
        rewrite(graph, lowered.match, kernel, lowered.made)


def _no_store(analysis: GraphAnalysis) -> Decline:
    found = "the graph writes no KV cache in place; "
    attention = next((node for node in analysis.nodes if node in analysis.live and _takes_three(node)), None)
    if attention is None:
        return Decline("store.missing", f"{found}a cache that grows by concatenation (DynamicCache) stores nothing")
    found += f"if the opaque operation {operation(attention)} stores keys and values itself, that cannot be fused. "
    found += WITHOUT_STORE
    return Decline("store.missing", found, [attention])


def _takes_three(node: Node) -> bool:
    """An opaque operation that may take query, key and value."""
    tensors = [each for each in node.all_input_nodes if operations.is_float_tensor(each) and each.meta["val"].dim() > 1]
    return operation(node) is not None and len(tensors) > 2


def _check_apart(analysis: GraphAnalysis, match: Match) -> None:
    """A call stores keys and values at once: in one tensor, they must not share an element."""
    key, value = match.key_store, match.value_store
    if key.store.cache is not value.store.cache:
        return
    for sizes in analysis.sizes:
        regions = [_region(stored.addresses, sizes) for stored in (key, value)]
        if may_overlap(*regions[0], *regions[1]):
            found = (
                f"{key.store.writer} and {value.store.writer} store into parts of {key.store.cache} that share elements"
            )
            raise Decline("store.overlap", found, [key.store.writer, value.store.writer])


def _region(addresses: Addresses, sizes: Sizes) -> tuple[list[tuple[int, int]], int]:
    """Every element that a store may reach: (size, stride) of each dimension, and the first one's place."""
    dims = [(sizes.concrete(n), sizes.concrete(stride)) for n, stride in layout(addresses).dims]
    return dims, sizes.concrete(addresses.offset)
