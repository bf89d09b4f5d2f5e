"""An argument of a node: the node that it is, and its fake value."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def node_of(value: Any) -> Node:
    """`value`, which must be a node."""
    assert isinstance(value, Node), value
    return value


def value_of(value: Any) -> Any:
    """The fake value of a node; of anything else, itself."""
    return value.meta["val"] if isinstance(value, Node) else value
