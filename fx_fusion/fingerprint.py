"""What a registered fusion's behaviour depends on, as text: for the keys of compile caches."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch

from fx_fusion.graph.torch_compat import CustomOpDef, OpOverload, OpOverloadPacket

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, OpOverload)


class Unreadable(Exception):
    """Something whose content cannot be told from outside: no cache may be used."""


def fingerprint(value: Any) -> str:
    """Equal for values that behave alike; changes with the source of functions and classes and what they close over.

    Raises:
        Unreadable: a value of an unknown kind, or code without source.
    """
    return _read(value, frozenset())


def _read(value: Any, open_: frozenset[int]) -> str:
    if isinstance(value, (*_PLAIN, enum.Enum)):
        return f"{type(value).__qualname__}:{value!r}"
    if id(value) in open_:
        return "seen"
    inner = functools.partial(_read, open_=open_ | {id(value)})
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(inner, value))})"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(map(inner, value)))})"
    if isinstance(value, Mapping):
        return f"map({','.join(sorted(f'{inner(k)}={inner(v)}' for k, v in value.items()))})"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)},{inner(value.args)},{inner(value.keywords)})"
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    if isinstance(value, types.MethodType):
        return f"method({inner(value.__func__)},{inner(value.__self__)})"
    if isinstance(value, type):
        return f"class({value.__module__}.{value.__qualname__},{_source(value)})"
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, OpOverloadPacket)) or _is_torch(value):
        return f"named({getattr(value, '__module__', '')}.{getattr(value, '__name__', str(value))})"
    if isinstance(value, CustomOpDef):
        return f"op({value._qualname},{inner(value._init_fn)})"
    if not hasattr(value, "__dict__"):
        raise Unreadable(repr(type(value)))
    return f"object({inner(type(value))},{inner(vars(value))})"


def _function(fn: types.FunctionType, inner: Any) -> str:
    """Its module's source, what it closes over, its defaults, and what it names of other modules."""
    cells = [cell.cell_contents for cell in fn.__closure__ or () if not _is_empty(cell)]
    if _is_torch(fn):
        return f"named({fn.__module__}.{fn.__qualname__})"
    named = [fn.__globals__[name] for name in sorted(_names(fn.__code__)) if name in fn.__globals__]
    parts = (fn.__qualname__, _source(fn), cells, fn.__defaults__, fn.__kwdefaults__, named)
    return f"def({','.join(map(inner, parts))})"


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _names(code: types.CodeType) -> set[str]:
    nested = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _is_torch(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "triton", "builtins", "typing", "math", "operator")


def _source(value: Any) -> str:
    """The source of its module, or of itself where it has none (a notebook)."""
    module = sys.modules.get(value.__module__)
    try:
        if module is not None and getattr(module, "__file__", None):
            return _module_source(module.__name__)
        return inspect.getsource(value)
    except (OSError, TypeError):
        if isinstance(value, types.FunctionType):
            return _code(value.__code__)
        raise Unreadable(repr(value)) from None


@functools.cache
def _module_source(name: str) -> str:
    return hashlib.sha256(inspect.getsource(sys.modules[name]).encode()).hexdigest()


def _code(code: types.CodeType) -> str:
    constants = [_code(const) if isinstance(const, types.CodeType) else repr(const) for const in code.co_consts]
    return f"{code.co_code.hex()},{constants},{code.co_names}"
