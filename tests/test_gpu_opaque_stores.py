"""On a CUDA or ROCm device: opaque stores into parts of one tensor, by the Triton kernel, under Inductor."""

from __future__ import annotations

import copy
import re

import opaque_ops
import pytest
import torch
from test_opaque_stores import GROUPED_SHAPE, VIEWS, Clamped, InGroups, Layers, OneTensor, given, taken_apart
from torch._inductor.utils import run_and_get_code

import fx_fusion

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def libraries():
    held = [opaque_ops.register(*each, device="CUDA") for each in opaque_ops.VLLM.items()]
    yield
    for library in held:
        library._destroy()


def of(name: str):
    views, shape = VIEWS[name]
    return OneTensor(views), given(shape)


def layers(name: str):
    """The layer between two fused ones keeps its operation."""
    views, shape = VIEWS[name]
    return Layers(OneTensor(views, 0), Clamped(views, 1), OneTensor(views, 2)), given(shape, 3)


CASES = {
    "unbind": lambda: of("unbind"),
    "blocks first": lambda: of("index blocks first"),
    "heads first": lambda: of("heads first"),
    "lanes": lambda: of("lanes"),
    "layers": lambda: layers("unbind"),
    "layers, heads first": lambda: layers("heads first"),
    "lanes in groups": lambda: (InGroups(taken_apart), given(GROUPED_SHAPE)),
}


@pytest.mark.parametrize("name", CASES)
def test_stores_as_in_eager(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model, args = CASES[name]()
    model, args = model.cuda(), [arg.cuda() for arg in args]
    expected, count = copy.deepcopy(args), 2 if isinstance(model, Layers) else 1
    options = {"fx_fusion.kernel": "triton", "fx_fusion.require": count, "fx_fusion.strict": True}
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(*expected)
        actual, (code, *_) = run_and_get_code(torch.compile(model, backend="fx_fusion", options=options), *args)
    report = fx_fusion.last_report()
    assert [layer.kernel for layer in report.fused] == ["triton"] * count, str(report)
    assert "compared on cuda" in report.fused[0].assumed[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(args[-1], expected[-1], rtol=1e-4, atol=1e-5)
    shape = re.escape(str(tuple(args[-1].shape)))
    assert not re.search(rf"empty_strided_\w+\({shape}", code), "the cache is copied"
