"""Branches of a few steps."""

from __future__ import annotations

import torch

from fx_fusion.graph.paths import Branch


def branch(build, dtype=torch.float32):
    """The branch that `build` makes of one [3, 8] placeholder."""
    graph = torch.fx.Graph()
    data = graph.placeholder("data")
    data.meta["val"] = torch.zeros(3, 8, dtype=dtype)

    def call(target, *args):
        node = graph.call_function(target, args)
        concrete = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*concrete)
        return node

    out = build(call, data)
    nodes = tuple(node for node in graph.nodes if node is not data)
    return Branch(data, data, out, nodes, ())
