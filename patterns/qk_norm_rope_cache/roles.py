"""Which nodes of a graph play which part in a match of the built-in fusion, and what was read off each: for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from fx_fusion.fusion import NodeRole
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.paths import Branch
from fx_fusion.kernels.qk_norm_rope_cache.mrope import mrope_section
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.branch.table_lookup import Lookup
from fx_fusion.patterns.qk_norm_rope_cache.match import Match, Stored


def node_roles(analysis: GraphAnalysis, match: Match) -> dict[Node, NodeRole]:
    """The part of every node that the call replaces, and of what it reads, in graph order."""
    found: dict[Node, NodeRole] = {}
    for name, branch, heads in (("q", match.query, match.query_heads), ("k", match.key, match.key_heads)):
        found |= _branch_roles(analysis, name, branch, heads)
    for name, out, stored in (
        ("k", match.key.out, match.key_store),
        ("v", match.value_store.data, match.value_store),
    ):
        found |= _store_roles(analysis, name, out, stored)
    found |= _joint_roles(match)
    if match.lookup is not None:
        found |= _lookup_roles(analysis, match, match.lookup)
    found |= dict(_operand_roles(match))
    return dict(sorted(found.items(), key=lambda item: analysis.order[item[0]]))


# --- a branch: data → split → norm → rope ---------------------------------------------------------------------------


def _branch_roles(analysis: GraphAnalysis, name: str, branch: Branch, heads: RotatedHeads) -> dict[Node, NodeRole]:
    moved = _leading_moves(branch)
    turned = _rotation(analysis, branch, heads.norm.weight)
    roles = {node: "split" if node in moved else "rope" if node in turned else "norm" for node in branch.nodes}
    findings = {branch.out: f"{name}, normalised and rotated"} if branch.nodes else {}
    return {node: NodeRole(role, name, findings.get(node)) for node, role in roles.items()}


def _leading_moves(branch: Branch) -> set[Node]:
    moved: set[Node] = {branch.data}
    inside = {branch.data, *branch.nodes}
    for node in branch.nodes:
        if operations.is_movement(node) and moved.issuperset(p for p in node.all_input_nodes if p in inside):
            moved.add(node)
    return moved


def _rotation(analysis: GraphAnalysis, branch: Branch, weight: Node | None) -> set[Node]:
    """What angles enter, and the moves and negations that prepare for it."""
    angles = {node for node in branch.frontier if _is_wide(node) and not _comes_from(analysis, weight, node)}
    inside = set(branch.nodes)
    turned: set[Node] = set()
    for node in branch.nodes:
        if any(parent in angles or parent in turned for parent in node.all_input_nodes):
            turned.add(node)
    for node in reversed(branch.nodes):
        users = [user for user in node.users if user in inside]
        moves = operations.is_movement(node) or node.target in (
            operations.aten.neg.default,
            operations.aten.cat.default,
        )
        if moves and users and turned.issuperset(users):
            turned.add(node)
    return turned


def _is_wide(node: Node) -> bool:
    return operations.is_float_tensor(node) and node.meta["val"].dim() > 0


def _comes_from(analysis: GraphAnalysis, origin: Node | None, node: Node) -> bool:
    return origin is not None and bool(analysis.between(origin, [node]))


# --- stores ---------------------------------------------------------------------------------------------------------


def _store_roles(analysis: GraphAnalysis, name: str, out: Node, stored: Stored) -> dict[Node, NodeRole]:
    store = stored.store
    steps = [*store.steps_from(analysis, out), *analysis.between(store.value, [store.writer])]
    tail = [node for node in steps if node is not out]
    role = "store" if name == "k" else "split"
    found = {node: NodeRole(role, name) for node in tail}
    found |= {node: NodeRole("store", name) for node in (*store.views, *store.scatters)}
    size = ", ".join(map(str, stored.addresses.size))
    found[store.writer] = NodeRole("store", name, f"stores {name} into [{size}] {_address_words(stored)}")
    return found


def _joint_roles(match: Match) -> Iterator[tuple[Node, NodeRole]]:
    """What keys and values go through together."""
    key, value = match.key_store, match.value_store
    if key.store.join is None:
        return
    for node in (key.store.join.node, *key.store.join.after, *key.store.views, *key.store.scatters):
        yield node, NodeRole("store")
    words = [f"{name} into [{', '.join(map(str, each.addresses.size))}]" for name, each in (("k", key), ("v", value))]
    yield key.store.writer, NodeRole("store", "", f"stores {' and '.join(words)} {_address_words(key)}")


def _address_words(stored: Stored) -> str:
    addresses = stored.addresses
    if addresses.blocks is not None:
        return f"at block {addresses.blocks}, offset {addresses.slots}"
    return f"at slot {addresses.slots}" if addresses.slots.node is not None else "in a slice"


# --- what the call reads --------------------------------------------------------------------------------------------


def _lookup_roles(analysis: GraphAnalysis, match: Match, lookup: Lookup) -> dict[Node, NodeRole]:
    leaves = [match.rope.cos.leaf, match.rope.sin.leaf]
    sources = (lookup.cos.table, lookup.sin.table, lookup.positions)
    path = dict.fromkeys(node for source in sources for node in analysis.between(source, leaves) if node not in sources)
    return {node: NodeRole("lookup") for node in path}


def _operand_roles(match: Match) -> Iterator[tuple[Node, NodeRole]]:
    named = (
        ("q", match.query.data, match.query_heads.heads),
        ("k", match.key.data, match.key_heads.heads),
        ("v", match.value_store.data, match.value_store.heads),
    )
    for data in dict.fromkeys(node for _, node, _ in named):
        reads = [(name, heads) for name, node, heads in named if node is data]
        branch = reads[0][0] if len(reads) == 1 else ""
        yield data, NodeRole("data", branch, "; ".join(f"{name} = {_heads_words(heads)}" for name, heads in reads))
    for name, heads in (("q", match.query_heads), ("k", match.key_heads)):
        if heads.norm.weight is not None:
            yield heads.norm.weight, NodeRole("operand", name, f"RMSNorm weight of {name}: {_norm_words(heads)}")
    yield from _angle_roles(match)
    addresses = match.key_store.addresses
    indices = (
        (addresses.blocks, "block of each token"),
        (match.slots, "offset in its block" if addresses.blocks else "slot of each token"),
        (addresses.stored and addresses.stored.index, "is each token stored?"),
    )
    for index, words in indices:
        if index is not None and index.node is not None:
            yield index.node, NodeRole("operand", "", words)
    for name, stored in (("k", match.key_store), ("v", match.value_store)):
        if isinstance(stored.scale, Node):
            yield stored.scale, NodeRole("operand", name, f"{name} is divided by it before it is stored")
    caches = {match.key_store.store.cache: "k cache"}
    value_cache = match.value_store.store.cache
    caches[value_cache] = "k and v cache" if value_cache in caches else "v cache"
    for cache, words in caches.items():
        yield cache, NodeRole("operand", "", f"{words}, written in place")


def _heads_words(heads: Heads) -> str:
    last = heads.offset + (heads.num_heads - 1) * heads.stride + heads.head_dim
    gaps = "" if heads.stride == heads.head_dim else f", {heads.stride} apart"
    return f"columns {heads.offset}..{last - 1}, {heads.num_heads} heads of {heads.head_dim}{gaps}"


def _norm_words(heads: RotatedHeads) -> str:
    eps = "no norm" if heads.norm.eps is None else f"eps {heads.norm.eps:g}"
    return f"each head alone, {eps}, times {'1 + weight' if heads.norm.gemma else 'weight'}"


def _angle_roles(match: Match) -> Iterable[tuple[Node, NodeRole]]:
    rope, lookup = match.rope, match.lookup
    style = f"{'neox' if rope.is_neox else 'gpt-j'} rotation of {rope.rotary_dim} lanes"
    if lookup is None:
        yield rope.cos.leaf, NodeRole("operand", "", f"cosines, a row a token; {style}")
        yield rope.sin.leaf, NodeRole("operand", "", "sines, a row a token")
        return
    tables = dict.fromkeys((lookup.cos.table, lookup.sin.table))
    for table in tables:
        what = "cosines and sines" if len(tables) == 1 else "cosines" if table is lookup.cos.table else "sines"
        yield table, NodeRole("operand", "", f"table of {what}; {style}")
    section = mrope_section(lookup.axes) if lookup.num_axes == 3 else None
    order = f", mRoPE {list(section[0])} {'interleaved' if section[1] else 'sectioned'}" if section else ""
    axes = "1 axis" if lookup.num_axes == 1 else f"{lookup.num_axes} axes"
    yield lookup.positions, NodeRole("operand", "", f"positions, {axes}{order}")
