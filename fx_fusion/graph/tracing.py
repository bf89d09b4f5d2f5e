"""A plain PyTorch function as a functional ATen graph, the way Inductor's pipeline would write it.

In-place changes of arguments become further results; a mutable custom operation becomes ``auto_functionalized``; a
Triton kernel inside ``torch.library.triton_op`` becomes a launch that Inductor makes itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fx_fusion.graph.edit import fake_run
from fx_fusion.graph.torch_compat import (
    FAKE_TENSOR_LOG,
    FakeTensor,
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    decompositions,
    disable_current_modes,
    enable_python_dispatcher,
    make_fx,
    pytree,
    tracing,
    unwrapped,
)


class NotTraceable(Exception):
    """The function cannot be written as a graph of these tensors; the message says why."""


@dataclass(frozen=True, eq=False)
class Functional:
    """
    Attributes:
        module: owns ``graph``; its placeholders are the tensors, in order.
        inputs: the placeholder of each tensor parameter.
        results: what the function returns, flattened, then each changed argument as it is afterwards. No node twice.
        returned: for each returned tensor, its place in `results`.
        mutated: for each changed parameter, its place in `results`.
    """

    module: GraphModule
    inputs: dict[str, Node]
    results: tuple[Node, ...]
    returned: tuple[int, ...]
    mutated: dict[str, int]

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def nodes(self) -> list[Node]:
        return [node for node in self.module.graph.nodes if node.op == "call_function"]


def trace(fn: Callable[..., Any], tensors: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> Functional:
    """`fn` called with fake `tensors` (all of one fake mode) and with `others`, all by name.

    Raises:
        NotTraceable: `fn` raised, returns something else than tensors, returns an argument as it came, or uses a tensor
            that is no parameter.
    """
    names = list(tensors)
    leaves: list[Any] = []

    def run(*given: torch.Tensor) -> list[Any]:
        result = fn(**dict(zip(names, given, strict=True)), **others)
        leaves[:] = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    module = functional_graph(run, list(tensors.values()))
    stranger = next((leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)), None)
    if stranger is not None:
        raise NotTraceable(f"it returns {stranger!r}; expected tensors")
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            # It returns nothing of its own.
            with _tracing(tensors.values()):
                node.meta["val"] = fake_run(node, None)
    return _functional(module, names)


def functional_graph(
    fn: Callable[..., Any], inputs: Sequence[Any], decomposed: Mapping[Any, Callable[..., Any]] | None = None
) -> GraphModule:
    """``fn(*inputs)`` as a graph that returns (what `fn` returns, each input as it is afterwards).

    Args:
        inputs: fake tensors, all of one mode, and symbolic sizes.
        decomposed: decompositions besides those that Inductor applies.

    Raises:
        NotTraceable: `fn` raised; with the first line of what it said.
    """

    def functional(*given: Any) -> Any:
        with FunctionalTensorMode():
            wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, list(given))
            return pytree.tree_map_only(FunctionalTensor, unwrapped, (fn(*wrapped), wrapped))

    try:
        with _tracing(inputs):
            table = {**decompositions(), **(decomposed or {})}
            return make_fx(functional, decomposition_table=table, tracing_mode="real")(*inputs)
    except Exception as error:
        raise NotTraceable(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """PyTorch logs a traceback for every operation that refuses its operands: here that is nothing unusual."""
    before = FAKE_TENSOR_LOG.disabled
    FAKE_TENSOR_LOG.disabled = True
    try:
        yield
    finally:
        FAKE_TENSOR_LOG.disabled = before


def fakes_like(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Fake CPU tensors of these shapes and dtypes."""
    with disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        return {name: torch.empty(shape, dtype=dtype, device="cpu") for name, (shape, dtype) in shapes.items()}


@contextlib.contextmanager
def _tracing(tensors: Iterable[Any]) -> Generator[None]:
    mode = next(tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))
    with quiet(), disable_current_modes(), mode, enable_python_dispatcher(), torch.no_grad(), tracing(None):
        yield


def _functional(module: GraphModule, names: list[str]) -> Functional:
    graph = module.graph
    constant = next((node for node in graph.nodes if node.op == "get_attr" and _is_tensor(module, node)), None)
    if constant is not None:
        raise NotTraceable("it uses a tensor that is no parameter; make it one")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(names, placeholders, strict=True))
    output: Any = graph.output_node().args[0]
    returned, after = output
    plain = next((node for node in returned if node in placeholders), None)
    if plain is not None:
        raise NotTraceable(f"it returns its argument {names[placeholders.index(plain)]!r} as it came")
    changed = {name: node for name, node in zip(names, after, strict=True) if node is not inputs[name]}
    results = list(dict.fromkeys([*returned, *changed.values()]))
    if not results:
        raise NotTraceable("it returns nothing and changes no argument")
    return Functional(
        module,
        inputs,
        tuple(results),
        tuple(results.index(node) for node in returned),
        {name: results.index(node) for name, node in changed.items()},
    )


def _is_tensor(module: GraphModule, node: Node) -> bool:
    return isinstance(getattr(module, str(node.target), None), torch.Tensor)
