"""The graphs that ``torch.compile`` would make of a model, each value on the device where the model puts it.

Nothing is computed: tensors are fake. Inductor's decompositions are applied, its own passes are not. While
:mod:`fx_fusion.trace` traces everything on the CPU, to see the graph that the fusion pass sees, this keeps devices
apart. A build of PyTorch without CUDA cannot index a fake CUDA tensor, so there the meta device stands for the GPU
while tracing, and is called ``cuda:0`` afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from fx_fusion.graph.post_grad import boxed, input_names, placeholders
from fx_fusion.graph.torch_compat import (
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    ShapeEnv,
    TracingContext,
    aot_module,
    counters,
    decompositions,
    dynamo_config,
    pytree,
    reset_dynamo,
)
from fx_fusion.graph.tracing import quiet

GPU = torch.device("cuda", 0)
_STAND_IN = torch.device("meta")
#: What Dynamo says where a list becomes a tensor on the meta device.
_LITERAL_ON_META = "Please convert all Tensors to FakeTensors first"


@dataclass(frozen=True)
class TracedGraph:
    """One graph.

    Attributes:
        dynamo: as Dynamo made it: the user's calls.
        aten: the same in ATen operations, functional but for the ``copy_`` that ends it for each mutated input.
        static: placeholders of `aten` whose address does not change: parameters, buffers, tensors marked static.
        breaks: why Dynamo ended the graph there, and the user's ``file:line``; None for the end of the function.
    """

    dynamo: GraphModule
    aten: GraphModule
    static: frozenset[str]
    breaks: tuple[str, str | None] | None


@dataclass
class Trace:
    """
    Attributes:
        graphs: all of them, in the order of execution.
        breaks: every reason that Dynamo counted for ending a graph, also where it made none.
        error: what ended the trace early, if anything did.
        devices_known: False if every tensor had to stand for one on the GPU.
    """

    graphs: list[TracedGraph] = field(default_factory=list[TracedGraph])
    breaks: list[str] = field(default_factory=list[str])
    error: Exception | None = None
    devices_known: bool = True


def trace(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], on_host: Sequence[torch.Tensor] = ()
) -> Trace:
    """Trace ``fn(*args, **kwargs)``; all of them are left untouched.

    If no tensor is on a GPU, all of them stand for tensors on one, but for those `on_host`, and for what ``Module.to``
    would leave behind: tensors that are plain attributes of a module.
    """
    gpu = GPU if torch.backends.cuda.is_built() else _STAND_IN
    traced = _trace((fn, tuple(args), kwargs), gpu, on_host)
    if gpu == _STAND_IN and _LITERAL_ON_META in str(traced.error):
        traced = replace(_trace((fn, tuple(args), kwargs), torch.device("cpu"), ()), devices_known=False)
    for graph in traced.graphs:
        _name_devices(graph.aten, gpu if traced.devices_known else torch.device("cpu"))
    return traced


def _trace(value: tuple[Any, Any, Any], gpu: torch.device, on_host: Sequence[torch.Tensor]) -> Trace:

    traced = Trace()
    breaks = Counter(counters["graph_break"])
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake_fn, fake_args, fake_kwargs = _fakes(mode, value, gpu, on_host)
        _settle(fake_fn, fake_args, fake_kwargs)
        reset_dynamo()
        try:
            with dynamo_config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
                torch.compile(fake_fn, backend=_recorder(traced))(*fake_args, **fake_kwargs)
        except Exception as error:
            traced.error = error
        finally:
            reset_dynamo()
    traced.breaks = [str(reason) for reason in Counter(counters["graph_break"]) - breaks]
    return traced


def _settle(fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """A lazily allocated cache allocates itself, and is marked, outside of a graph: let it.

    What fails here fails again while it is traced, so it is not logged twice.
    """
    with quiet(), contextlib.suppress(Exception):
        fn(*args, **kwargs)


def _recorder(traced: Trace) -> Callable[..., Any]:
    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = copy.deepcopy(gm.graph)

        def record(aten: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            _tell_names(gm, aten)
            traced.graphs.append(TracedGraph(GraphModule(gm, before), aten, _static(aten), _break_of(gm)))
            return boxed(aten)

        compiler: Any = record
        return aot_module(
            gm,
            example_inputs,
            fw_compiler=compiler,
            inference_compiler=compiler,
            decompositions=decompositions(),
            keep_inference_input_mutations=True,
        )

    return backend


def _tell_names(dynamo: GraphModule, aten: GraphModule) -> None:
    """Each placeholder's name as the user writes it: ``meta["user_name"]``."""
    names, ours = input_names(dynamo), placeholders(aten)
    for node, name in zip(ours, names, strict=True) if len(names) == len(ours) else ():
        node.meta["user_name"] = name


def _static(aten: GraphModule) -> frozenset[str]:
    context: Any = TracingContext.try_get()
    positions = getattr(getattr(context, "fw_metadata", None), "static_input_indices", None) or []
    names = [node.name for node in aten.graph.nodes if node.op == "placeholder"]
    return frozenset(names[position] for position in positions if position < len(names))


def _break_of(gm: GraphModule) -> tuple[str, str | None] | None:
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frames = [frame for frame in reason.user_stack or () if not frame.filename.startswith(str(torch.__path__[0]))]
    return str(reason.reason), f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _fakes(mode: FakeTensorMode, value: Any, gpu: torch.device, on_host: Sequence[torch.Tensor]) -> Any:
    """A deep copy in which every tensor is a fake one, on its own device or on what stands for the GPU."""
    memo: dict[int, Any] = {}
    with FakeCopyMode(mode):
        copied = copy.deepcopy(value, memo)
    # What deepcopy keeps alive are the originals.
    originals = [each for each in memo.get(id(memo), ()) if isinstance(each, torch.Tensor)]
    as_they_are = any(original.device.type == "cuda" for original in originals)
    left_behind = {id(tensor) for tensor in (*on_host, *_plain_attributes(value))}
    for original in originals:
        fake = memo[id(original)]
        if not isinstance(fake, FakeTensor):
            continue
        # Marks: a fixed address, a dynamic size.
        vars(fake).update({name: mark for name, mark in vars(original).items() if name.startswith("_dynamo_")})
        if not as_they_are:
            stays = id(original) in left_behind and original.device.type == "cpu"
            fake.fake_device = torch.device("cpu") if stays else gpu
    if not as_they_are:
        _move_noted_devices(memo, gpu)
    return copied


def _move_noted_devices(memo: dict[int, Any], gpu: torch.device) -> None:
    """Objects such as caches note the device of their tensors, and make others there."""
    for copied in list(memo.values()):
        if isinstance(copied, torch.Tensor):
            continue
        notes = copied if isinstance(copied, dict) else getattr(copied, "__dict__", {})
        for name, value in list(notes.items()):
            if isinstance(value, torch.device) and value.type in ("cpu", "meta"):
                notes[name] = gpu


def _plain_attributes(value: Any) -> Iterator[torch.Tensor]:
    """Tensors that modules hold as neither parameters nor buffers."""
    fn, args, kwargs = value
    for root in (fn, getattr(fn, "__self__", None), *pytree.tree_leaves((args, kwargs))):
        if not isinstance(root, torch.nn.Module):
            continue
        known = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        for module in root.modules():
            for attribute in vars(module).values():
                if isinstance(attribute, torch.Tensor) and id(attribute) not in known:
                    yield attribute


def _name_devices(gm: GraphModule, stood_for_it: torch.device) -> None:
    """What stood for the GPU is called so."""
    if stood_for_it == GPU:
        return

    def name(value: Any) -> Any:
        return GPU if isinstance(value, torch.device) and value == stood_for_it else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(name, node.args), pytree.tree_map(name, node.kwargs)
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor) and value.fake_device == stood_for_it:
                value.fake_device = GPU


def where_it_failed(error: Exception) -> str | None:
    """The user's ``file:line`` that Dynamo gives for an error, or the innermost one of its traceback outside torch."""
    told = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    if told:
        return ":".join(told[-1])
    root, here, place = str(torch.__path__[0]), __file__, None
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith((root, "<")) and file != here:
            place = f"{file}:{step.tb_lineno}"
        step = step.tb_next
    return place
