"""Symbolic sizes: what was proved at a few of them holds at all, or the layer is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fx_fusion
from function_fusions import ops  # noqa: F401  (registers the operations)
from function_fusions.zoo import ENTRIES

D = 32


def mark(x):
    return torch.ops.own_tests.mark(x)


def scaled(x, y, factor: float):
    return (x.exp() * y * factor).sin()


def by_length(x, y):
    return x.exp() * y * x.shape[0]


def mean(x, y):
    return (x.exp() * y).mean(0)


def branching(x, y):
    z = x.exp() * y
    return z if x.shape[0] < 500 else z * 2


def halves(x, y):
    n = x.shape[0] // 2
    return x[:n].exp() * y[:n]


def first_rows(x, y):
    return x[:4].exp() * y[:4]


MODELS = {
    # model, pattern, the code with which it is declined
    "a length as data": (lambda x, y: by_length(x, y).sin(), scaled, "proof.mismatch"),
    "a length as data, in the pattern too": (by_length, by_length, "region.sizes"),
    "a length as a divisor": (lambda x, y: (x.exp() * y).sum(0) / x.shape[0], mean, "region.sizes"),
    "positions as data": (
        lambda x, y: x.exp() * y * torch.arange(x.shape[0])[:, None],
        lambda x, y, p: x.exp() * y * p,
        None,
    ),
    "a mask by length": (
        lambda x, y: torch.where(torch.arange(x.shape[0])[:, None] < x.shape[0] - 1, x.exp() * y, 0.0),
        lambda x, y: x.exp() * y * 1.0,
        None,
    ),
    "a pattern that branches": (lambda x, y: x.exp() * y, branching, "proof.mismatch"),
    "the lower half": (lambda x, y: x[: (x.shape[0] + 1) // 2].exp() * y[: (x.shape[0] + 1) // 2], halves, None),
    "at most four rows": (lambda x, y: x[: min(x.shape[0], 4)].exp() * y[: min(x.shape[0], 4)], first_rows, None),
}


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(
        model, backend="fx_fusion", options={"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
    )


def run_at_all_sizes(model, tensors, sizes=(6, 2, 3, 7, 40, 1030)):
    """`tensors` of a number of rows; the first size is the one that is traced, with a symbol in its place."""
    fused = compiled(model)
    for size in sizes:
        args = tensors(size)
        if size == sizes[0]:
            for arg in args:
                torch._dynamo.mark_dynamic(arg, 0)
        with torch.no_grad():
            torch.testing.assert_close(fused(*args), model(*args))
        if size == sizes[0]:
            report = fx_fusion.last_report()
    return report


def pairs(size):
    return torch.randn(size, D), torch.randn(size, D)


@pytest.mark.parametrize("name", MODELS)
def test_a_size_only_measures(name):
    model, pattern, code = MODELS[name]
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=pattern, name="pattern")
        report = run_at_all_sizes(model, pairs)
    if code is not None:
        assert [layer.code for layer in report.declined] == [code] and not report.fused, str(report)


@pytest.mark.parametrize(
    ("name", "spelling"), [("gpt_oss_swiglu", "by hand"), ("softmax", "shifted"), ("log_softmax", "logsumexp")]
)
def test_a_pattern_serves_all_sizes(name, spelling):
    entry = ENTRIES[name]
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=entry.pattern, replacement=entry.pattern, name=name)
        count = len(entry.args())
        report = run_at_all_sizes(
            entry.models[spelling], lambda size: tuple(torch.randn(size, D) for _ in range(count))
        )
    assert len(report.fused) == 1 and "s" in str(report.fused[0].reading["tensors"]), str(report)


def test_a_norm_with_symbolic_strides():
    """The rows are a part of something wider, whose width is symbolic too."""

    def model(x, w):
        return F.rms_norm(x[:, :D], (D,), w, 1e-6).sin()

    def pattern(x, w, eps: float):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w

    weight = torch.rand(D)
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=lambda x, w, eps: mark(pattern(x, w, eps)), name="norm")
        fused = compiled(model)
        for rows, width in ((6, 40), (9, 77), (1030, 64)):
            x = torch.randn(rows, width)
            if rows == 6:
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 1)
            with torch.no_grad():
                torch.testing.assert_close(fused(x, weight), model(x, weight))
        assert len(fx_fusion.last_report().fused) == 1, str(fx_fusion.last_report())
