"""An option is declared once: with one field more, everything that is derived knows it, and no kernel is misled.

Options with a field `dummy`, and an operation that takes them, stand where the package has its own. The reference's
stand-in serves the option: it negates q.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from prologue import Prologue, arguments
from torch._subclasses import FakeTensorMode

import fx_fusion
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.kernels.call import to_arguments
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.operation import OPERATIONS, KernelUnavailable, Operation
from fx_fusion.kernels.qk_norm_rope_cache import examples, self_check
from fx_fusion.kernels.qk_norm_rope_cache import operation as declared
from fx_fusion.kernels.qk_norm_rope_cache.aiter.implementation import Aiter
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options, empty_results, with_typed_caches
from fx_fusion.kernels.qk_norm_rope_cache.reference import Reference
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization
from fx_fusion.kernels.qk_norm_rope_cache.triton.implementation import Triton
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call
from fx_fusion.kernels.target import Target
from fx_fusion.mutation.mutants import capture
from fx_fusion.patterns.qk_norm_rope_cache import fusion, lower
from fx_fusion.patterns.qk_norm_rope_cache.source_text import function, operands
from fx_fusion.testing import run

CPU = torch.device("cpu")
NAME = "qk_norm_rope_cache_with_a_dummy"

#: The declaration.
WithDummy = dataclasses.make_dataclass(
    "WithDummy", [("dummy", "bool", dataclasses.field(default=False))], bases=(Options,), frozen=True
)


class ServesDummy(Reference):
    serves = frozenset({"dummy"})

    def run(self, call, setting=None):
        q_out, k_out = super().run(call)
        return (-q_out if call.options.dummy else q_out), k_out


@pytest.fixture(scope="module")
def operation():
    made = Operation(NAME, Call, WithDummy, "(Tensor, Tensor)", empty=empty_results, decode=with_typed_caches)
    for implementation in (Triton(), Aiter(), ServesDummy()):
        made.register(implementation)
    yield made
    del OPERATIONS[NAME]


def told(call, dummy):
    """`call` with the options of this declaration."""
    return replace(call, options=WithDummy(**vars(call.options), dummy=dummy))


@pytest.fixture(params=[False, True], ids=["default", "set"])
def dummy(request):
    return request.param


@pytest.fixture
def call(dummy):
    return told(typical_call(Shape(4, 2, 64, 64, "bfloat16"), 3, CPU), dummy)


def overload(operation, call):
    return operation.overload(*call.tensors.values(), **to_arguments(call.options), implementation="reference")


# --- the operation --------------------------------------------------------------------------------------------------


def test_the_schema(operation):
    plain = declared.OPERATION.schema.partition("(")[2]
    assert operation.schema == f"{NAME}({plain}".replace("float8=None)", "float8=None, bool dummy=False)")
    assert operation.overload._schema.arguments[-1].name == "dummy"


def test_arguments(call, dummy):
    assert ("dummy" in to_arguments(call.options)) == dummy
    assert WithDummy.of(**to_arguments(call.options)) == call.options


def test_a_call(operation, call, dummy):
    expected, _ = Reference().run(call.map(torch.Tensor.clone))
    q_out, _ = overload(operation, call)
    assert torch.equal(q_out, -expected if dummy else expected)


def test_the_fake(operation, call):
    q_out, k_out = overload(operation, call)
    with FakeTensorMode() as mode:
        fake_q, fake_k = overload(operation, call.map(mode.from_tensor))
    for fake, real in ((fake_q, q_out), (fake_k, k_out)):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    options = {**to_arguments(call.options), "implementation": "reference"}
    torch.library.opcheck(operation.overload, tuple(call.tensors.values()), options)


def test_kernels_that_do_not_know_it_refuse_it(operation, call, dummy, monkeypatch):
    for kernel in (Triton, Aiter):
        monkeypatch.setattr(kernel, "unavailable", lambda self, target: None)
    reasons = {
        kernel: f"option dummy: the kernel {kernel} knows only False, found True" if dummy else None
        for kernel in ("triton", "aiter")
    }
    assert operation.eligible(call) == reasons
    for kernel, reason in reasons.items():
        if reason is None:
            assert operation.choose(kernel, call, Target("gfx942")) == kernel
            continue
        with pytest.raises(KernelUnavailable, match=f"cannot serve this call: {reason}"):
            operation.choose(kernel, call, Target("gfx942"))
    assert operation.choose("reference", call, Target("cpu")) == "reference"


# --- what is told by value reaches the rest -------------------------------------------------------------------------


@pytest.fixture
def in_its_place(operation, dummy, monkeypatch):
    """The declaration, where the package has its own. That it is set is what a reader would find."""
    options_of = lower._options
    monkeypatch.setattr(lower, "_options", lambda match: WithDummy(**vars(options_of(match)), dummy=dummy))
    for module in (lower, fusion, declared):
        monkeypatch.setattr(module, "OPERATION", operation)
    for module in (examples, declared):
        monkeypatch.setattr(module, "Options", WithDummy)


def assert_negated(actual, expected, yes):
    torch.testing.assert_close(actual, -expected if yes else expected)


class QAsItIs(Prologue):
    def consume(self, q, k, v, k_cache, v_cache):
        return q.flatten(1) * 1


@pytest.mark.usefixtures("in_its_place")
def test_a_graph(dummy):
    model, given = QAsItIs(), arguments()
    found = run(model, given)
    assert [layer.kernel for layer in found.report.fused] == ["reference"]
    assert_negated(found.outputs, model(*given), dummy)


@pytest.fixture
def match():
    analysis = GraphAnalysis(capture(QAsItIs(), arguments(), None).module.graph)
    built_in = fx_fusion.QkNormRopeCache()
    (candidate,), _ = built_in.find(analysis)
    return built_in.read(analysis, candidate, {}).match


@pytest.mark.usefixtures("in_its_place")
def test_the_node_in_a_graph(operation, match, dummy):
    """As the option where it is set, and not at all where it is not: other graphs stay as they were."""
    graph = match.key.out.graph
    lower.rewrite(graph, match, "reference")
    (node,) = [each for each in graph.nodes if operation.overload in each.args]
    assert node.kwargs.get("dummy") == (True if dummy else None)
    assert node.kwargs["implementation"] == "reference"


@pytest.mark.usefixtures("in_its_place")
def test_the_text_of_a_patch(match, dummy):
    source = function("fused", match, {}, "reference")
    assert ("        dummy=True,\n" in source) == dummy
    assert ("dummy" in source) == dummy
    namespace = {"fx_fusion": fx_fusion}
    exec(source, namespace)
    model, given = QAsItIs(), arguments()
    weights = model.q_weight, model.k_weight
    by_name = {
        "qkv": model.project(given[0]), "q_weight": weights[0], "k_weight": weights[1], "cos_sin": model.cos_sin_cache,
        "positions": given[1], "slots": given[2], "k_cache": given[3].clone(), "v_cache": given[4].clone(),
    }  # fmt: skip
    with torch.no_grad():
        q = namespace["fused"](*(by_name[operand.name] for operand in operands(match, {})))
        assert_negated(q.flatten(1), model(*given), dummy)


@pytest.mark.usefixtures("in_its_place")
def test_the_self_check_tells_it_apart(call, dummy):
    specialization = Specialization.of(call)
    assert ("dummy", dummy) in specialization.options
    assert examples.small_call(specialization).options.dummy == dummy
    self_check.clear()
    verdict = self_check.verdict("reference", ServesDummy().trial, specialization)
    self_check.clear()
    assert (verdict.reason is None) == (not dummy), "the check's own reference knows no dummy"
