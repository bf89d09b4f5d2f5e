"""The rules by which hazards are found: each asks one question of one node, and answers with a code and a reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fx_fusion.graph.operations import COPIES, aten
from fx_fusion.graph.torch_compat import (
    HigherOrderOperator,
    OpOverload,
    free_unbacked_symbols,
    move_constructors,
    pytree,
    uncapturable_operations,
)


class Found(NamedTuple):
    """What a rule found: a key of :data:`fx_fusion.graph_capture.hazards.HAZARDS`, what was seen, and where."""

    code: str
    reason: str
    node: Node | None = None


# --- what Dynamo saw ----------------------------------------------------------------------------------------------

#: Calls that AOTAutograd may replace by something else, so that they are looked for before.
_METHODS = {"item": "capture.item", "tolist": "capture.item", "pin_memory": "capture.pin_memory"}


def in_dynamo_graph(gm: GraphModule) -> list[Found]:
    """Hazards among the user's own calls."""
    found: list[Found] = []
    for node in gm.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op == "call_method" and name in _METHODS:
            found.append(Found(_METHODS[name], f"{name}() is called on {node.args[0]}", node))
        elif "synchronize" in str(name) and node.op == "call_function":
            found.append(Found("capture.synchronize", f"{name} is called", node))
    return found


# --- what PyTorch would compile -----------------------------------------------------------------------------------


class View:
    """A functional ATen graph, and what several rules ask about it."""

    def __init__(self, graph: Graph, static: Collection[str]) -> None:
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.static = static
        self.moved = _moved_to_the_gpu(graph)
        everywhere = {device for node in self.nodes for device in devices(node)}
        self.gpus = sorted((device for device in everywhere if device.type == "cuda"), key=str)

    def stays_on_host(self, node: Node) -> bool:
        return node not in self.moved and any(device.type == "cpu" for device in devices(node))


def devices(node: Node) -> set[torch.device]:
    """Where the tensors are that `node` holds."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def on_gpu(node: Node) -> bool:
    return any(device.type == "cuda" for device in devices(node))


Rule = Callable[[View, Node], "tuple[str, str] | None"]


def in_aten_graph(graph: Graph, static: Collection[str] = ()) -> list[Found]:
    """Hazards of a functional ATen graph that works on a GPU; none if it does not.

    Args:
        graph: as Inductor gets it, every node with its fake value.
        static: names of the placeholders whose address is fixed.
    """
    view = View(graph, static)
    if not view.gpus:
        return []
    found = list(_of_the_graph(view))
    for node in view.nodes:
        for rule in _RULES:
            told = rule(view, node)
            if told is not None:
                found.append(Found(*told, node))
                break
    return found


def _of_the_graph(view: View) -> Iterator[Found]:
    if len(view.gpus) > 1:
        yield Found("capture.several_gpus", f"tensors lie on {', '.join(map(str, view.gpus))}")
    symbolic = [node.name for node in view.nodes if node.op == "placeholder" and _is_symbolic(node)]
    if symbolic:
        yield Found("capture.dynamic_shape", f"sizes of {', '.join(symbolic[:4])} are symbolic")


def _is_symbolic(node: Node) -> bool:
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) and not size.node.expr.is_number for size in sizes)


def _moved_to_the_gpu(graph: Graph) -> frozenset[Node]:
    """Tensors made on the CPU that Inductor makes on the GPU instead, and all that is computed from them alone."""
    if not any(node.op == "call_function" and _on_host(node) for node in graph.nodes):
        return frozenset()
    copied = Graph()
    nodes: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, nodes))
    for node, its_copy in nodes.items():
        its_copy.meta = dict(node.meta)
    before = {node: its_copy.kwargs.get("device") for node, its_copy in nodes.items()}
    move_constructors(copied, "cuda")
    moved: set[Node] = set()
    for node in nodes:
        sources = [parent for parent in node.all_input_nodes if _on_host(parent)]
        made_there = nodes[node].kwargs.get("device") != before[node]
        if made_there or (_on_host(node) and sources and all(source in moved for source in sources)):
            moved.add(node)
    return frozenset(moved)


def _on_host(node: Node) -> bool:
    return any(device.type == "cpu" for device in devices(node))


_REBINDS = ("aten.set_.",)
_COLLECTIVES = ("_c10d_functional", "c10d", "_c10d_functional_autograd", "_dtensor", "symm_mem")


def copied_from(node: Node) -> Node | None:
    """What `node` is a copy of on another kind of device; None if it is no such copy."""
    if node.target not in COPIES:
        return None
    source = node.args[COPIES[node.target]]
    if not isinstance(source, Node) or {d.type for d in devices(source)} == {d.type for d in devices(node)}:
        return None
    return source


def waits_for(node: Node) -> str | None:
    """Why the host must wait for the device to know `node`, or None."""
    if node.target is aten._local_scalar_dense.default:
        return f"{node.args[0]} is read back"
    known = {symbol for parent in node.all_input_nodes for symbol in _unbacked(parent)}
    if _unbacked(node) <= known or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    return f"the size of {node.target} depends on values"


def _transfer(view: View, node: Node) -> tuple[str, str] | None:
    source = copied_from(node)
    if source is None or source.op == "get_attr":
        return None
    if on_gpu(source):
        return "capture.device_to_host", f"{_told_name(source)} is copied to the CPU"
    if not view.stays_on_host(source):
        return None
    if _is_drawn(source):
        return "capture.host_random", f"{source.target} draws on the CPU"
    return "capture.host_to_device", f"{_told_name(source)} is copied from the CPU"


def _host_input(view: View, node: Node) -> tuple[str, str] | None:
    """A tensor on the CPU that work on the GPU takes as it is; copies are another hazard, at the copy."""
    if node.op != "placeholder" or not view.stays_on_host(node):
        return None
    users = [user for user in node.users if user.target not in COPIES and user.op != "output"]
    if not users:
        return None
    value: torch.Tensor = node.meta["val"]
    name = _told_name(node)
    what = "one number" if value.numel() == 1 else f"of shape {list(value.shape)}"
    return "capture.host_input", f"{name}, {what}, is on the CPU"


def _told_name(node: Node) -> str:
    """An input as the user knows it, as far as the trace tells."""
    return f"the input {node.meta.get('user_name') or node.name}" if node.op == "placeholder" else str(node.target)


def _host_compute(view: View, node: Node) -> tuple[str, str] | None:
    """Where a value on the CPU begins; what follows from it is no other hazard."""
    if node.op != "call_function" or not view.stays_on_host(node) or node.target in COPIES:
        return None
    if any(_on_host(parent) for parent in node.all_input_nodes):
        return None
    if node.users and all(user.target in COPIES for user in node.users):
        return None
    if _is_drawn(node):
        return "capture.host_random", f"{node.target} draws on the CPU"
    return "capture.host_compute", f"{node.target} makes a tensor on the CPU"


def _waits(view: View, node: Node) -> tuple[str, str] | None:
    reason = waits_for(node) if node.op == "call_function" else None
    if reason is None:
        return None
    read_back = node.target is aten._local_scalar_dense.default
    return "capture.item" if read_back else "capture.size_from_data", reason


def _unbacked(node: Node) -> set[Any]:
    """The sizes and numbers of `node` that no one knows before it has run."""
    value: Any = node.meta.get("val")
    return set(free_unbacked_symbols(value)) if value is not None else set()


def _rebound(view: View, node: Node) -> tuple[str, str] | None:
    if str(node.target).startswith(_REBINDS) and node.args and _is_input(node.args[0]):
        return "capture.rebound_input", f"{node.args[0]} gets another storage"
    return None


def _mutated(view: View, node: Node) -> tuple[str, str] | None:
    if node.target is not aten.copy_.default or not _is_input(node.args[0]):
        return None
    target: Any = node.args[0]
    if target.name in view.static or not on_gpu(target):
        return None
    shape = list(target.meta["val"].shape)
    return "capture.mutated_input", f"{_told_name(target)} of shape {shape} is written in place"


def _is_input(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "placeholder"


def _unsafe(view: View, node: Node) -> tuple[str, str] | None:
    target: Any = node.target
    if node.op != "call_function":
        return None
    if target in (aten.index_put.default, aten._unsafe_index_put.default):
        indices = [index for index in pytree.tree_leaves(node.args[1]) if isinstance(index, Node)]
        if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices):
            return "capture.unsafe_op", "a boolean index of a store: its length is read back"
    tags = target.tags if isinstance(target, OpOverload) else ()
    if getattr(torch.Tag, "cudagraph_unsafe", None) in tags or str(target) in _forbidden():
        return "capture.unsafe_op", f"PyTorch captures no {target}"
    if isinstance(target, HigherOrderOperator) and target.name() in ("cond", "while_loop"):
        return "capture.control_flow", f"torch.{target.name()} reads its condition on the host"
    return None


def _forbidden() -> Collection[str]:
    """PyTorch's own list, less what is told by another name here."""
    told = {"aten._local_scalar_dense", "aten._assert_scalar"}
    return set(uncapturable_operations()) - told


def _stream(view: View, node: Node) -> tuple[str, str] | None:
    if getattr(node.target, "namespace", "") == "streams":
        return "capture.stream", f"{node.target}"
    return None


def _random(view: View, node: Node) -> tuple[str, str] | None:
    return ("capture.random", f"{node.target} draws on the GPU") if _is_drawn(node) and on_gpu(node) else None


def _is_drawn(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _collective(view: View, node: Node) -> tuple[str, str] | None:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in _COLLECTIVES:
        return None
    if "wait_tensor" in str(target):
        return None
    return "capture.collective", f"{target}"


#: In this order; the first that has something to say about a node says it.
_RULES: tuple[Rule, ...] = (
    _transfer, _host_input, _host_compute, _waits, _rebound, _mutated, _unsafe, _stream, _random, _collective,
)  # fmt: skip
