"""A graph before and after the pass, layer by layer and node by node: what ``explain`` shows in detail.

Recorded by an observer, so that a compilation pays nothing for it. Equal layers are described once.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.decline import source_line
from fx_fusion.fusion import AnyFusion, Candidate, NodeRole
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.edit import EMITTED
from fx_fusion.observer import Observer
from fx_fusion.report import FusionReport, LayerReport

#: A declined layer may be a whole transformer block: more nodes than this tell nobody anything.
MOST_STEPS = 160
#: Lines of source on either side of the one that is quoted.
CONTEXT = 2

_SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32"}


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        op: the ATen operation, ``input``, or the fused call.
        inputs: names of nodes.
        value: dtype and shape.
        role, branch, finding: see :class:`fx_fusion.fusion.NodeRole`; in a declined layer the
            node at fault is ``offending``, the others ``region``; in the graph after the pass there are ``call``,
            ``view``, ``result``.
        label: what the user calls it, for an input.
        source: the user's ``file:line``.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    value: str
    role: str
    branch: str = ""
    finding: str | None = None
    label: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Quote:
    """Lines of a user's file, the first one `first`, about line `line`."""

    file: str
    line: int
    first: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class LayerAnatomy:
    """Layers that read the same, by their numbers in the report, and the nodes of the first of them.

    `labels` are what the user calls the graph's inputs, by the names that they have in it.
    """

    layers: tuple[int, ...]
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    quote: Quote | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Anatomy:
    """One graph.

    Attributes:
        nodes_before, nodes_after: sizes of the graph.
        roles_before, roles_after: runs of nodes in graph order: (role, how many); an empty role is none of ours.
    """

    layers: tuple[LayerAnatomy, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    roles_before: tuple[tuple[str, int], ...] = ()
    roles_after: tuple[tuple[str, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Group:
    """Layers that read the same, while the pass runs."""

    numbers: list[int]
    before: tuple[Step, ...]
    quote: Quote | None
    emitted: list[Node] = field(default_factory=list[Node])


class Recorder(Observer):
    """Records the anatomy of every graph that it is told of, in `graphs`; graphs without a candidate are left out."""

    def __init__(self) -> None:
        self.graphs: list[Anatomy] = []
        self._names: list[str] = []
        self._count = 0

    def names(self, inputs: Sequence[str]) -> None:
        self._names = list(inputs)

    def starts(self, graph: Graph) -> None:
        self._before = list(graph.nodes)
        self._labels = _labels(self._before, self._names)
        self._roles: dict[Node, str] = {}
        self._groups: dict[str, _Group] = {}
        self._emitted: set[Node] = set()

    def reads(self, fusion: AnyFusion, analysis: GraphAnalysis, candidate: Any, match: Any, layer: LayerReport) -> None:
        number, self._count = self._count, self._count + 1
        found = _roles(fusion, analysis, candidate, match, layer)
        self._roles |= {node: place.role for node, place in found.items()}
        key = f"{layer.fusion} {layer}"
        if key in self._groups:
            self._groups[key].numbers.append(number)
            return
        steps = tuple(_step(node, place, self._labels) for node, place in found.items())
        self._groups[key] = _Group([number], steps, quote(layer.source) if layer.state == "declined" else None)

    def rewrites(self, layer: LayerReport, graph: Graph) -> None:
        new = [node for node in graph.nodes if node.meta.get(EMITTED) and node not in self._emitted]
        self._emitted.update(new)
        group = self._groups[f"{layer.fusion} {layer}"]
        group.emitted = group.emitted or new

    def ends(self, graph: Graph, report: FusionReport) -> None:
        if not self._groups:
            return
        after = list(graph.nodes)
        kept = set(after)
        layers: list[LayerAnatomy] = []
        for group in self._groups.values():
            steps = tuple(_emitted_step(node, self._labels) for node in group.emitted if node in kept)
            layers.append(
                LayerAnatomy(tuple(group.numbers), group.before, steps, group.quote, self._used(group.before, steps))
            )
        self.graphs.append(
            Anatomy(
                tuple(layers),
                nodes_before=len(self._before),
                nodes_after=len(after),
                roles_before=_runs(self._roles.get(node, "") for node in self._before),
                roles_after=_runs(_emitted_role(node) if node in self._emitted else "" for node in after),
            )
        )

    def _used(self, *steps: Sequence[Step]) -> dict[str, str]:
        names = {name for each in steps for step in each for name in (step.name, *step.inputs)}
        return {node.name: label for node, label in self._labels.items() if node.name in names}


def _labels(nodes: Sequence[Node], names: Sequence[str]) -> dict[Node, str]:
    """What the user calls each input of the graph; nothing where the two do not correspond."""
    inputs = [node for node in nodes if node.op == "placeholder"]
    return dict(zip(inputs, names, strict=True)) if len(inputs) == len(names) else {}


# --- before ---------------------------------------------------------------------------------------------------------


def _roles(
    fusion: AnyFusion, analysis: GraphAnalysis, candidate: Candidate | None, match: Any, layer: LayerReport
) -> dict[Node, NodeRole]:
    roles = fusion.roles(analysis, match) if match is not None else {}
    return roles or _around(fusion, analysis, candidate, layer)


def _around(
    fusion: AnyFusion, analysis: GraphAnalysis, candidate: Candidate | None, layer: LayerReport
) -> dict[Node, NodeRole]:
    """The candidate's nodes, as far as the fusion tells, and the node that the reason is about."""
    fault = next((node for node in analysis.nodes if node.name == layer.node), None)
    region = (
        fusion.region(analysis, candidate, fault) if candidate is not None else [fault] if fault is not None else []
    )
    before = fault.all_input_nodes if fault is not None else []
    region = sorted(dict.fromkeys([*before, *region]), key=analysis.order.__getitem__)
    centre = candidate.anchor if fault is None and candidate is not None else fault
    found = {node: NodeRole("region") for node in _nearest(region, centre)}
    if fault is not None and layer.state == "declined":
        found[fault] = NodeRole("offending", "", layer.reason)
    return found


def _nearest(region: Sequence[Node], centre: Node | None) -> Sequence[Node]:
    if len(region) <= MOST_STEPS or centre is None:
        return region
    first = min(max(0, region.index(centre) - MOST_STEPS // 2), len(region) - MOST_STEPS)
    return region[first : first + MOST_STEPS]


# --- one node -------------------------------------------------------------------------------------------------------


def _step(node: Node, place: NodeRole, labels: Mapping[Node, str]) -> Step:
    return Step(
        name=node.name,
        op=_op(node),
        inputs=tuple(parent.name for parent in node.all_input_nodes),
        value=_value(node.meta.get("val")),
        role=place.role,
        branch=place.branch,
        finding=_in_users_words(place.finding, labels),
        label=labels.get(node),
        source=source_line(node),
    )


def _in_users_words(finding: str | None, labels: Mapping[Node, str]) -> str | None:
    """With what the user calls them instead of the names of inputs."""
    names = {node.name: label for node, label in labels.items()}
    return finding and re.sub(r"\barg\d+_1\b", lambda name: names.get(name[0], name[0]), finding)


def _emitted_step(node: Node, labels: Mapping[Node, str]) -> Step:
    role = _emitted_role(node)
    finding = "one call instead of the region" if role == "call" else None
    return _step(node, NodeRole(role, "", finding), labels)


def _emitted_role(node: Node) -> str:
    if _op(node) == "getitem":
        return "result"
    return (
        "view"
        if node.target in operations.VIEW or operations.is_movement(node)
        else "call"
        if _is_call(node)
        else "view"
    )


def _is_call(node: Node) -> bool:
    """The fused operation, or the launch of its kernel."""
    return not str(node.target).startswith("aten.") and len(node.all_input_nodes) > 2


def _op(node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    return str(getattr(node.target, "__name__", node.target)) if node.op != "get_attr" else "constant"


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT.get(dtype, dtype)} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple, dict)):
        return f"{len(value)} values"
    return "" if value is None else str(value)


def _runs(roles: Iterable[str]) -> tuple[tuple[str, int], ...]:
    runs: list[tuple[str, int]] = []
    for role in roles:
        if runs and runs[-1][0] == role:
            runs[-1] = (role, runs[-1][1] + 1)
        else:
            runs.append((role, 1))
    return tuple(runs)


def quote(source: str | None) -> Quote | None:
    """The lines about ``file:line``; None if they cannot be read."""
    if source is None:
        return None
    file, _, number = source.rpartition(":")
    line = int(number)
    first = max(1, line - CONTEXT)
    lines = [linecache.getline(file, each).rstrip("\n") for each in range(first, line + CONTEXT + 1)]
    return Quote(file, line, first, tuple(lines)) if any(lines) else None
