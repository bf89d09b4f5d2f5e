"""What looks like a user's pattern and is another function somewhere: it must stay, or what is put there must be right.

Each case names a pattern, what replaces it, a model, and calls on which the difference would show. Results are compared
with eager PyTorch row by row, with NaN, infinities, dtypes and strides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fx_fusion
from function_fusions import ops  # noqa: F401  (registers the operations)
from fx_fusion.testing import run as run_fused

T, D = 6, 32


@dataclass(frozen=True)
class Case:
    """`replacement` is the pattern itself unless given; `fused`: how many calls there must be, if that is known."""

    pattern: Callable[..., Any]
    model: Callable[..., Any]
    calls: Callable[[], Sequence[Any]]
    replacement: Callable[..., Any] | None = None
    example: tuple[Any, ...] | None = None
    fused: int | None = 0


def x(scale=1.0, *shape):
    return torch.randn(*(shape or (T, D))) * scale


def mask():
    return torch.rand(T, D) > 0.5


def rows():
    return torch.empty(20, 16), torch.zeros(5, dtype=torch.int64)


def silu_by_exp(x, y):
    return x * (x.exp() / (1 + x.exp())) * y


def softmax_by_exp(x, y):
    return x.exp() / x.exp().sum(-1, keepdim=True) * y


def look_up(table, index):
    return table[index] * 2.0


def small(*shape, dtype=torch.int8):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape or (T, D), dtype=dtype)


def wide_sum(a, b):
    return ((a.to(torch.int32) + b.to(torch.int32)) >> 1).to(torch.int8)


def narrow_sum(a, b):
    return ((a + b) >> 1).to(torch.int8)


def halved(a, b):
    return torch.div(a, 2, rounding_mode="floor") + b


def scaled(x, y, limit: float):
    return (x * y).exp() * limit


def turned(x, y):
    return (x.exp() * y).sin()


def both(x, y):
    return (x.exp() * y).t()


CASES: dict[str, Case] = {
    # --- what overflows
    "silu": Case(silu_by_exp, lambda x, y: F.silu(x) * y, lambda: (x(100.0), x())),
    "tanh": Case(
        lambda x, y: ((2 * x).exp() - 1) / ((2 * x).exp() + 1) * y,
        lambda x, y: torch.tanh(x) * y,
        lambda: (x(1e3), x()),
    ),
    "softmax": Case(softmax_by_exp, lambda x, y: F.softmax(x, -1) * y, lambda: (x(1e3), x())),
    "softmax, the other way": Case(
        lambda x, y: F.softmax(x, -1) * y,
        softmax_by_exp,
        lambda: (x(10.0), x()),
        fused=1,
    ),
    "masked exponential": Case(
        lambda x, m: x.exp() * m,
        lambda x, m: torch.where(m, x.exp(), 0.0),
        lambda: (x(1e3), mask()),
        example=(torch.empty(5, 16), torch.zeros(5, 16, dtype=torch.bool)),
    ),
    "masked infinity": Case(
        lambda x, m: (x * m).sin(),
        lambda x, m: torch.where(m, x, 0.0).sin(),
        lambda: (torch.where(torch.rand(T, D) < 0.1, float("inf"), x()), mask()),
        example=(torch.empty(5, 16), torch.zeros(5, 16, dtype=torch.bool)),
        fused=None,
    ),
    "norm of what was made small first": Case(
        lambda x, w: x * torch.rsqrt(x.square().sum(-1, keepdim=True)) * w,
        lambda x, w: (
            (lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True)))(x / x.abs().amax(-1, keepdim=True)) * w
        ),
        lambda: (x(1e25), x(1.0, D)),
        fused=None,
    ),
    "norm in half precision": Case(
        lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
        lambda x, w: (lambda y: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5))(x.float()).half() * w,
        lambda: (x(1e3).half(), x(1.0, D).half()),
    ),
    # --- whole numbers
    "narrow sum": Case(narrow_sum, wide_sum, lambda: (small(), small()), example=(small(5, 16), small(5, 16))),
    "narrow product": Case(
        lambda a, b: (a * b).float().exp(),
        lambda a, b: (a.int() * b.int()).float().exp(),
        lambda: (small() // 12, small() // 12),
        example=(small(5, 16), small(5, 16)),
        fused=None,
    ),
    "bytes and signed bytes": Case(
        lambda a, y: a.to(torch.int8).float().exp() * y,
        lambda a, y: a.float().exp() * y,
        lambda: (small(T, D, dtype=torch.uint8), x()),
        example=(small(5, 16, dtype=torch.uint8), torch.empty(5, 16)),
    ),
    "rounded towards zero": Case(
        halved,
        halved,
        lambda: (small(dtype=torch.int32), small(dtype=torch.int32)),
        replacement=lambda a, b: torch.div(a, 2, rounding_mode="trunc") + b,
        example=(small(5, 16, dtype=torch.int32), small(5, 16, dtype=torch.int32)),
    ),
    "divided otherwise": Case(
        halved,
        lambda a, b: torch.div(a, 2, rounding_mode="trunc") + b,
        lambda: (small(dtype=torch.int32), small(dtype=torch.int32)),
        example=(small(5, 16, dtype=torch.int32), small(5, 16, dtype=torch.int32)),
    ),
    # --- indices
    "padded table, from the end": Case(
        look_up,
        lambda t, i: torch.cat([t, t.new_zeros(1, D)])[i] * 2.0,
        lambda: (x(1.0, 20, D), torch.tensor([-1, 0, 20, 19, -21, 3])),
        example=rows(),
        fused=None,
    ),
    "table without its first row": Case(
        look_up,
        lambda t, i: t[1:][i] * 2.0,
        lambda: (x(1.0, 20, D), torch.tensor([-1, 0, 18, 5, -19, 3])),
        example=rows(),
        fused=None,
    ),
    "a row of zeros": Case(
        look_up,
        lambda t, i: torch.cat([t[:7], t.new_zeros(1, D), t[8:]])[i] * 2.0,
        lambda: (x(1.0, 20, D), torch.tensor([7, 0, 19, 5, -13, 3])),
        example=rows(),
        fused=None,
    ),
    "two halves exchanged": Case(
        look_up,
        lambda t, i: t.roll(10, 0)[(i + 10) % 20] * 2.0,
        lambda: (x(1.0, 20, D), torch.tensor([-1, 0, 19, 5, -20, 3])),
        example=rows(),
        fused=None,
    ),
    "embedding": Case(
        look_up,
        look_up,
        lambda: (x(1.0, 20, D), torch.tensor([-1, 0, 19, 5, -20, 3])),
        replacement=lambda table, index: F.embedding(index, table) * 2.0,
        example=rows(),
    ),
    "clamped index": Case(
        look_up,
        lambda t, i: t[i.clamp(0, 19)] * 2.0,
        lambda: (x(1.0, 20, D), torch.tensor([-1, 0, 19, 5, 40, 3])),
        example=rows(),
        fused=None,
    ),
    "store that skips": Case(
        lambda x, cache, slots, s: cache.index_put([slots], (x * s).exp()),
        lambda x, cache, slots, s: cache.index_put([slots], (x * s).exp()) + 1,
        lambda: (x(), x(1.0, 20, D), torch.tensor([0, -1, 3, 5, 19 - 1, 7]), x(1.0, D)),
        replacement=lambda x, cache, slots, s: cache.index_put(
            [slots.clamp(min=0)], torch.where((slots < 0)[:, None], cache[slots.clamp(min=0)], (x * s).exp())
        ),
        example=(torch.empty(5, 16), torch.empty(20, 16), torch.zeros(5, dtype=torch.int64), torch.empty(16)),
    ),
    # --- functions that differ where no random number lies
    **{
        name: Case(turned, lambda x, y, change=change: change(x.exp() * y).sin(), calls)
        for name, (change, calls) in {
            "a gap in a quotient": (
                lambda z: z * ((z - 0.5).square() / ((z - 0.5).square() + 1e-30)),
                lambda: (torch.zeros(T, D), torch.full((T, D), 0.5)),
            ),
            "a gap in an exponential": (
                lambda z: z * (1 - torch.exp(-1e30 * (z - 0.5).square())),
                lambda: (torch.zeros(T, D), torch.full((T, D), 0.5)),
            ),
            "nothing divided by nothing": (
                lambda z: z * (z - 3.0) / (z - 3.0),
                lambda: (torch.zeros(T, D), torch.full((T, D), 3.0)),
            ),
            "a bound of a root": (lambda z: (z + 50 - (z - 50).square().sqrt()) / 2, lambda: (x(), x(1e2))),
            "a term of higher order": (lambda z: z + 1e-11 * z * z * z, lambda: (x(), x(1e3))),
            "a bound spelled by exponentials": (
                lambda z: z * torch.sigmoid(1e3 * (90.0 - z)),
                lambda: (x(), x(1e2)),
            ),
            "a bound": (lambda z: z.clamp(max=90.0), lambda: (x(), x(1e2))),
            "numbers that were rounded": (lambda z: z.bfloat16().float(), lambda: (x(), x())),
            "a step of a staircase": (lambda z: z + (z > 90.0), lambda: (x(), x(1e2))),
        }.items()
    },
    "a bound of the pattern": Case(lambda x, y: (x.exp() * y).clamp(max=90.0).sin(), turned, lambda: (x(), x(1e2))),
    "a bound of the pattern inside": Case(
        lambda x, y: x.clamp(max=1e4).sin() * y,
        lambda x, y: x.sin() * y,
        lambda: (x(1e6), x()),
    ),
    "a random mask": Case(
        turned,
        lambda x, y: torch.where(torch.rand(T, 1) < 0.999, x.exp() * y, 0.0).sin(),
        lambda: (x(), x()),
    ),
    # --- memory
    "seen by strides": Case(
        both,
        lambda x, y: both(x, y).as_strided((T * D,), (1,)),
        lambda: (x(), x()),
        replacement=lambda x, y: both(x, y).contiguous(),
        fused=None,
    ),
    "given out": Case(both, both, lambda: (x(), x()), replacement=lambda x, y: both(x, y).contiguous(), fused=1),
    "a part, seen by strides": Case(
        lambda x, y: (x.exp() * y)[:, 4:],
        lambda x, y: (x.exp() * y)[:, 4:].as_strided((T, D - 8), (D, 1)),
        lambda: (x(), x()),
        fused=None,
    ),
}


def marked(pattern, replacement):
    names = ", ".join(inspect.signature(pattern).parameters)
    space = {"f": replacement or pattern, "mark": torch.ops.own_tests.mark}
    return eval(f"lambda {names}: mark(f({names}))", space)


def assert_rows_equal(name, actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    assert actual.stride() == expected.stride(), f"{name}: strides {actual.stride()}, in eager {expected.stride()}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    a, e = actual.double(), expected.double()
    size = torch.where(e.isfinite(), e.abs(), 0.0)
    allowed = 1e-2 if expected.dtype.itemsize == 2 else 1e-5
    near = (a - e).abs() <= allowed * (size.amax(-1, keepdim=True) if size.dim() else size)
    good = near | (a == e) | (a.isnan() & e.isnan())
    assert good.all(), f"{name}: {a[~good][:4]} where eager gives {e[~good][:4]}"


@pytest.mark.parametrize("name", CASES)
def test_what_is_put_there_is_right(name):
    case = CASES[name]
    torch.manual_seed(0)
    with fx_fusion.fusions():
        try:
            fx_fusion.register_fusion(
                pattern=case.pattern,
                replacement=marked(case.pattern, case.replacement),
                name="pattern",
                example=case.example,
            )
        except ValueError:
            assert case.fused == 0
            return
        args = case.calls()
        outcome = run_fused(case.model, args)
    expected = case.model(*args)
    if "random" not in name:
        assert_rows_equal("the result", outcome.outputs, expected)
    if case.fused is not None:
        assert len(outcome.report.fused) == case.fused, str(outcome.report)
    assert outcome.report.fused or outcome.report.declined, "nobody says why"
