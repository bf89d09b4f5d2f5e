"""Equal code, equal text; what a cache key would miss has no text at all."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

import fx_fusion
from fx_fusion.fingerprint import Unreadable, fingerprint


def times(factor):
    return lambda x: x * factor


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


class Base:
    pass


class Derived(Base):
    def __init__(self, factor):
        self.factor = factor


def test_equal_values_read_alike():
    for make in (
        lambda: times(2),
        lambda: Derived(2),
        lambda: functools.partial(even, n=3),
        lambda: {"b": 1, "a": {2}},
    ):
        assert fingerprint(make()) == fingerprint(make())


def test_what_differs_reads_differently():
    closures = [times(factor) for factor in (1, 2, 1.0, True, even, odd, torch.float32, torch.ops.aten.mm.default)]
    objects = [Derived(1), Derived(2), Derived, Base]
    calls = [functools.partial(even, n=3), functools.partial(even, n=4), functools.partial(odd, n=3)]
    values = [*closures, *objects, *calls, torch.mm, torch.addmm, torch.ops.aten.mm, torch]
    assert len(set(map(fingerprint, values))) == len(values)


def test_code_without_a_file_is_read_as_it_is():
    def made(source):
        names = {}
        exec(source, names)
        return names["f"]

    texts = [fingerprint(made(f"def f(x): return x + {n}")) for n in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    "value",
    [torch.ones(1), times(torch.ones(1)), torch.nn.Linear(1, 1), threading.Lock(), torch.Generator()],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_told_has_no_text(value):
    with pytest.raises(Unreadable):
        fingerprint(value)


def test_fusions_that_come_with_the_package_can_be_cached():
    for fusion in (fx_fusion.QkNormRopeCache(), fx_fusion.SwiGLU(), fx_fusion.QkNormRope()):
        assert fingerprint(fusion.identity)
