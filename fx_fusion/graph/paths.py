"""Where could a fusion be? Structure only finds candidates here; what they compute is measured later.

Words used throughout:

* *data* is the value a branch starts from: the projection's output, after bias, dequantisation or LoRA;
* a *branch* is everything on a path from data to one value (the rotated query, the rotated key);
* the *frontier* is what feeds a branch without depending on its data: weights, cosine and sine, constants.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis, freeze
from fx_fusion.graph.operations import aten, node_of
from fx_fusion.graph.sizes import Sizes, same


@dataclass(frozen=True)
class Branch:
    """The computation from ``data`` to ``out``: ``nodes`` depend on data (``data`` itself excluded), in graph order.

    ``projection`` is the earliest value that data could have been, or the matrix product before it: its last dimension
    holds the columns of one token.
    """

    projection: Node
    data: Node
    out: Node
    nodes: tuple[Node, ...]
    frontier: tuple[Node, ...]

    def tokens(self, sizes: Sizes) -> int:
        return torch.Size(sizes.shape(self.projection.meta["val"])[:-1]).numel()


def branch_between(analysis: GraphAnalysis, projection: Node, data: Node, out: Node) -> Branch:
    nodes = tuple(node for node in analysis.between(data, [out]) if node is not data)
    inside = {data, *nodes}
    frontier = dict.fromkeys(p for node in nodes for p in node.all_input_nodes if p not in inside)
    return Branch(projection, data, out, nodes, tuple(frontier))


def data_cuts(analysis: GraphAnalysis, origin: Node, out: Node) -> list[Node]:
    """Where the data of the branch to `out` may begin, the earliest first.

    Candidates are the values that every path from `origin` to `out` passes through, after which only analytic steps
    follow, and before which no root is taken: a norm belongs to the branch or the branch is not understood. Values that
    merely move an earlier candidate are left out: they start the same function. Copies come last: they may lay evenly
    what is uneven in the projection, as ``qkv[..., :-2, :].flatten(-3, -2)`` does where each key follows its queries.

    Raises:
        Decline: ``proof.not_analytic``, if a step that is not analytic leaves no candidate.
    """
    path = analysis.between(origin, [out])
    chain = _bottlenecks(path)
    body = [node for node in path if node is not origin]
    projection = max(
        (analysis.order[node] for node in body if operations.is_opaque(node)), default=analysis.order[origin]
    )
    blocker = next((node for node in reversed(body) if not operations.is_analytic(node)), None)
    first = analysis.order[blocker] if blocker is not None else analysis.order[origin]
    last = min(
        (analysis.order[node] for node in body if operations.takes_root(node) and analysis.order[node] > projection),
        default=None,
    )
    cuts = [node for node in chain[:-1] if analysis.order[node] >= first and not operations.is_complex_tensor(node)]
    if last is not None:
        cuts = [node for node in cuts if analysis.order[node] < last]
    cuts = _without_padding(cuts)
    if not cuts:
        step = blocker or out
        if step.target in operations.CENTRED_NORMS:
            found = f"{step} ({step.target}) subtracts the mean, as a LayerNorm does; expected an RMSNorm"
            raise Decline("norm.not_rms", found, [step])
        raise Decline("proof.not_analytic", f"{step} ({step.target}) stands between the projection and {out}", [step])
    copies = [node for node in cuts[1:] if node.target is aten.clone.default]
    return [cuts[0], *(node for node in cuts[1:] if not operations.is_movement(node)), *copies]


def _bottlenecks(path: Sequence[Node]) -> list[Node]:
    """The nodes of `path` (all that lie between its first and its last, in order) that no edge of it passes by."""
    position = {node: i for i, node in enumerate(path)}
    last_use = {parent: i for node, i in position.items() for parent in node.all_input_nodes if parent in position}
    found: list[Node] = []
    furthest = 0
    for node, i in position.items():
        if furthest <= i:
            found.append(node)
        furthest = max(furthest, last_use.get(node, i))
    return found


def rows_of_tokens(analysis: GraphAnalysis, origin: Node, cut: Node) -> Node:
    """The value on the way from `origin` to `cut` that has one row a token: `cut` itself, or, where a step that is not
    analytic stands after the heads were split, the matrix product before them.
    """
    path = analysis.between(origin, [cut])
    product = next((node for node in reversed(path) if operations.is_opaque(node)), origin)
    after = path[path.index(product) + 1 :]
    moves = all(operations.is_movement(node) for node in after)
    return cut if moves or any(drops_rows(node) for node in after) else product


def _without_padding(cuts: list[Node]) -> list[Node]:
    """Inductor pads matrix products and cuts the padding off again: the data begins after the cut."""
    start = 0
    for i, node in enumerate(cuts):
        if i and not operations.is_movement(node):
            break
        if drops_rows(node):
            start = i
    return cuts[start:]


def drops_rows(node: Node) -> bool:
    """Does `node` keep some of its input's rows: of the first dimension, or of any but the last while that one still
    holds all columns of the matrix product? (Once those are split into heads, a slice picks heads.)
    """
    if node.target is not aten.slice.Tensor:
        return False
    source = node_of(node.args[0])
    shape = source.meta["val"].shape
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if dim % len(shape) == 0:
        return len(shape) > 1
    return dim % len(shape) != len(shape) - 1 and same(shape[-1:], strip_views(source).meta["val"].shape[-1:])


def strip(node: Node, *, keep_order: bool = False) -> Node:
    """The value that `node` is a view, a negation or a widened copy of; with `keep_order`, no further than where
    dimensions change places.
    """
    while operations.is_movement(node) or node.target is aten.neg.default or widens(node):
        if keep_order and _reorders(node):
            break
        node = node_of(node.args[0])
    return node


def _reorders(node: Node) -> bool:
    """Does `node` permute dimensions of more than one element?"""
    if node.target is not aten.permute.default:
        return False
    shape = node_of(node.args[0]).meta["val"].shape
    dims: Any = node.args[1]
    wide = [dim % len(shape) for dim in dims if not same([shape[dim]], [1])]
    return wide != sorted(wide)


def strip_views(node: Any, *, keep_rows: bool = False) -> Node:
    """The value that `node` is moved from; with `keep_rows`, no further than where rows are dropped."""
    while operations.is_movement(node) and not is_one_of_several(node) and not (keep_rows and drops_rows(node)):
        node = node.args[0]
    return node_of(node)


def is_moved_from(node: Node, source: Node) -> bool:
    """Is `node` nothing but `source`, moved and cast?"""
    while node is not source and (operations.is_movement(node) or operations.is_cast(node)):
        node = node_of(node.args[0])
    return node is source


def widens(node: Node) -> bool:
    """Is `node` a cast to a float dtype that holds every value of its input?"""
    if not operations.is_cast(node):
        return False
    source, target = node_of(node.args[0]).meta["val"].dtype, node.meta["val"].dtype
    return source.is_floating_point and target.is_floating_point and operations.holds(target, source)


def strip_aliases(node: Any) -> Node:
    """The value that `node` is a view of."""
    while _is_alias(node):
        node = node.args[0]
    return node


def _is_alias(node: Node) -> bool:
    return node.op == "call_function" and node.target in operations.VIEW and not is_one_of_several(node)


def is_one_of_several(node: Node) -> bool:
    """Is `node` one of the results of an operation that is no view?"""
    return node.target is operator.getitem and node_of(node.args[0]).target not in operations.VIEW


def alias_steps(base: Node, view: Node) -> list[Node]:
    """The steps from `base` to `view`, an alias of it."""
    steps: list[Node] = []
    while view is not base:
        steps.append(view)
        view = node_of(view.args[0])
    return steps[::-1]


class Rotations:
    """Which nodes combine data with which angles: the key's angles lead to the query."""

    def __init__(self, analysis: GraphAnalysis) -> None:
        self._analysis = analysis
        self._sites: dict[int, list[Node]] = {}
        for node in analysis.nodes:
            if node not in analysis.live or not operations.is_arithmetic(node):
                continue
            for parent in node.all_input_nodes:
                if operations.is_float_tensor(parent) or operations.is_complex_tensor(parent):
                    root = analysis.value_number(strip(parent))
                    self._sites.setdefault(root, []).append(node)

    def find_query(self, key: Branch, value: Node) -> tuple[list[Node], Node]:
        """Candidates for the rotated query, the latest first, and the value that it and `value` both come from."""
        analysis = self._analysis
        inside = {key.data, *key.nodes}
        angles = {analysis.value_number(strip(node)) for node in key.frontier if _is_wide(node)}
        sites = {site for root in angles for site in self._sites.get(root, ()) if site not in inside}
        position = analysis.order[key.out]
        near = sorted(sites, key=lambda site: abs(analysis.order[site] - position))[:8]
        rotated = set(analysis.between(key.out, near))
        meeting = analysis.latest_common_ancestors(value, [site for site in near if site not in rotated])
        origins = {site: meeting[site] for site in near if site in meeting}
        if not origins:
            raise Decline(
                "rope.query_missing", f"no other value is rotated by the angles that rotate {key.out}", [key.out]
            )
        origin = max(origins.values(), key=analysis.order.__getitem__)
        starts = [site for site, its_origin in origins.items() if its_origin is origin]
        starts = [site for site in starts if not any(_in_a_later_layer(analysis, other, site) for other in starts)]
        return self._exits(starts), strip_views(origin)

    def _exits(self, starts: Sequence[Node]) -> list[Node]:
        """The values through which everything that leaves the computation after `starts` must pass."""
        analysis = self._analysis
        forward: dict[Node, None] = dict.fromkeys(starts)
        exit_node = object()
        flow = nx.DiGraph()
        stack = list(starts)
        while stack:
            node = stack.pop()
            for user in analysis.users(node):
                if not operations.is_analytic(user):
                    flow.add_edge(exit_node, node)
                    continue
                flow.add_edge(user, node)
                if user not in forward:
                    forward[user] = None
                    stack.append(user)
        if exit_node not in flow:
            raise Decline("rope.query_missing", f"{starts[0]} is rotated like the key but never used", starts)
        idom: dict[Any, Any] = nx.immediate_dominators(flow, exit_node)
        common: list[Node] | None = None
        for start in starts:
            chain: list[Node] = []
            node: Any = start
            while node is not exit_node:
                chain.append(node)
                node = idom[node]
            common = chain if common is None else [node for node in common if node in chain]
        candidates = [node for node in reversed(common or []) if not operations.is_movement(node)]
        if not candidates:
            raise Decline("rope.query_escapes", f"{starts[0]} reaches its consumers in several pieces", starts)
        return candidates


def _is_wide(node: Node) -> bool:
    return (operations.is_float_tensor(node) or operations.is_complex_tensor(node)) and node.meta["val"].dim() > 0


def _in_a_later_layer(analysis: GraphAnalysis, first: Node, second: Node) -> bool:
    """Does `second` depend on `first` through a matrix product or an opaque operation?"""
    return any(operations.is_opaque(node) for node in analysis.between(first, [second])[1:])


def angles_after_projection(analysis: GraphAnalysis, origin: Node, out: Node) -> int:
    """How many tensors with angles (or a norm's weight) feed the way from the last projection to `out`?"""
    path = analysis.between(origin, [out])
    inside = set(path)
    tail = {out}
    for node in reversed(path):
        if node in tail and not operations.is_opaque(node):
            tail.update(parent for parent in node.all_input_nodes if parent in inside)
    body = [node for node in path if node in tail and not operations.is_opaque(node) and node is not origin]
    return len(
        {parent for node in body for parent in node.all_input_nodes if parent not in inside and _is_wide(parent)}
    )


def branch_key(branch: Branch, origins: Sequence[Node]) -> tuple[Any, ...]:
    """Equal for branches that compute the same function of the data and of `origins`: see :func:`numbered_branch`."""
    return numbered_branch(branch, origins)[0]


def numbered_branch(branch: Branch, origins: Sequence[Node]) -> tuple[tuple[Any, ...], tuple[Node, ...]]:
    """A key, equal for branches that compute the same function of the data and of `origins` (same ops, literals, shapes
    and strides, from the origins on); and the nodes that it numbers, in order.

    Nodes are numbered in order of use, so names and places in the graph do not matter, and which operands are one node
    does. Of two branches with equal keys, the nodes with one number correspond: nothing else says which do.
    """
    local: dict[Node, int] = {}
    described: list[Any] = [_describe(branch.projection)]
    for leaf in (branch.data, *origins):
        local[leaf] = len(local)
        described.append(_describe(leaf))

    def visit(node: Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [] if operations.is_symbolic(top) else [p for p in top.all_input_nodes if p not in local]
            if top in local or not missing:
                stack.pop()
                if top not in local:
                    step = () if operations.is_symbolic(top) else (freeze(top.args, local), freeze(top.kwargs, local))
                    described.append((str(top.target), *step, _describe(top)))
                    local[top] = len(local)
                continue
            stack.extend(missing)

    visit(branch.out)
    return tuple(described), tuple(local)


def _describe(node: Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(tuple(value.shape)), str(value.stride()))
    return (str(value),)
