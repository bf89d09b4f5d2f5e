"""What lies between the projections and the stores of a graph, found without asking the pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


def region(graph: Graph) -> tuple[list[Node], list[Node]]:
    """The nodes between the projections and the stores or the query's consumer, frontier included; the projections.

    Back from every store (where there is none, from every output) as far as matrix products, forward from each float
    found (the query shares the projection or the angles), and back again.
    """
    stores = [node for node in graph.nodes if is_store(node)]
    inside: dict[Node, None] = {}
    starts: dict[Node, None] = {}
    _walk_back([node.args[1] for node in stores] or list(graph.output_node().all_input_nodes), inside, starts)
    forward = [node for node in (*inside, *starts) if _is_float(node)]
    reached: list[Node] = []
    while forward:
        for user in forward.pop().users:
            if _is_step(user) and user not in inside and user not in reached:
                reached.append(user)
                forward.append(user)
    _walk_back(reached, inside, starts)
    return [node for node in graph.nodes if node in inside], [node for node in graph.nodes if node in starts]


def _walk_back(stack: list[Any], inside: dict[Node, None], starts: dict[Node, None]) -> None:
    while stack:
        node = stack.pop()
        if _is_product(node):
            starts[node] = None
        if node in inside or not _is_step(node):
            continue
        inside[node] = None
        stack.extend(node.all_input_nodes)


def _is_step(node: Node) -> bool:
    return node.op == "call_function" and not _is_product(node) and not is_store(node)


def _is_product(node: Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and any(word in name for word in ("mm.", "attention", "linear", "convolution"))


def is_store(node: Node) -> bool:
    return node.op == "call_function" and node.target is aten.copy_.default


def _is_float(value: Any) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and tensor.is_floating_point()


def tensor_of(value: Any) -> torch.Tensor | None:
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    return tensor if isinstance(tensor, torch.Tensor) else None
