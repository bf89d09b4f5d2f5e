"""One combination of alternatives: built, compiled, compared with eager."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fx_fusion.proof.region_function import relative_difference
from fx_fusion.report import FusionReport
from fx_fusion.testing import TOLERANCE, Outcome, run
from spellings.alternatives import AXES, Alternative, Model
from spellings.model import HIDDEN, POSITIONS, Shape

HEADS = [(4, 2), (4, 1), (2, 2), (1, 1), (8, 2), (6, 3)]
HEAD_DIMS = [16, 16, 16, 16, 16, 8, 32, 64, 80, 96, 128, 256]
GRIDS = [(0, 5), (0, 1), (0, 7), (2, 3), (3, 1), (1, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: As ``torch.compile`` takes ``dynamic``.
SIZES = {"static": False, "mark_dynamic": None, "dynamic": True}


@dataclass(frozen=True)
class Combination:
    """A choice on each axis, a shape, and how it is called."""

    shape: Shape
    chosen: dict[str, str]
    sizes: str = "static"
    inference_mode: bool = False

    def __str__(self) -> str:
        s = self.shape
        steps = " ".join(self.chosen.values())
        dtype = str(s.dtype).removeprefix("torch.")
        call = f"{self.sizes}{' inference_mode' if self.inference_mode else ''}"
        return f"{steps} | {s.num_heads}/{s.num_kv_heads}x{s.head_dim} {list(s.grid)} {dtype} | {call}"

    @property
    def alternatives(self) -> list[Alternative]:
        return [AXES[axis][name] for axis, name in self.chosen.items()]

    @property
    def fits(self) -> bool:
        return all(each.fits(self.shape, self.chosen) for each in self.alternatives)

    @property
    def may_decline(self) -> set[str]:
        """The codes with which this may stay unfused; empty if it must fuse."""
        codes = {code for each in self.alternatives for code in each.declines}
        if self.sizes == "dynamic":  # eps becomes an input, and every dimension of a cache a symbol
            codes |= {"norm.eps_is_input", "region.sizes"}
        if self.chosen["cache dtype"] != "SameDtype" and self.shape.dtype != torch.float32:
            # Inductor folds two casts into one: what is stored was never rounded to the model's dtype.
            codes |= {"proof.rounding", "rope.output_dtype"}
        return codes

    def model(self) -> Model:
        bases = tuple(dict.fromkeys(each.cls for each in self.alternatives))
        return type("Combined", (*bases, Model), {})(self.shape)

    def arguments(self, model: Any) -> tuple[Tensor, ...]:
        s = self.shape
        count = torch.Size(s.grid).numel()
        slot_shape = model.slot_shape()
        dtype = model.cache_dtype or s.dtype
        x = torch.randn(*s.grid, HIDDEN, dtype=s.dtype)
        positions = torch.randperm(POSITIONS)[: 3 * count].reshape(3, *s.grid)
        slots = torch.randperm(s.slots)[: torch.Size(slot_shape).numel()].reshape(slot_shape)
        caches = [torch.randn(shape).to(dtype) for shape in model.cache_shapes()]
        if self.sizes == "mark_dynamic":
            _mark_tokens(x, positions, slots)
        return (x, positions, slots, *caches)


def _mark_tokens(x: Tensor, positions: Tensor, slots: Tensor) -> None:
    for tensor, dim in ((x, x.dim() - 2), (positions, positions.dim() - 1), (slots, slots.dim() - 1)):
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


Choose = Callable[[Sequence[Any]], Any]


def draw(choose: Choose) -> Combination:
    """One of all that there are; `choose` picks one of the members that it is given."""
    heads, (batch, tokens) = choose(HEADS), choose(GRIDS)
    shape = Shape(*heads, choose(HEAD_DIMS), batch, tokens, choose(DTYPES))
    chosen: dict[str, str] = {}
    for axis, names in AXES.items():
        chosen[axis] = choose([name for name, each in names.items() if each.fits(shape, chosen)])
    return Combination(shape, chosen, choose(list(SIZES)), choose([False, False, True]))


@dataclass(frozen=True)
class Verdict:
    """``fused``, ``declined`` with `code`, or ``wrong``; `justified` unless it should have fused."""

    state: str
    code: str | None
    message: str
    report: FusionReport | None = None

    def justified(self, combination: Combination) -> bool:
        return self.state == "fused" or (self.state == "declined" and self.code in combination.may_decline)


def verdict(combination: Combination, seed: int = 0) -> Verdict:
    torch.manual_seed(seed)
    s = combination.shape
    with torch.inference_mode() if combination.inference_mode else contextlib.nullcontext():
        model = combination.model()
        args = combination.arguments(model)
        try:
            outcome = run(model, args, dynamic=SIZES[combination.sizes])
        except Exception as error:
            return Verdict("crashed", type(error).__name__, str(error))
        report = outcome.report
        difference = _difference(outcome, model, args, s.dtype)
        if difference is not None:
            return Verdict("wrong", None, f"{difference}\n{report}", report)
    if len(report.fused) == 1 and len(report.layers) == 1:
        return Verdict("fused", None, str(report), report)
    return Verdict("declined", report.layers[0].code, str(report), report)


def _difference(outcome: Outcome, model: Model, args: tuple[Tensor, ...], dtype: torch.dtype) -> str | None:
    """What differs from eager by more than rounding in the model's dtype, or in that of the value, explains."""
    model, args = copy.deepcopy((model, args))
    with torch.no_grad():
        expected = model(*args)
    pairs = zip(
        pytree.tree_leaves((outcome.outputs, outcome.state[1])), pytree.tree_leaves((expected, args)), strict=True
    )
    for i, (a, e) in enumerate(pairs):
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            return f"value {i} is {a.dtype} {list(a.shape)}, expected {e.dtype} {list(e.shape)}"
        allowed = max(TOLERANCE[dtype], TOLERANCE.get(e.dtype, 0.0)) if e.is_floating_point() else 0.0
        difference = relative_difference(a.double(), e.double())
        if not difference <= allowed:
            return f"value {i} differs by {difference:.1e}, allowed {allowed:.1e}"
    return None


def simplest(combination: Combination, like: Verdict) -> Combination:
    """A combination that ends alike and differs from the plain one in as little as possible."""
    plain = {axis: next(iter(names)) for axis, names in AXES.items()}
    current = combination
    for change in (
        lambda c: replace(c, sizes="static"),
        lambda c: replace(c, inference_mode=False),
        lambda c: replace(c, shape=replace(c.shape, dtype=torch.float32)),
        lambda c: replace(c, shape=replace(c.shape, head_dim=16)),
        lambda c: replace(c, shape=replace(c.shape, num_heads=4, num_kv_heads=2)),
        lambda c: replace(c, shape=replace(c.shape, batch=0)),
        lambda c: replace(c, shape=replace(c.shape, tokens=5)),
        *(lambda c, axis=axis: replace(c, chosen={**c.chosen, axis: plain[axis]}) for axis in AXES),
    ):
        candidate = change(current)
        if candidate == current or not candidate.fits:
            continue
        found = verdict(candidate)
        if (found.state, found.code) == (like.state, like.code):
            current = candidate
    return current
