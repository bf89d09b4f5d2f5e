"""For your own pattern tests: does it fuse, how often, is it right, and if not, why not? No GPU needed.

def test_my_attention():
    fx_fusion.testing.assert_fuses(MyAttention(), (x, positions, slots, k_cache, v_cache), count=1)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fx_fusion.probe import relative_difference
from fx_fusion.report import REPORTS, FusionReport
from fx_fusion.trace import merge

#: Largest difference that :func:`assert_fuses` allows, relative to the largest value: two computations that round
#: differently, each within a few units in the last place.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the report, the outputs, and every tensor argument or module state as it is afterwards."""

    report: FusionReport
    outputs: Any
    state: Any


def run(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    kernel: str = "reference",
    inner: str = "eager",
    dynamic: bool | None = False,
) -> Outcome:
    """Compile a copy of `fn` with fx_fusion, run it on copies of the arguments, and tell what happened.

    Args:
        fn: a module or a function. Functions are not copied: tensors that they store into must be arguments.
        args: its arguments.
        kwargs: its keyword arguments.
        kernel: as the option ``fx_fusion.kernel``.
        inner: ``eager`` (quick) or ``inductor``.
        dynamic: as in ``torch.compile``.
    """
    fn, args, kwargs = copy.deepcopy((fn, tuple(args), dict(kwargs or {})))
    torch._dynamo.reset()
    before = REPORTS.snapshot()
    options: dict[str, Any] = {"fx_fusion.kernel": kernel, "fx_fusion.inner": inner, "fx_fusion.strict": True}
    compiled = torch.compile(fn, backend="fx_fusion", dynamic=dynamic, options=options)
    try:
        with torch.no_grad():
            outputs = compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    reports = REPORTS.since(before)
    assert reports, "nothing was compiled"
    return Outcome(merge(reports), outputs, _state(fn, args, kwargs))


def assert_fuses(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    count: int | None = None,
    kernel: str = "reference",
    inner: str = "eager",
    dynamic: bool | None = False,
) -> FusionReport:
    """Assert that `fn` gets `count` fused calls (None: every layer), and that outputs and stores stay right.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: with the report.
    """
    outcome = run(fn, args, kwargs, kernel=kernel, inner=inner, dynamic=dynamic)
    report = outcome.report
    expected = len(report.layers) if count is None else count
    assert len(report.fused) == expected and expected > 0, f"expected {expected} fused calls\n{report}"
    _assert_as_in_eager(outcome, fn, args, kwargs)
    return report


def assert_declines(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    code: str,
    dynamic: bool | None = False,
) -> FusionReport:
    """Assert that nothing fuses, that some layer is declined with `code`, and that the results are untouched.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: with the report.
    """
    outcome = run(fn, args, kwargs, dynamic=dynamic)
    report = outcome.report
    codes = [layer.code for layer in report.declined]
    assert not report.fused and code in codes, f"expected a decline with code {code!r}\n{report}"
    _assert_as_in_eager(outcome, fn, args, kwargs)
    return report


def _assert_as_in_eager(
    outcome: Outcome, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> None:
    fn, args, kwargs = copy.deepcopy((fn, tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        outputs = fn(*args, **kwargs)
    _assert_close("output", outcome.outputs, outputs, outcome.report)
    _assert_close("state", outcome.state, _state(fn, args, kwargs), outcome.report)


def _state(fn: Any, args: Any, kwargs: Any) -> Any:
    held = dict(fn.state_dict(keep_vars=True)) if isinstance(fn, torch.nn.Module) else {}
    buffers = dict(fn.named_buffers()) if isinstance(fn, torch.nn.Module) else {}
    return {**held, **buffers}, args, kwargs


def _assert_close(what: str, actual: Any, expected: Any, report: FusionReport) -> None:
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for i, (a, b) in enumerate(pairs):
        if not isinstance(b, torch.Tensor):
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what} {i}: {a.shape} {a.dtype}, expected {b.shape} {b.dtype}"
        )
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{what} {i} differs\n{report}"
            continue
        difference = relative_difference(a.double(), b.double())
        allowed = TOLERANCE.get(b.dtype, TOLERANCE[torch.bfloat16])
        assert difference <= allowed, f"{what} {i} differs by {difference:.1e}, allowed {allowed:.1e}\n{report}"
