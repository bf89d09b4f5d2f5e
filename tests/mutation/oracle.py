"""Is the rewritten mutant right? Judged by running the mutant itself, unfused, in eager PyTorch.

The two may round differently. So both are held against a third run, of the unfused mutant in float64: the fused error may
exceed the unfused one by rounding alone. Where the unfused run overflows, the fused one may be finite (its intermediates
are float32), never the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fx_fusion.mutants import Mutant, copies
from mutation.boundary import Poke, Trial, trials

#: How often the fused error may exceed the unfused one, and how many units in the last place (of the row's largest
#: value) rounding alone may make: a rotation adds two products, a projection after it 64 of them.
FACTOR, UNITS = 4, 16

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Wrong:
    """The first trial in which the rewritten mutant is not right."""

    trial: str
    what: str


def judge(mutant: Mutant, fused: GraphModule, *, count: int, seed: int) -> Wrong | None:
    """None if `fused` computes what `mutant` does, on its own inputs and on `count` boundary inputs."""
    for trial in trials(mutant, count, seed):
        what = _compare(mutant.module, fused, trial)
        if what is not None:
            return Wrong(trial.name, what)
    return None


def _compare(unfused: GraphModule, fused: GraphModule, trial: Trial) -> str | None:
    try:
        expected = run(unfused, trial.inputs, trial.pokes)
    except Exception:  # no valid input for this mutant: an index beyond its table
        return None
    try:
        actual = run(fused, trial.inputs, trial.pokes)
    except Exception as error:
        return f"raises {type(error).__name__}: {error}, which the mutant does not"
    if all(_alike(a, e) for a, e in zip(actual, expected, strict=True)):
        return None
    exact = _exact(unfused, trial) or [None] * len(expected)
    for i, triple in enumerate(zip(actual, expected, exact, strict=True)):
        what = _difference(*triple)
        if what is not None:
            return f"value {i}: {what}"
    return None


def run(module: GraphModule, inputs: Sequence[Any], pokes: Mapping[str, Poke], *, double: bool = False) -> list[Any]:
    """Every output, then every input as it is afterwards."""
    inputs = copies(inputs)
    if double:
        inputs = [_widened(value) for value in inputs]
    with torch.no_grad():
        outputs = _Run(module, pokes, double).run(*inputs)
    return [leaf for leaf in pytree.tree_leaves((outputs, inputs)) if isinstance(leaf, Tensor)]


class _Run(Interpreter):
    def __init__(self, module: GraphModule, pokes: Mapping[str, Poke], double: bool) -> None:
        super().__init__(module)
        self._pokes, self._double = pokes, double

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        return self._pokes[n.name](result) if n.name in self._pokes else result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._double:
            args, kwargs = map_aggregate((args, kwargs), lambda a: torch.float64 if a in _NARROW_DTYPES(a) else a)
        result = super().call_function(target, args, kwargs)
        return pytree.tree_map(_widened, result) if self._double else result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().get_attr(target, args, kwargs)
        return _widened(result) if self._double else result


def _NARROW_DTYPES(value: Any) -> tuple[torch.dtype, ...]:
    return _NARROW if isinstance(value, torch.dtype) else ()


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROW else value


def _exact(unfused: GraphModule, trial: Trial) -> list[Any] | None:
    try:
        return run(unfused, trial.inputs, trial.pokes, double=True)
    except Exception:
        return None


def _alike(actual: Tensor, expected: Tensor) -> bool:
    """Equal to a few units in the last place everywhere, so that nothing more need be asked."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    a, e = actual.double(), expected.double()
    close = (a - e).abs() <= 4 * torch.finfo(expected.dtype).eps * _row_scale(e)
    return bool((close | (a == e) | (a.isnan() & e.isnan())).all())


def _difference(actual: Tensor, expected: Tensor, exact: Tensor | None) -> str | None:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"{actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    if not expected.is_floating_point():
        return None if torch.equal(actual, expected) else "integers differ"
    a, e = actual.double(), expected.double()
    x = e if exact is None or exact.shape != e.shape else torch.where(e.isfinite() & ~exact.isfinite(), e, exact)
    own = torch.where(e.isfinite() & x.isfinite(), (e - x).abs(), 0.0)
    allowed = UNITS * torch.finfo(expected.dtype).eps * _row_scale(x) + FACTOR * _row_scale(own)
    allowed = allowed + torch.finfo(expected.dtype).tiny
    right = (a - x).abs() <= allowed
    overflowed = ~e.isfinite()
    right |= overflowed & ~a.isfinite()
    if bool(right.all()):
        return None
    at = int((~right).reshape(-1).int().argmax())
    value, want, best = (t.reshape(-1)[at].item() for t in (a, e, x))
    where = torch.unravel_index(torch.tensor(at), a.shape)
    return f"{value!r} at {[int(i) for i in where]}, the mutant gives {want!r} ({best!r} in float64)"


def _row_scale(value: Tensor) -> Tensor:
    """The largest finite magnitude of each row."""
    finite = torch.where(value.isfinite(), value.abs(), 0.0)
    return finite.amax(-1, keepdim=True).expand(value.shape) if value.dim() else finite
