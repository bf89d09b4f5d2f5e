"""Does a user's replacement do what it takes the place of? Both run for real, in the dtypes of the match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.reference import Reference
from fx_fusion.function_fusions.trials import Likes, Trial, Trials
from fx_fusion.graph.torch_compat import pytree

Function = Callable[..., Any]

#: How far a replacement may be off, of the largest value of a row: this many units in the last place of the result's
#: dtype; and this many times as far as what it replaces is off from itself in float64, and as that moves when its input
#: does by one unit in the last place of float32 (it may round as often, and elsewhere). Where what it replaces does not
#: run in float64, none of this is known.
UNITS, FACTOR, UNITS_ALONE = 2, 4, 8

#: How near to its float64 value, relative to the row, a value is one that did not overflow on the way.
_NEAR = 0.05

#: Of quantised values this part may be off by one: what is nearly half-way between two of them rounds either way.
_OFF_BY_ONE = 0.01

#: Bytes before and after each tensor on a GPU that belong to nobody: an index that a kernel takes otherwise than the
#: graph does reads there, and shows.
_MARGIN = 1 << 22


def compare_replacement(
    reference: Reference,
    replacement: Function,
    likes: Likes,
    others: Mapping[str, Any],
    device: torch.device,
    literals: Sequence[float] = (),
    same: Mapping[str, str] | None = None,
) -> float:
    """The largest difference found, relative to the largest value of its row.

    Args:
        reference: what it must compute, and of whose arguments it changes those that it changes.
        likes: tensors (of the meta device will do) that give the shape, dtype and strides of each tensor argument.
        others: the other arguments.
        literals: see :class:`Trials`, likewise `same`.

    Raises:
        Decline: ``fusion.replacement_differs``, ``fusion.replacement_fails``, or ``fusion.unverified`` where what it
            replaces cannot run on `device`.
    """
    trials = Trials(reference, likes, literals, same or {})
    worst = 0.0
    for trial in trials:
        worst = max(worst, _compare(reference, replacement, others, device, trial, trials.indexes))
    return worst


def _compare(
    reference: Reference,
    replacement: Function,
    others: Mapping[str, Any],
    device: torch.device,
    trial: Trial,
    indexes: bool,
) -> float:
    def given() -> dict[str, torch.Tensor]:
        made: dict[int, torch.Tensor] = {}
        for value in trial.values.values():
            if id(value) not in made:
                made[id(value)] = _placed(value, device, indexes)
        return {name: made[id(value)] for name, value in trial.values.items()}

    try:
        expected = [value.cpu() for value in reference.run(given(), device)]
    except Decline:
        raise
    except Exception as error:
        found = f"{reference.what} cannot run on {device}: {first_line(error)}"
        raise Decline("fusion.unverified", found) from error
    here = given()
    try:
        with torch.no_grad():
            returned = replacement(**here, **others)
    except Exception as error:
        found = f"on {device}, on {trial.name}, the replacement raises {first_line(error)}"
        raise ReplacementFails(found, error) from error
    actual = [leaf.cpu() for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    if len(actual) != len(reference.returned):
        found = f"the replacement returns {len(actual)} tensors, {reference.what} {len(reference.returned)}"
        raise Decline("fusion.replacement_differs", found)
    exact, moved = _exact(reference, trial.values), _exact(reference, _moved(trial.values))
    pairs = [(f"result {i}", a, j) for i, (a, j) in enumerate(zip(actual, reference.returned, strict=True))]
    pairs += [(f"argument {name} afterwards", here[name].cpu(), j) for name, j in reference.mutated.items()]
    checker = _Checker(reference, trial)
    worst = 0.0
    for name, a, j in pairs:
        known = (exact[j], moved[j]) if exact and moved else None
        worst = max(worst, checker.differ(name, a, expected[j], known))
    for name, value in trial.values.items():
        if name not in reference.mutated and not _equal(here[name].cpu(), value):
            raise Decline("fusion.replacement_differs", f"argument {name} afterwards differs: it is to stay as it is")
    return worst


class ReplacementFails(Decline):
    """The replacement raised `error`."""

    def __init__(self, found: str, error: Exception) -> None:
        super().__init__("fusion.replacement_fails", found)
        self.error = error


class _Checker:
    """One trial's results beside each other."""

    def __init__(self, reference: Reference, trial: Trial) -> None:
        self._reference, self._trial = reference, trial

    def differ(
        self, name: str, a: torch.Tensor, e: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor] | None
    ) -> float:
        """How far `a` is from `e`, relative to the largest of a row; `exact` is what `e` rounds, and the same moved."""
        what = self._reference.what
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            found = f"{name} of the replacement is {a.dtype} {list(a.shape)}, of {what} {e.dtype} {list(e.shape)}"
            raise Decline("fusion.replacement_differs", found)
        if not (e.is_floating_point() or e.is_complex()):
            return self._differ_in_integers(name, a, e)
        if exact is not None and exact[0].shape != e.shape:
            exact = None
        if e.is_complex():
            a, e = torch.view_as_real(a), torch.view_as_real(e)
            exact = exact and (torch.view_as_real(exact[0]), torch.view_as_real(exact[1]))
        return self._differ_in_floats(name, a, e, exact)

    def _differ_in_integers(self, name: str, a: torch.Tensor, e: torch.Tensor) -> float:
        trial = self._trial
        if torch.equal(a, e) or (trial.equal and self._reference.orders):
            return 0.0
        if e.dtype in (torch.int8, torch.uint8) and self._reference.rounds:
            info, off = torch.iinfo(e.dtype), (a.int() - e.int()).abs()
            at_end = (e == info.min) | (e == info.max)
            few = (off > 0).double().mean() <= _OFF_BY_ONE
            if trial.large or trial.infinite or (few and off.max() <= 1 and not off[at_end].any()):
                return 0.0
        found = f"{name} differs from that of {self._reference.what} (integers), on {trial.name}"
        raise Decline("fusion.replacement_differs", found)

    def _differ_in_floats(
        self, name: str, a: torch.Tensor, e: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor] | None
    ) -> float:
        unit = torch.finfo(e.dtype).eps
        least = float(torch.finfo(e.dtype).tiny)  # below this a GPU may take a number for zero
        a, e = a.double(), e.double()
        x, moved = (each.double() for each in exact) if exact is not None else (None, None)
        counts = e.isfinite() & ~self._overflowed(e, x)
        self._check_not_finite(name, a, e, x, counts)
        size = _of_rows(e.abs(), counts)
        allowed = ((UNITS if x is not None else UNITS_ALONE) * unit * size).clamp_min(least)
        if x is not None and moved is not None:
            allowed = allowed + FACTOR * (_of_rows((e - x).abs(), counts) + _of_rows((moved - x).abs(), counts))
        error = _of_rows((a - e).abs().nan_to_num(nan=torch.inf), counts)
        if not (error > allowed).any():
            return float((error / size.clamp_min(1e-300)).max()) if error.numel() else 0.0
        row = int((error - allowed).flatten().argmax())
        largest, of, limit = (float(each.flatten()[row]) for each in (error, size, allowed))
        found = (
            f"{name} differs by {largest:.1e} where the largest value of the row is {of:.1e}, on {self._trial.name}; "
            f"{limit:.1e} is allowed for rounding"
        )
        raise Decline("fusion.replacement_differs", found)

    def _overflowed(self, e: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Rows where large input made what is replaced overflow on the way, though it came back to some number."""
        if x is None or not self._trial.large:
            return torch.zeros_like(e, dtype=torch.bool)
        off = _of_rows((e - x).abs(), e.isfinite() & x.isfinite())
        return (off > _NEAR * _of_rows(x.abs(), x.isfinite())).expand(e.shape)

    def _check_not_finite(
        self, name: str, a: torch.Tensor, e: torch.Tensor, x: torch.Tensor | None, counts: torch.Tensor
    ) -> None:
        """Where what is replaced has a value the replacement has one. Where it is infinite the replacement is not
        finite either, unless large input made it so: there the replacement may be the better one, never the reverse.
        """
        good = a.isfinite() & e.isfinite() | ~a.isfinite() & ~e.isfinite() | e.isnan()
        if self._trial.large:
            good |= ~counts
        elif x is not None:
            good |= e.isinf() & x.isfinite() & ((a - x).abs() <= _NEAR * _of_rows(x.abs(), x.isfinite()))
        if good.all():
            return
        i = int((~good).flatten().nonzero()[0])
        values = float(a.flatten()[i]), float(e.flatten()[i])
        found = f"{name} is {values[0]} where that of {self._reference.what} is {values[1]}, on {self._trial.name}"
        raise Decline("fusion.replacement_differs", found)


def _of_rows(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The largest of those of each row that count and are finite."""
    x = torch.where(counts & ~x.isnan(), x, 0.0)
    return x.amax(-1, keepdim=True) if x.dim() and x.numel() else x


def _moved(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every float off by about one unit in the last place of float32 (of float64, where it is that)."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if value.is_floating_point():
            unit = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32).eps
            sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            value = value.double() * (1 + unit * sign)
        found[name] = value
    return found


def _exact(reference: Reference, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """The reference in float64; None if an operation does not take that."""
    try:
        return reference.run(values, torch.device("cpu"), wide=True)
    except Exception:
        return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype.itemsize == 1 and a.dtype.is_floating_point:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _placed(value: torch.Tensor, device: torch.device, margin: bool) -> torch.Tensor:
    """A copy on `device`, with the same strides; with a `margin`, inside more memory."""
    stride = value.stride()
    if 0 in stride and value.numel():
        one = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)
        return _placed(value[one].contiguous(), device, margin).expand(value.shape)
    if not margin or device.type != "cuda":
        return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device).copy_(value)
    room = sum((size - 1) * step for size, step in zip(value.shape, stride, strict=True)) + 1 if value.numel() else 1
    before = min(-(-room // 64) * 64, _MARGIN)
    flat = torch.zeros(room + 2 * before, dtype=value.dtype, device=device)
    return flat.as_strided(value.shape, stride, before).copy_(value)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
