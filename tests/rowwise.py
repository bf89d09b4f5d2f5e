"""Compiled and eager PyTorch on the same calls, compared row by row: a small row counts as much as a large one."""

from __future__ import annotations

import copy

import torch
from torch.utils import _pytree as pytree

from fx_fusion.report import REPORTS
from fx_fusion.trace import merge

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def assert_as_eager(model, *calls, marked=(), dynamic=None, strict=True, seeded=False):
    """Compile a copy of `model` once and run it on each of `calls`, as eager runs it: outputs, arguments and state.

    Args:
        marked: (argument, dimension) pairs that are symbolic, from the first call on.
        seeded: before each run the generator starts anew, so that both draw the same random numbers.

    Returns:
        One report of all that was compiled.
    """
    torch._dynamo.reset()
    before = REPORTS.snapshot()
    own = copy.deepcopy(model)
    options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager", "fx_fusion.strict": strict}
    compiled = torch.compile(own, backend="fx_fusion", dynamic=dynamic, options=options)
    # Inductor's own generator draws other numbers than eager does.
    with torch._inductor.config.patch(fallback_random=seeded):
        for number, call in enumerate(calls):
            _assert_call(number, model, own, compiled, call, marked if number == 0 else (), seeded)
    reports = REPORTS.since(before)
    assert reports, "nothing was compiled"
    return merge(reports)


def _assert_call(number, model, own, compiled, call, marked, seeded):
    given, expected = copy.deepcopy(call), copy.deepcopy(call)
    for argument, dim in marked:
        torch._dynamo.mark_dynamic(given[argument], dim)
    results = []
    for function, arguments in ((model, expected), (compiled, given)):
        if seeded:
            torch.manual_seed(number)
        with torch.no_grad():
            results.append(function(*arguments))
    wanted, found = results
    pairs = zip(_leaves(found, given, own), _leaves(wanted, expected, model), strict=True)
    for place, (actual, right) in enumerate(pairs):
        assert_rows(actual, right, f"call {number}, value {place}")


def assert_rows(actual, expected, where=""):
    """Each row within the tolerance of its own magnitude; infinities and NaN where eager has them."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, where
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), where
        return
    a, b = actual.double(), expected.double()
    row = b.nan_to_num(0.0, 0.0, 0.0).abs()
    row = row.amax(-1, keepdim=True) if b.dim() and b.numel() else row
    allowed = TOLERANCE.get(expected.dtype, 5e-2) * row + 1e-37
    right = ((a - b).abs() <= allowed) | (a == b) | (a.isnan() & b.isnan())
    wrong = int((~right).sum())
    assert not wrong, f"{where}: {wrong} of {right.numel()} elements differ, {a[~right][0]:g} for {b[~right][0]:g}"


def _leaves(results, arguments, model):
    held = dict(model.named_buffers()) if isinstance(model, torch.nn.Module) else {}
    return [leaf for leaf in pytree.tree_leaves((results, arguments, held)) if isinstance(leaf, torch.Tensor)]
