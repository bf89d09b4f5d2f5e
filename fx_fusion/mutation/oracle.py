"""Is the rewritten mutant right? Judged by running the mutant itself, unfused, in eager PyTorch.

The two may round differently. So both are held against a third run, of the unfused mutant in float64: the fused
error may exceed the unfused one by rounding alone. Where the unfused run overflows, the fused one may be finite (its
intermediates are float32), never the reverse; where float64 overflows too, the fused row must show it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.node import map_aggregate

from fx_fusion.graph.torch_compat import pytree
from fx_fusion.mutation.boundary import Poke, Trial, trials
from fx_fusion.mutation.mutants import Mutant, copies

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
    judges = _Judge.of(mutant, fused)
    for trial in trials(mutant, count, seed):
        what = judges.compare(trial)
        if what is not None:
            return Wrong(trial.name, what)
    return None


@dataclass(frozen=True)
class _Judge:
    unfused: Runnable
    fused: Runnable
    exact: Runnable

    @staticmethod
    def of(mutant: Mutant, fused: GraphModule) -> _Judge:
        names = mutant.projections
        exact = Runnable(mutant.module, names, double=True)
        return _Judge(Runnable(mutant.module, names), Runnable(fused, names), exact)

    def compare(self, trial: Trial) -> str | None:
        data: dict[str, Tensor] = {}
        try:
            expected = self.unfused(trial, data)
        except Exception:  # no valid input for this mutant: an index beyond its table
            return None
        try:
            actual = self.fused(trial)
        except Exception as error:
            return f"raises {type(error).__name__}: {error}, which the mutant does not"
        if all(_alike(a, e) for a, e in zip(actual, expected, strict=True)):
            return None
        if self.unfused.stores_twice(trial):  # undefined, says PyTorch: a masked token may write over a stored one
            return None
        exact = self._exact(trial, data) or [None] * len(expected)
        eps = max((torch.finfo(value.dtype).eps for value in data.values()), default=0.0)
        for i, triple in enumerate(zip(actual, expected, exact, strict=True)):
            what = _difference(*triple, eps)
            if what is not None:
                return f"value {i}: {what}"
        return None

    def _exact(self, trial: Trial, data: Mapping[str, Tensor]) -> list[Any] | None:
        """From the same data on: the projections' own rounding is no error of either run."""
        pokes = {name: _constant(value.double()) for name, value in data.items()}
        try:
            return self.exact(replace(trial, pokes=pokes))
        except Exception:
            return None


class Runnable:
    """A graph, with what a trial pokes into the values of some nodes; `double` raises every float to float64."""

    def __init__(self, module: GraphModule, names: Sequence[str], *, double: bool = False) -> None:
        graph = copy.deepcopy(module.graph)
        self._names, self._double = tuple(names), double
        for name in names:
            _add_poke(graph, name)
        if double:
            _raise_dtypes(graph)
        self._module = GraphModule(module, graph)

    def stores_twice(self, trial: Trial) -> bool:
        """Whether some store of the graph writes one place more than once."""
        stores = _Stores(self._module)
        with torch.no_grad():
            stores.run(*copies(trial.inputs), *self._pokes(trial))
        return stores.twice

    def __call__(self, trial: Trial, record: dict[str, Tensor] | None = None) -> list[Any]:
        """Every output, then every input as it is afterwards; `record` gets the values poked into, as poked."""
        inputs = copies(trial.inputs)
        if self._double:
            inputs = [_widened(value) for value in inputs]
        pokes = self._pokes(trial)
        if record is not None:
            pokes = [_recording(poke, name, record) for name, poke in zip(self._names, pokes, strict=True)]
        with torch.no_grad(), _default_dtype(torch.float64 if self._double else torch.float32):
            outputs = self._module(*inputs, *pokes)
        return [leaf for leaf in pytree.tree_leaves((outputs, inputs)) if isinstance(leaf, Tensor)]

    def _pokes(self, trial: Trial) -> list[Any]:
        return [trial.pokes.get(name, _untouched) for name in self._names]


class _Stores(Interpreter):
    """Runs a graph, and looks where it stores."""

    twice = False

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.index_put.default and not args[3:4]:
            numbers = torch.arange(args[0].numel()).reshape(args[0].shape)
            written = torch.ops.aten.index.Tensor(numbers, args[1]).flatten()
            self.twice |= written.unique().numel() < written.numel()
        return super().call_function(target, args, kwargs)


def _add_poke(graph: Graph, name: str) -> None:
    """A further graph input, which is a function: what the node `name` holds goes through it."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        poke = graph.placeholder(f"poke_{name}")
    node = next((node for node in graph.nodes if node.name == name), None)
    if node is None:  # dead: nothing reads it
        return
    with graph.inserting_after(node):
        poked = graph.call_function(_poke, (poke, node))
    node.replace_all_uses_with(poked, delete_user_cb=lambda user: user is not poked)


def _poke(function: Poke, value: Tensor) -> Tensor:
    return function(value)


def _recording(poke: Poke, name: str, record: dict[str, Tensor]) -> Poke:
    def recording(value: Tensor) -> Tensor:
        record[name] = poke(value)
        return record[name]

    return recording


def _constant(value: Tensor) -> Poke:
    return lambda _: value


def _untouched(value: Tensor) -> Tensor:
    return value


def _raise_dtypes(graph: Graph) -> None:
    for node in graph.nodes:
        if node.target is torch.ops.aten.nan_to_num.default:  # its numbers depend on the dtype
            largest = torch.finfo(node.meta["val"].dtype).max
            node.args = (node.args[0], 0.0, largest, -largest)
        args, kwargs = map_aggregate((node.args, node.kwargs), _raised)
        node.args, node.kwargs = args, kwargs


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROW else value


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    """Integers become floats of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _alike(actual: Tensor, expected: Tensor) -> bool:
    """Equal to a few units in the last place everywhere, so that nothing more need be asked."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    a, e = actual.double(), expected.double()
    if expected.dtype.itemsize == 1:
        return bool(((a - e).abs() <= _float8_step(expected)).logical_or((a == e) | (a.isnan() & e.isnan())).all())
    close = (a - e).abs() <= 4 * torch.finfo(expected.dtype).eps * _row_scale(e)
    return bool((close | (a == e) | (a.isnan() & e.isnan())).all())


def _difference(actual: Tensor, expected: Tensor, exact: Tensor | None, eps: float) -> str | None:
    """`eps` is of the dtype in which a row was computed, before it was rounded to a float8."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"{actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    if not expected.is_floating_point():
        return None if torch.equal(actual, expected) else "integers differ"
    a, e = actual.double(), expected.double()
    exact = None if exact is None else exact.double()
    x = e if exact is None or exact.shape != e.shape else torch.where(e.isfinite() & ~exact.isfinite(), e, exact)
    own = torch.where(e.isfinite() & x.isfinite(), (e - x).abs(), 0.0)
    if expected.dtype.itemsize == 1:
        allowed = _float8_step(x.to(expected.dtype)) + FACTOR * own + UNITS * eps * _row_scale(x)
        # How far beyond a float8's range a row went, it does not tell, nor then what rounding made of its other lanes.
        allowed = torch.where(x.isfinite().all(-1, keepdim=True), allowed, float("inf"))
    else:
        allowed = UNITS * torch.finfo(expected.dtype).eps * _row_scale(x) + FACTOR * _row_scale(own)
    allowed = allowed + torch.finfo(expected.dtype).tiny
    right = (a - x).abs() <= allowed
    if expected.dtype.itemsize == 1 and exact is not None and exact.shape == a.shape:
        right |= a == exact  # beyond the range of a float8 in float64 too: there the unfused run is the one that errs
    right |= ~e.isfinite() & _shows_poison(
        a, torch.finfo(expected.dtype).max if expected.dtype.itemsize == 1 else float("inf")
    )
    if bool(right.all()):
        return None
    at = int((~right).reshape(-1).int().argmax())
    value, want, best = (t.reshape(-1)[at].item() for t in (a, e, x))
    where = torch.unravel_index(torch.tensor(at), a.shape)
    return f"{value!r} at {[int(i) for i in where]}, the mutant gives {want!r} ({best!r} in float64)"


def _float8_step(value: Tensor) -> Tensor:
    """From each number of a float8 to the next: by so much may differ what was nearly equal before it was rounded."""
    info = torch.finfo(value.dtype)
    size = torch.where(value.float().isfinite(), value.double().abs(), 0.0).clamp_min(info.smallest_normal)
    return 1.001 * info.eps * 2.0 ** size.log2().floor()


def _shows_poison(actual: Tensor, largest: float) -> Tensor:
    """Is there an infinity or a NaN in the element's row, or (in a float8) what an infinity is clamped to?

    What a norm makes of an infinity is NaN in one lane and zero in the others, or NaN in all, as it is spelled
    (``x + 0 * x`` is ``x`` for numbers only). That the head is spoilt must show; in how many lanes is nobody's promise.
    """
    spoilt = ~actual.isfinite() | (actual.abs() >= largest)
    return spoilt.any(-1, keepdim=True).expand(actual.shape) if actual.dim() else spoilt


def _row_scale(value: Tensor) -> Tensor:
    """The largest finite magnitude of each row."""
    finite = torch.where(value.isfinite(), value.abs(), 0.0)
    return finite.amax(-1, keepdim=True).expand(value.shape) if value.dim() else finite
