"""The operation, derived from its declaration, and the kernels that register themselves for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.problem import prepare

import fx_fusion
from fx_fusion.config import Config, OptionError
from fx_fusion.decline import Decline
from fx_fusion.kernels.call import (
    WRITTEN,
    AnyCall,
    changed_defaults,
    schema,
    tensor_names,
    to_arguments,
    written_names,
)
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.operation import Implementation, KernelUnavailable, kernel_names
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.reference import Reference
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call
from fx_fusion.kernels.target import Target

CPU = torch.device("cpu")


@pytest.fixture
def call():
    return typical_call(Shape(4, 2, 64, 64, "float32"), 3, CPU)


class Negating(Reference):
    """Unlike the reference, so that it shows which of them ran."""

    name = "negating"
    fast = True

    def run(self, call, setting=None):
        q_out, k_out = super().run(call)
        return -q_out, k_out


@pytest.fixture
def register():
    """Registers an implementation for the time of a test."""
    registered = []

    def register(implementation):
        registered.append(OPERATION.register(implementation))
        return registered[-1]

    yield register
    for each in registered:
        each.remove()


# --- what is derived ------------------------------------------------------------------------------------------------

SCHEMA = (
    "qk_norm_rope_cache(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "Tensor? positions, Tensor slots, Tensor? blocks, Tensor? k_scale, Tensor? v_scale, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, *, SymInt[] k_layout, SymInt[] v_layout, float? k_scale_value, float? v_scale_value, "
    "float? q_eps, float? k_eps, bool gemma_norm, int rotary_dim, bool is_neox, int[] axes, bool saturate, "
    "bool skip_negative_slots, bool return_k, str implementation, str? float8=None) -> (Tensor, Tensor)"
)


def test_the_schema():
    """Graphs that were compiled and saved hold calls of it."""
    assert OPERATION.schema == SCHEMA
    registered = OPERATION.overload._schema
    assert torch._C.parse_schema(f"fx_fusion::{SCHEMA}") == registered
    assert torch.Tag.needs_exact_strides in OPERATION.overload.tags


def test_names_are_those_of_the_schema():
    arguments = [argument.name for argument in OPERATION.overload._schema.arguments]
    assert list(tensor_names(Call)) == arguments[: len(tensor_names(Call))]
    written = [argument.name for argument in OPERATION.overload._schema.arguments if argument.is_write]
    assert list(OPERATION.written) == list(written_names(Call)) == written == ["k_cache", "v_cache"]


@dataclass(frozen=True)
class OtherCall(AnyCall[Any]):
    x: Any
    y: Any | None
    out: Any = dataclasses.field(metadata=WRITTEN)
    options: OtherOptions


@dataclass(frozen=True)
class OtherOptions:
    sizes: tuple[int, ...]
    factor: float | None = None
    flag: bool = False
    count: int = 3
    bias: float = 0.5


def test_the_schema_of_another_declaration():
    derived = schema(OtherCall, OtherOptions, "Tensor")
    assert derived == (
        "(Tensor x, Tensor? y, Tensor(a!) out, *, int[] sizes, str implementation, float? factor=None, "
        "bool flag=False, int count=3, float bias=0.5) -> Tensor"
    )
    parsed = torch._C.parse_schema(f"fx_fusion::other{derived}")
    defaults = {each.name: each.default_value for each in parsed.arguments if each.has_default_value()}
    assert defaults == {"factor": None, "flag": False, "count": 3, "bias": 0.5}


def test_the_default_of_a_text():
    """A schema has texts in quotes."""
    options = dataclasses.make_dataclass("Named", [("mode", "str", dataclasses.field(default="fast"))], frozen=True)
    (parsed,) = [
        each
        for each in torch._C.parse_schema(f"fx_fusion::named{schema(OtherCall, options, 'Tensor')}").arguments
        if each.name == "mode"
    ]
    assert parsed.default_value == "fast"


def test_an_option_that_no_schema_has():
    options = dataclasses.make_dataclass("Mapped", [("table", "dict[str, int]")], frozen=True)
    with pytest.raises(TypeError, match=r"option table: expected one of bool, int, .*, found dict\[str, int\]"):
        schema(OtherCall, options, "Tensor")


@pytest.mark.parametrize("name", ["plain", "shuffle", "e4m3fn-scaled", "e5m2-saturated", "two-eps", "no-norm", "rows"])
@pytest.mark.parametrize("float8", [None, "float8_e5m2"])
def test_options_come_back_from_their_arguments(name, float8):
    options = replace(prepare(VARIANTS[name]).options, float8=float8)
    arguments = to_arguments(options)
    assert Options.of(**arguments) == options
    assert not any(isinstance(value, tuple) for value in arguments.values())
    assert ("float8" in arguments) == (float8 is not None)
    assert set(arguments) >= {field.name for field in dataclasses.fields(Options)} - {"float8"}


def test_defaults_that_were_changed(call):
    assert changed_defaults(call.options) == {}
    assert changed_defaults(replace(call.options, q_eps=0.5, return_k=True)) == {}
    assert changed_defaults(replace(call.options, float8="float8_e5m2")) == {"float8": (None, "float8_e5m2")}
    assert changed_defaults(OtherOptions((1,), count=4, bias=0.5)) == {"count": (3, 4)}


def test_a_call_of_other_values(call):
    shapes = call.map(lambda tensor: tuple(tensor.shape))
    assert shapes.q == (1, 3, 4, 64)
    assert shapes.k_scale is None
    assert shapes.options is call.options
    assert list(call.tensors) == list(tensor_names(Call))


# --- registering ----------------------------------------------------------------------------------------------------


def names():
    return [each.name for each in OPERATION]


def run(call, implementation):
    arguments = to_arguments(call.options)
    return OPERATION.overload(*call.tensors.values(), **arguments, implementation=implementation)


def test_a_registered_kernel_serves_until_it_is_removed(register, call):
    before = names()
    registered = register(Negating())
    assert names() == [*before, "negating"]
    assert kernel_names() == ("auto", *before, "negating")
    assert Config(kernel="negating").kernel == "negating"
    assert OPERATION.implementation("negating") is registered.implementation
    assert torch.equal(run(call, "negating")[0], -run(call, "reference")[0])
    for _ in range(2):
        registered.remove()
        assert names() == before
    with pytest.raises(ValueError, match=r"implementation must be one of \['aiter', 'reference', 'triton'\], got 'neg"):
        run(call, "negating")
    with pytest.raises(OptionError, match=r"fx_fusion\.kernel must be one of"):
        Config(kernel="negating")


def test_the_order_is_that_of_registration():
    assert names() == ["triton", "aiter", "reference"]
    assert [each.name for each in OPERATION if each.fast] == ["triton", "aiter"]


def test_a_name_is_taken_once(register):
    registered = register(Negating())
    for name in ("negating", "reference", "auto"):
        other = Negating()
        other.name = name
        with pytest.raises(ValueError, match=f"register: a kernel named '{name}' is there already"):
            register(other)
    registered.remove()
    again = register(Negating())
    registered.remove()
    assert OPERATION.implementation("negating") is again.implementation, "an old registration ends itself alone"


class Nameless(Implementation[Any]):
    def run(self, call, setting=None):
        raise AssertionError


@pytest.mark.parametrize("wrong", [Negating, Nameless(), object(), None], ids=["class", "nameless", "object", "none"])
def test_only_named_implementations_are_registered(register, wrong):
    before = names()
    with pytest.raises(TypeError, match=r"register: expected a fx_fusion.Implementation with a name, got"):
        register(wrong)
    assert names() == before


def test_the_entry_for_people_registers_too(call):
    registered = fx_fusion.register_kernel(Negating())
    try:
        assert torch.equal(run(call, "negating")[0], -run(call, "reference")[0])
    finally:
        registered.remove()
    with pytest.raises(ValueError, match="operation must be one of 'qk_norm_rope_cache', got 'magic'"):
        fx_fusion.register_kernel(Negating(), "magic")


# --- which one serves -----------------------------------------------------------------------------------------------


def unavailable_message(name, call, target="cpu"):
    with pytest.raises(KernelUnavailable) as raised:
        OPERATION.choose(name, call, Target(target))
    return str(raised.value)


def test_a_kernel_that_cannot_serve_says_why(call, register, monkeypatch):
    begin = "cannot serve this call: "
    assert unavailable_message("magic", call) == (
        f"fx_fusion.kernel='magic' {begin}qk_norm_rope_cache has no kernel of this name"
    )
    assert unavailable_message("aiter", call) == (
        f"fx_fusion.kernel='aiter' {begin}aiter runs on AMD GPUs, the target is cpu"
    )
    assert unavailable_message("triton", call) == (
        f"fx_fusion.kernel='triton' {begin}Triton kernels run on GPUs, the target is cpu"
    )
    register(Negating())
    monkeypatch.setattr(Negating, "refuses", lambda self, call, target: f"argument q: {target.name}", raising=False)
    assert unavailable_message("negating", call) == f"fx_fusion.kernel='negating' {begin}argument q: cpu"


def test_the_reference_is_only_called_by_its_name(call):
    assert OPERATION.choose("reference", call, Target("cpu")) == "reference"
    with pytest.raises(Decline) as declined:
        OPERATION.choose("auto", call, Target("cpu"))
    assert declined.value.code == "contract.kernel"
    assert declined.value.found == (
        "no fast kernel serves on cpu (triton: Triton kernels run on GPUs, the target is cpu; "
        "aiter: aiter runs on AMD GPUs, the target is cpu)"
    )
    assert OPERATION.eligible(call).keys() == {"triton", "aiter"}


def test_auto_takes_the_first_fast_one_that_serves(call, register):
    register(Negating())
    assert OPERATION.choose("auto", call, Target("cpu")) == "negating"
    assert OPERATION.eligible(call)["negating"] is None
    second = Negating()
    second.name = "second"
    register(second)
    assert OPERATION.choose("auto", call, Target("cpu")) == "negating"


def test_auto_takes_the_fastest_that_was_measured(call, register, monkeypatch):
    second = Negating()
    second.name = "second"
    register(Negating())
    register(second)
    for microseconds, chosen in (
        ({"second": 2.0, "negating": 3.0, "triton": 1.0}, "second"),
        ({"second": 2.0}, "second"),
        ({"negating": 3.0, "reference": 1.0}, "negating"),
        ({"triton": 1.0}, "negating"),
    ):
        monkeypatch.setattr(OPERATION, "_measured", lambda call, target, measured=microseconds: measured)
        assert OPERATION.choose("auto", call, Target("cpu")) == chosen


# --- options that an implementation does not know -------------------------------------------------------------------


class KnowsBytes(Negating):
    name = "knows_bytes"
    serves = frozenset({"float8"})


def of_bytes(call):
    caches = {name: torch.zeros(call.k_cache.shape, dtype=torch.uint8) for name in ("k_cache", "v_cache")}
    return replace(call, **caches, options=replace(call.options, float8="float8_e5m2"))


@pytest.mark.parametrize("kernel", [*OPERATION, Negating()], ids=lambda kernel: kernel.name)
def test_an_option_that_a_kernel_does_not_know_is_refused_by_its_name(call, kernel):
    assert kernel.objects(of_bytes(call), Target("gfx942")) == (
        f"option float8: the kernel {kernel.name} knows only None, found 'float8_e5m2'"
    )


def test_an_option_that_a_kernel_serves_is_not(call):
    assert KnowsBytes().objects(of_bytes(call), Target("cpu")) is None


def test_what_is_decoded_reaches_every_kernel(call):
    """The option float8 is gone then, and the caches have that dtype."""
    assert OPERATION.eligible(of_bytes(call))["triton"] is None
    assert OPERATION.choose("reference", of_bytes(call), Target("cpu")) == "reference"
    told = of_bytes(call)
    run(told, "reference")
    plain = replace(
        call, k_cache=torch.zeros(call.k_cache.shape, dtype=torch.float8_e5m2),
        v_cache=torch.zeros(call.v_cache.shape, dtype=torch.float8_e5m2),
    )  # fmt: skip
    run(plain, "reference")
    assert torch.equal(told.k_cache, plain.k_cache.view(torch.uint8))
    assert torch.equal(told.v_cache, plain.v_cache.view(torch.uint8))
    assert told.k_cache.any()
