"""The post-grad graph without compiling: for ``explain``, for tests, and for ``fx_fusion.inner=eager``.

Inductor's own pipeline runs up to the point where its custom pass is called (AOTAutograd, decompositions, joint-graph
passes), so the graph is the one that the pass sees.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fx_fusion.config import Config
from fx_fusion.fusion_pass import FusionPass, cpu_by_default
from fx_fusion.graph.post_grad import compile_post_grad, input_names
from fx_fusion.graph.torch_compat import (
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    ShapeEnv,
    pytree,
    reset_dynamo,
)
from fx_fusion.kernels.capture_guard import only_warm
from fx_fusion.kernels.target import Target
from fx_fusion.observer import NOBODY, Observer
from fx_fusion.report import REPORTS, FusionReport


def compile_eager(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, observer: Observer = NOBODY
) -> Callable[..., Any]:
    """Rewrite the graph and run it node by node, uncompiled."""
    graph_pass = FusionPass(config, observer=observer)

    def finish(module: GraphModule, is_inference: bool) -> Callable[..., Any]:
        graph_pass(module.graph, is_inference)
        module.recompile()

        def run(*arguments: Any) -> Any:
            with only_warm("a Triton kernel"):
                return module(*arguments)

        return run

    return compile_post_grad(gm, example_inputs, finish)


def explain(fn: Callable[..., Any], *args: Any, target: str | None = None, **kwargs: Any) -> FusionReport:
    """What fx_fusion would do with ``fn(*args, **kwargs)``: traced on fake tensors, nothing is computed or allocated.

    A model on the meta device will do: a 235B model is explained on a laptop. The model, the arguments and any cache
    among them are left untouched.

    Args:
        fn: a module or a function, as one would give it to ``torch.compile``.
        target: check kernel contracts for this place (``"gfx942"``, ``"cuda"``, …); by default where the tensors are.
            They are traced on the CPU, so the attention operator may differ from the one that the target would get.

    Returns:
        The report; of several graphs (graph breaks), all layers in order.

    Raises:
        ValueError: `target` is unknown.
    """
    return explain_to(NOBODY, fn, args, kwargs, Config(target=target or home((fn, args, kwargs))))


def explain_to(
    observer: Observer, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: Config
) -> FusionReport:
    """As :func:`explain`, and tell `observer` every step of it, and the names of each graph's inputs first."""
    reports: list[FusionReport] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = REPORTS.snapshot()
        observer.names(input_names(gm))
        compiled = compile_eager(gm, example_inputs, config, observer)
        reports.extend(REPORTS.since(before))
        return compiled

    with _fake() as mode, cpu_by_default(), torch.no_grad():
        fake_fn, fake_args, fake_kwargs = _fakes(mode, (fn, tuple(args), dict(kwargs)))
        fake_fn(*fake_args, **fake_kwargs)  # a lazily allocated cache allocates itself here, not inside the graph
        reset_dynamo()
        try:
            torch.compile(fake_fn, backend=backend)(*fake_args, **fake_kwargs)
        finally:
            reset_dynamo()
    return merge(reports)


def merge(reports: Sequence[FusionReport]) -> FusionReport:
    """One report of several graphs; what is said of graphs without a store only counts if no graph has one."""
    with_store = [report for report in reports if report.concerns] or list(reports)
    names = dict.fromkeys(name for report in with_store for name in report.seconds)
    return FusionReport(
        tuple(layer for report in with_store for layer in report.layers),
        stores=sum(report.stores for report in with_store),
        nodes=sum(report.nodes for report in with_store),
        kernel=with_store[0].kernel if with_store else "auto",
        seconds={name: sum(report.seconds.get(name, 0.0) for report in with_store) for name in names},
    )


@contextlib.contextmanager
def _fake() -> Generator[FakeTensorMode]:

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        yield mode


def _fakes(mode: FakeTensorMode, value: Any) -> Any:
    """A deep copy in which every tensor is a fake one on the CPU.

    Inductor would fold computation on meta tensors away, and a build without CUDA cannot trace fake CUDA tensors.
    """
    copies: dict[int, Any] = {}
    with FakeCopyMode(mode):
        copied = copy.deepcopy(value, copies)
    for tensor in copies.values():
        if isinstance(tensor, FakeTensor):
            tensor.fake_device = torch.device("cpu")
    return copied


def home(value: Any) -> str:
    """The target that the tensors of `value` live on; the meta device stands for the CPU."""
    fn, args, kwargs = value
    parameters = fn.parameters() if isinstance(fn, torch.nn.Module) else ()
    tensors = (leaf for leaf in (*parameters, *pytree.tree_leaves((args, kwargs))) if isinstance(leaf, torch.Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return Target.of(device).name if device.type == "cuda" else "cpu"
