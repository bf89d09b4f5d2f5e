"""On a CUDA or ROCm device: opaque stores into parts of one tensor, by the Triton kernel, under Inductor."""

from __future__ import annotations

import re

import opaque_ops
import pytest
import torch
from on_gpu import fused_and_eager
from test_opaque_stores import GROUPED_SHAPE, VIEWS, Clamped, InGroups, Layers, OneTensor, given, taken_apart

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def libraries():
    with opaque_ops.registered(opaque_ops.VLLM, device="CUDA"):
        yield


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
    torch.manual_seed(0)
    model, args = CASES[name]()
    fused, eager, report, code = fused_and_eager(model, args, count=2 if isinstance(model, Layers) else 1)
    assert "compared on cuda" in report.fused[0].assumed[0]
    torch.testing.assert_close(fused[0], eager[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused[-1], eager[-1], rtol=1e-4, atol=1e-5)
    shape = re.escape(str(tuple(args[-1].shape)))
    assert not re.search(rf"empty_strided_\w+\({shape}", code), "the cache is copied"
