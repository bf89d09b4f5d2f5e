"""The graph that Inductor hands to a custom pass, without compiling it, and what the user calls its inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from fx_fusion.graph.torch_compat import compile_fx, view_to_reshape


def compile_post_grad(
    gm: GraphModule, example_inputs: Sequence[Any], finish: Callable[[GraphModule, bool], Callable[..., Any]]
) -> Callable[..., Any]:
    """Inductor's pipeline up to the point where it calls its custom pass: AOTAutograd, decompositions, joint passes.

    Args:
        gm: Dynamo's graph.
        finish: gets the post-grad graph, and whether it is for inference; returns what runs in its place.
    """

    def inner(module: GraphModule, _: Sequence[Any], **options: Any) -> Callable[..., Any]:
        view_to_reshape(module)
        return boxed(finish(module, bool(options.get("is_inference", False))))

    return compile_fx(gm, example_inputs, inner_compile=inner, config_patches={"force_disable_caches": True})


def boxed(fn: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """`fn` as AOTAutograd calls it: with a list, emptied so that inputs can be freed early."""

    def call(inputs: list[Any]) -> Any:
        arguments = list(inputs)
        inputs.clear()
        return fn(*arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def input_names(gm: GraphModule) -> list[str]:
    """What the user calls each input of Dynamo's graph: ``self.layers.0.self_attn.q_norm.weight``."""
    sources = [(getattr(node.meta.get("grapharg"), "source", None), str(node.target)) for node in placeholders(gm)]
    return [_user_name(source, fallback) for source, fallback in sources]


def _user_name(source: Any, fallback: str) -> str:
    """``L['self']._modules['norm']._parameters['weight']`` is ``self.norm.weight``."""
    try:
        name = str(source.name() if callable(source.name) else source.name)
    except (AttributeError, NotImplementedError):
        return fallback
    name = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)
    name = re.sub(r"^L\['kwargs'\]\['(\w+)'\]", r"\1", name)
    return re.sub(r"[LG]\['(\w+)'\]", r"\1", name)
