"""For your own pattern tests: does it fuse, how often, is it right, and if not, why not? No GPU needed.

def test_my_attention():
    fx_fusion.testing.assert_fuses(MyAttention(), (x, positions, slots, k_cache, v_cache), count=1)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_fusion.graph.torch_compat import pytree, reset_dynamo
from fx_fusion.proof.region_function import relative_difference
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


#: In float64, where only a kernel that computes in float32 inside rounds at all.
FLOAT64_TOLERANCE = 1e-6


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
    reset_dynamo()
    before = REPORTS.snapshot()
    options: dict[str, Any] = {"fx_fusion.kernel": kernel, "fx_fusion.inner": inner, "fx_fusion.strict": True}
    compiled = torch.compile(fn, backend="fx_fusion", dynamic=dynamic, options=options)
    try:
        with torch.no_grad():
            outputs = compiled(*args, **kwargs)
    finally:
        reset_dynamo()
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


def assert_equal_after_fusion(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    kernel: str = "reference",
    inner: str = "eager",
    dynamic: bool | None = False,
) -> FusionReport:
    """Assert that something fuses, and that outputs, changed arguments and module state are as in eager PyTorch: in the
    dtypes given, and once more in float64 (the traced graph, reference kernel), where rounding hides no difference.

    Returns:
        The report of the run in the dtypes given.

    Raises:
        AssertionError: with the report.
    """
    outcome = run(fn, args, kwargs, kernel=kernel, inner=inner, dynamic=dynamic)
    assert outcome.report.fused, f"expected something to fuse\n{outcome.report}"
    _assert_as_in_eager(outcome, fn, args, kwargs)
    _assert_equal_in_float64(fn, args, kwargs)
    return outcome.report


def _assert_equal_in_float64(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
    """The traced graph before and after the pass, every float of both raised to float64."""
    from fx_fusion.mutation.boundary import Trial
    from fx_fusion.mutation.mutants import capture, copies, rewritten
    from fx_fusion.mutation.oracle import Runnable

    original = capture(*copy.deepcopy((fn, tuple(args), dict(kwargs or {}))))
    fused, report = rewritten(original)
    graphs = (fused, original.module)
    actual, expected = (
        Runnable(graph, (), double=True)(Trial("as given", copies(original.inputs))) for graph in graphs
    )
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        difference = relative_difference(a, e) if e.is_floating_point() else float(not torch.equal(a, e))
        assert difference <= FLOAT64_TOLERANCE, f"in float64, value {i} differs by {difference:.1e}\n{report}"


@dataclass(frozen=True)
class MutantTally:
    """What became of mutants.

    Attributes:
        refused: how many were left unfused, by the code of the decline.
        right: how many were fused, and computed what the mutant itself computes.
        wrong: what was fused wrongly: which change, on which input, and how it showed.
    """

    refused: Mapping[str, int]
    right: int
    wrong: tuple[str, ...]


def mutants(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    count: int = 50,
    seed: int = 0,
    trials: int = 8,
) -> MutantTally:
    """Change one thing of the graph of `fn` at a time, at random, and see that no mutant is fused wrongly.

    Each mutant must be left unfused, or be rewritten into what the mutant itself computes, run unfused in eager
    PyTorch, on the inputs given and on `trials` boundary inputs (zeros, one-hot, tiny and huge rows, infinities, NaN).

    Raises:
        AssertionError: a mutant was fused wrongly; or the unchanged graph does not fuse, so that nothing was tested.
    """
    from fx_fusion.mutation.mutants import Mutants, rewritten
    from fx_fusion.mutation.oracle import judge

    torch.manual_seed(seed)
    made = Mutants.of(fn, args, kwargs, count=count, seed=seed)
    _, report = rewritten(made.original)
    assert report.fused, f"the unchanged graph does not fuse, so no mutant can be fused wrongly\n{report}"
    refused: Counter[str] = Counter()
    right, wrong = 0, list[str]()
    for number, mutant in enumerate(made):
        fused, report = rewritten(mutant)
        if not report.fused:
            refused[str(report.layers[0].code) if report.layers else "nothing found"] += 1
            continue
        found = judge(mutant, fused, count=trials, seed=number)
        right += found is None
        wrong += [f"{mutant.description}; {found.trial}: {found.what}"] if found else []
    assert not wrong, "mutants that were fused wrongly:\n" + "\n".join(wrong)
    return MutantTally(dict(refused), right, tuple(wrong))


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
