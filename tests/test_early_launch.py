"""Programmatic dependent launch, as far as it shows without a GPU: what is compiled, and what Inductor writes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.problem import Variant, prepare
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from fx_fusion.kernels import early_launch, triton, triton_launch

pytest.importorskip("triton")

WAIT = re.compile(r"griddepcontrol\.wait")
ACCESS = re.compile(r"\b(ld|st|atom|red|cp|prefetch)\.(async|global|bulk|shared)|\bbra\b")
#: Each takes another way to the first load.
COMPILED = (
    "plain", "two-tables-outside", "HND", "rows", "gptj-full-width", "any-axes", "any-size-all-heads",
    "heads-left-over-float8", "shuffle-float8",
)  # fmt: skip


def ptx_of(variant: Variant, waits: bool) -> list[str]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = triton.kernel(), GPUTarget("cuda", 90, 32)
    prepared = prepare(variant, device="meta")
    arguments = {**prepared.arguments(kernel), "WAITS_FOR_PREDECESSOR": waits}
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**arguments, num_warps=prepared.launch.tile.num_warps, launch_pdl=waits)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile(source, target=target, options=dataclasses.asdict(options))
    assert compiled.metadata.launch_pdl == waits
    return compiled.asm["ptx"].splitlines()


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_accessed_ahead_of_the_wait(name):
    lines = ptx_of(VARIANTS[name], waits=True)
    waits = [number for number, line in enumerate(lines) if WAIT.search(line)]
    assert len(waits) == 1
    # Without a branch ahead of it, every program comes through it.
    assert not [line for line in lines[: waits[0]] if ACCESS.search(line)]
    assert [line for line in lines[waits[0] :] if ACCESS.search(line)]


def test_without_early_launch_there_is_no_wait():
    assert not [line for line in ptx_of(VARIANTS["plain"], waits=False) if WAIT.search(line)]


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((9, 0), None, True), ((8, 9), None, False), ((9, 4), "7.0", False)]
)
def test_where_launches_are_early(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    triton_launch.launches_early.cache_clear()
    assert triton_launch.launches_early(torch.device("cuda", 0)) is expected
    triton_launch.launches_early.cache_clear()


def test_the_option_is_given_where_a_launch_waits_and_nowhere_else():
    launch = prepare(Variant()).launch
    assert launch.options == {"num_warps": launch.tile.num_warps}
    launch.constants["WAITS_FOR_PREDECESSOR"] = True
    assert launch.options == {"num_warps": launch.tile.num_warps, "launch_pdl": True}


DEFINITION = """
@triton_heuristics.user_autotune(
    configs=[{'num_warps': 4, 'num_stages': 3}],
    inductor_meta={'grid_type': 'FixedGrid'},
    triton_meta={'signature': {'q': '*bf16'}, 'constants': {'HEADS': 4, 'WAITS_FOR_PREDECESSOR': 0}},
    filename=__file__,
    custom_kernel=True,
)
"""


def metadata(definition: str) -> dict[str, Any]:
    return eval(re.search(r"triton_meta=(\{.*\}),\n", definition)[1])


def test_a_marked_definition_gets_the_wait_and_the_option():
    after = metadata(early_launch.launched_early(DEFINITION))
    assert after["constants"] == {"HEADS": 4, "WAITS_FOR_PREDECESSOR": True}
    assert after["constants"]["WAITS_FOR_PREDECESSOR"] is True
    assert after["launch_pdl"] is True
    assert after["signature"] == metadata(DEFINITION)["signature"]


def test_it_gets_them_once_and_where_it_says_otherwise():
    once = early_launch.launched_early(DEFINITION)
    assert early_launch.launched_early(once) == once
    refused = DEFINITION.replace("triton_meta={", "triton_meta={'launch_pdl': False, ")
    assert metadata(early_launch.launched_early(refused)) == metadata(once)


@pytest.mark.parametrize(
    "definition",
    [
        DEFINITION.replace("PREDECESSOR': 0", "PREDECESSOR': False"),
        DEFINITION.replace("WAITS_FOR_PREDECESSOR", "OTHER"),
        DEFINITION.replace("triton_meta={", "metadata=dict({"),
    ],
    ids=["a launch as ever", "another kernel", "another form"],
)
def test_other_definitions_stay_as_they_are(definition):
    assert early_launch.launched_early(definition) == definition


def test_inductor_writes_definitions_in_the_form_that_is_completed():
    writes = inspect.getsource(PythonWrapperCodegen.define_user_defined_triton_kernel)
    assert "triton_meta={triton_meta!r}" in writes
    assert "self.define_kernel(" in writes


@pytest.fixture
def defined(monkeypatch):
    """What Inductor would define."""
    seen: list[tuple[str, str, tuple[object, ...]]] = []
    monkeypatch.setattr(
        PythonWrapperCodegen, "define_kernel", lambda self, name, body, *rest: seen.append((name, body, rest))
    )
    early_launch._complete_definitions.cache_clear()
    yield seen
    early_launch._complete_definitions.cache_clear()


def test_a_graph_marks_a_launch_that_waits_and_completes_definitions(defined):
    given = {"HEADS": 4, "WAITS_FOR_PREDECESSOR": True}
    marked = early_launch.constants_in_graph(given)
    assert repr(marked) == "{'HEADS': 4, 'WAITS_FOR_PREDECESSOR': 0}"
    early_launch.constants_in_graph(given)
    PythonWrapperCodegen.define_kernel(None, "kernel", DEFINITION, "metadata")
    assert defined == [("kernel", early_launch.launched_early(DEFINITION), ("metadata",))]


def test_a_graph_leaves_a_launch_as_ever_alone(defined):
    given = {"HEADS": 4, "WAITS_FOR_PREDECESSOR": False}
    assert repr(early_launch.constants_in_graph(given)) == repr(given)
    PythonWrapperCodegen.define_kernel(None, "kernel", DEFINITION)
    assert defined == [("kernel", DEFINITION, ())]
