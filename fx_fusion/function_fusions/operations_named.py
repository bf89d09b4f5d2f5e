"""Operations that a function names and that do not exist."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


def missing_operations(fn: Callable[..., Any]) -> list[str]:
    """``torch.ops.*`` that the code of `fn` names and nobody registered, also where this machine does not come by.

    A function that imports something may register them itself: of such a one nothing is said.
    """
    code = getattr(fn, "__code__", None)
    if not isinstance(code, types.CodeType):
        return []
    codes = list(_codes(code))
    if any(step.opname == "IMPORT_NAME" for each in codes for step in dis.get_instructions(each)):
        return []
    named = dict.fromkeys(name for each in codes for name in _named(each))
    return [f"torch.ops.{space}.{name}" for space, name in named if not hasattr(getattr(torch.ops, space), name)]


def is_missing(error: Exception) -> bool:
    """Was it raised because something does not exist that a replacement names?"""
    return isinstance(error, NameError) or (isinstance(error, AttributeError) and "_OpNamespace" in str(error))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(code: types.CodeType) -> Iterator[tuple[str, str]]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for i, step in enumerate(steps[:-3]):
        following = steps[i + 1 : i + 4]
        reads = all(each.opname in ("LOAD_ATTR", "LOAD_METHOD") for each in following)
        if step.opname.startswith("LOAD_") and step.argval == "torch" and reads and following[0].argval == "ops":
            yield following[1].argval, following[2].argval
