"""A meaning is compared with its operation at the sizes and strides of the call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fx_fusion.graph.sizes import Sizes
from fx_fusion.semantics.compare import Comparisons
from fx_fusion.semantics.declare import Meaning

T, H, D = 5, 3, 4


def _double(x: Tensor) -> Tensor:
    return x * 2.0


def _ignores_strides(x: Tensor) -> Tensor:
    """What a kernel does that walks over its input as if it were contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) * 2.0


def _only_for_few(x: Tensor) -> Tensor:
    """Right up to eight lanes."""
    return x * 2.0 if x.shape[-1] <= 8 else x * 3.0


@pytest.fixture(scope="module")
def operations():
    library = torch.library.Library("careless", "DEF")
    for name, function in (("strides", _ignores_strides), ("sizes", _only_for_few)):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, function, "CompositeExplicitAutograd")
    yield
    library._destroy()


def _compare(name: str, *values: Tensor) -> list[bool]:
    comparisons, mode = Comparisons(), FakeTensorMode()
    op, meaning = getattr(torch.ops.careless, name).default, Meaning(f"careless::{name}.default", _double)
    return [comparisons.of(meaning, op, {"x": mode.from_tensor(value)}, (), Sizes()).differs for value in values]


def test_strides_of_the_call(operations):
    packed = torch.empty(T, 2 * H * D)[:, : H * D].view(T, H, D)
    turned = torch.empty(H, T, D).transpose(0, 1)
    assert _compare("strides", torch.empty(T, H, D), packed, turned) == [False, True, True]


def test_sizes_of_every_use(operations):
    assert _compare("sizes", torch.empty(T, 8), torch.empty(T, 16)) == [False, True]


def test_elements_that_share_a_place_are_laid_apart(operations):
    """A stride of 0 cannot be filled with random numbers: those of the comparison are contiguous."""
    assert _compare("strides", torch.empty(T, 1, D).expand(T, H, D)) == [False]
