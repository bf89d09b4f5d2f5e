"""What cannot be captured is found, at its line; what can be is not suspected; and PyTorch itself judges alike."""

from __future__ import annotations

import inspect

import pytest
import qwen3_vl_serving as serving
import torch
from hazard_examples import EXAMPLES, MaskedStore, Multiplies, StoresIntoArgument, keep, x
from models import Run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fx_fusion
from fx_fusion.graph.operations import aten
from fx_fusion.graph_capture import graphs, hazards
from fx_fusion.graph_capture.hazard_rules import devices, in_aten_graph

NO_CUDA = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="about builds of PyTorch without CUDA")


def traced(made, host=()):
    module, args = made
    return graphs.trace(module, args, {}, on_host=[args[i] for i in host])


def blocking(report):
    """All but notes."""
    return [hazard for hazard in report if hazard.severity != "note"]


# --- every hazard, and its remedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_hazard_is_found_at_its_line(name):
    example = EXAMPLES[name]
    report = hazards.report(traced(example.make(), example.host))
    found = [hazard for hazard in report if hazard.code == example.code]
    assert len(found) == 1 and blocking(report) == found, str(report)
    file, line = found[0].source.rsplit(":", 1)
    source, first = inspect.getsourcelines(type(example.make()[0]).forward)
    assert file.endswith("hazard_examples.py") and first < int(line) < first + len(source)
    assert found[0].fix in str(report) and found[0].source in str(report)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_remedy_is_clean(name):
    example = EXAMPLES[name]
    report = hazards.report(traced(example.remedy(), example.remedy_host))
    assert not blocking(report), str(report)
    assert report.graphs == 1


def test_inputs_are_called_as_the_user_calls_them():
    module, args = EXAMPLES["plain-attribute"].make()
    assert "the input self.scale, one number, is on the CPU" in str(fx_fusion.capture_hazards(module, *args))
    report = fx_fusion.capture_hazards(StoresIntoArgument(), x(), torch.zeros(16, 4), torch.arange(8))
    assert "the input cache of shape [16, 4] is written in place" in str(report)


def test_an_argument_that_is_marked_static_is_no_hazard():
    cache = torch.zeros(16, 4)
    torch._dynamo.mark_static_address(cache)
    assert not fx_fusion.capture_hazards(StoresIntoArgument(), x(), cache, torch.arange(8))


# --- no false alarms ----------------------------------------------------------------------------------------------


def test_the_serving_example_is_clean():
    model = serving.Decoder(serving.DecoderConfig(num_layers=1))
    requests = [serving.Request.prompt([5, 7, 9], None, [1, 2]), serving.Request.prompt([8], None, [3, 4])]
    batch = serving.make_batch(requests, [2, 0], 16, torch.device("cpu"))
    report = fx_fusion.capture_hazards(model, batch)
    assert not report and len(report) == 0, str(report)
    assert "capture hazards: none (1 graph," in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_text"])
def test_transformers_models_are_clean(family):
    run = Run(family)
    run.prefill()
    inputs = run.inputs(torch.ones(2, 1, dtype=torch.int64))
    before = [tensor.clone() for tensor in run.caches()]
    report = fx_fusion.capture_hazards(run.model, **inputs)
    assert not report, str(report)
    assert all(map(torch.equal, run.caches(), before))


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model, args = serving.RMSNorm(64, 1e-6), (torch.ones(3, 64),)
    assert not fx_fusion.capture_hazards(model, *args)


def test_a_tensor_that_inductor_moves_is_no_hazard():
    class Moved(nn.Module):
        def forward(self, x):
            return x[torch.arange(3)]

    class Stays(nn.Module):
        def forward(self, x):
            return x * 2, torch.arange(3) * 2

    assert not fx_fusion.capture_hazards(Moved(), x())
    assert fx_fusion.capture_hazards(Stays(), x()).codes == {"capture.host_compute"}


# --- what Dynamo says ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


class Lists(nn.Module):
    def forward(self, x):
        return x * x.tolist()[0][0]


class Prints(nn.Module):
    def forward(self, x):
        y = x + 1
        print("between", end="")
        return y * y.mean()


class Mixes(nn.Module):
    def forward(self, x):
        return x + torch.arange(4)


class Literal(nn.Module):
    def forward(self, x):
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)


@pytest.mark.parametrize(
    ("module", "code", "severity"),
    [
        (Branches(), "capture.item", "error"),
        (Lists(), "capture.item", "error"),
        (Prints(), "capture.graph_break", "warning"),
        (Mixes(), "capture.untraced", "error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_graph(module, code, severity):
    report = fx_fusion.capture_hazards(module, x())
    assert [(hazard.code, hazard.severity) for hazard in report] == [(code, severity)], str(report)
    if not isinstance(module, Lists):
        # Dynamo makes no graph of that one, and tells no line.
        assert "test_hazards.py" in report[0].source


@NO_CUDA
def test_devices_that_cannot_be_told_apart_are_said_to_be_so():
    report = fx_fusion.capture_hazards(Literal(), x())
    assert report.codes == {"capture.devices_unknown"} and report.graphs == 1


def test_symbolic_sizes():
    tokens = x()
    torch._dynamo.mark_dynamic(tokens, 0)
    report = fx_fusion.capture_hazards(Multiplies(), tokens, torch.tensor(2.0))
    assert report.codes == {"capture.dynamic_shape"} and report[0].severity == "warning"


# --- rules that need other graphs ---------------------------------------------------------------------------------


def codes(gm, static=()):
    return {found.code for found in in_aten_graph(gm.graph, static)}


def test_several_gpus():
    with FakeTensorMode():
        args = torch.empty(4, device="cuda:0"), torch.empty(4, device="cuda:1")
        two = make_fx(lambda a, b: (aten.mul.Tensor(a, 2), aten.mul.Tensor(b, 2)))(*args)
        one = make_fx(lambda a, b: (aten.mul.Tensor(a, 2), aten.mul.Tensor(b, 2)))(args[0], args[0])
    assert codes(two) == {"capture.several_gpus"}
    assert codes(one) == set()


def test_a_graph_on_the_cpu_has_no_hazards():
    with FakeTensorMode():
        gm = make_fx(lambda a: aten.mul.Tensor(a, aten.rand.default([4])))(torch.empty(4))
    assert codes(gm) == set()


def test_an_operation_that_says_so_is_unsafe():
    tags = (torch.Tag.cudagraph_unsafe,)
    with torch.library._scoped_library("hazards_test", "DEF") as library:
        library.define("unsafe(Tensor x) -> Tensor", tags=tags)
        library.define("safe(Tensor x) -> Tensor")
        for name in ("unsafe", "safe"):
            torch.library.register_fake(f"hazards_test::{name}", torch.empty_like, lib=library)
        ops = torch.ops.hazards_test
        with FakeTensorMode():
            arg = torch.empty(4, device="cuda:0")
            assert codes(make_fx(lambda a: ops.unsafe(a))(arg)) == {"capture.unsafe_op"}
            assert codes(make_fx(lambda a: ops.safe(a))(arg)) == set()


def test_collectives_are_noted():
    collectives = pytest.importorskip("torch.distributed._functional_collectives")
    assert collectives is not None
    with FakeTensorMode():
        reduce = torch.ops._c10d_functional.all_reduce.default
        gm = make_fx(lambda a: torch.ops._c10d_functional.wait_tensor.default(reduce(a, "sum", "tp")))(
            torch.empty(4, device="cuda:0")
        )
    assert codes(gm) == {"capture.collective"}


def test_a_storage_that_is_replaced():
    graph = torch.fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(4, device="cuda:0") for _ in range(2)]
    target, source = (graph.placeholder(name) for name in ("target", "source"))
    for node, value in zip((target, source), values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(aten.set_.source_Tensor, (target, source))
    call.meta["val"] = values[0]
    graph.output(())
    assert {found.code for found in in_aten_graph(graph)} == {"capture.rebound_input"}


# --- PyTorch's own verdict ----------------------------------------------------------------------------------------


def refusals(graph):
    """By what Inductor's CUDA graphs would refuse the graph; asked as a whole, not in partitions."""
    from torch._inductor import config
    from torch._inductor import cudagraph_utils as utils
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    inputs = graphs.placeholders(graph.aten)
    places = {}
    for node in graph.aten.graph.nodes:
        for device in devices(node):
            places.setdefault(device, node)
    mutated = [node.args[0] for node in graph.aten.graph.nodes if node.target is aten.copy_.default]
    static = [i for i, node in enumerate(inputs) if node.name in graph.static]
    written = [i for i, node in enumerate(inputs) if node in mutated]
    with config.patch({"graph_partition": False, "triton.cudagraphs": True}):
        unsafe = get_first_incompatible_cudagraph_node(graph.aten)
        reasons = {
            "devices": utils.check_multiple_devices_or_any_cpu_nodes(dict(places)),
            "unsafe": unsafe and str(unsafe.target),
            "mutation": utils.check_for_mutation_ignore_cuda_graph_managed_tensor(
                graph.aten, {inputs[i].name for i in written}, set(written), static
            ),
        }
    return {kind for kind, reason in reasons.items() if reason}


#: By what PyTorch refuses the graph. It is not asked about what happens before there is one: Dynamo by default ends the
#: graph at `item`, and what it makes of it otherwise waits for nothing; it cannot trace pin_memory.
VERDICTS = {
    "item": set(),
    "nonzero": {"unsafe"},
    "boolean-store": {"unsafe"},
    "to-host": {"devices"},
    "host-scale": {"devices"},
    "host-index": {"devices"},
    "host-table": {"devices"},
    "plain-attribute": {"devices"},
    "cpu-random": {"devices"},
    "synchronize": set(),
    "argument-cache": {"mutation"},
}


@pytest.mark.parametrize("name", VERDICTS)
def test_pytorch_judges_alike(name):
    example = EXAMPLES[name]
    trace = traced(example.make(), example.host)
    assert set().union(*map(refusals, trace.graphs)) == VERDICTS[name]
    assert blocking(hazards.report(trace))
    trace = traced(example.remedy(), example.remedy_host)
    assert set().union(*map(refusals, trace.graphs)) == set()


# --- the report ---------------------------------------------------------------------------------------------------


def test_what_recurs_at_one_line_is_counted():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(MaskedStore() for _ in range(2))
            self.scale = torch.tensor(2.0)

        def forward(self, x, cache, keep):
            for part in self.parts:
                x = x + part(x, keep) * self.scale.to(x.device)
            return x

    report = fx_fusion.capture_hazards(Twice(), x(), torch.zeros(8, 4), keep())
    assert [(hazard.code, hazard.count) for hazard in report] == [("capture.host_to_device", 2)], str(report)
    assert "(2 times)" in str(report)


def test_the_report_is_a_sequence_worst_first():
    class Several(nn.Module):
        def forward(self, x, cache):
            cache.add_(1)
            return x + torch.rand(4, device=x.device), x.sum().cpu()

    report = fx_fusion.capture_hazards(Several(), x(), torch.zeros(4))
    assert [hazard.severity for hazard in report] == ["error", "warning", "note"]
    assert report.errors == [report[0]] and bool(report)
    assert "1 error, 1 warning, 1 note" in str(report)
