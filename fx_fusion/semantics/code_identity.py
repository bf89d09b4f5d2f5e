"""An image of a function that changes whenever its code does, or anything that it refers to: for cache keys."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch

from fx_fusion.graph.torch_compat import OpOverload, OpOverloadPacket

_LITERALS = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device)


def describe(value: Any) -> str:
    """Raises TypeError if something that `value` refers to has no stable image (an open file, a tensor)."""
    return repr(_image(value, set()))


def _image(value: Any, seen: set[int]) -> Any:
    if isinstance(value, _LITERALS):
        return (type(value).__name__, repr(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_image(item, seen) for item in value))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted(repr(_image(item, seen)) for item in value))
    if isinstance(value, dict):
        return ("dict", *sorted(repr((_image(k, seen), _image(v, seen))) for k, v in value.items()))
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__, str(getattr(value, "__version__", "")))
    if isinstance(value, types.CodeType):
        return (value.co_code.hex(), value.co_names, value.co_varnames, _image(value.co_consts, seen))
    if isinstance(value, functools.partial):
        return ("partial", *(_image(part, seen) for part in (value.func, value.args, value.keywords)))
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, types.MethodType):
        return ("method", _image(value.__func__, seen), _image(value.__self__, seen))
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return _named(value)
    if isinstance(value, (OpOverload, OpOverloadPacket)):
        return ("operation", str(value))
    raise TypeError(f"{value!r} has no stable description")


def _named(value: Any) -> Any:
    """What is found by its name; a class of the user's, by its source too."""
    name = ("named", value.__module__, value.__qualname__)
    if not isinstance(value, type) or _is_installed(value.__module__):
        return name
    try:
        return (*name, inspect.getsource(value))
    except OSError as error:
        raise TypeError(f"the source of {value!r} cannot be read") from error


def _function(fn: types.FunctionType, seen: set[int]) -> Any:
    name = ("function", fn.__module__, fn.__qualname__)
    if id(fn) in seen or _is_installed(fn.__module__):
        return name
    seen.add(id(fn))
    names = sorted(set(_global_names(fn.__code__)) & fn.__globals__.keys())
    return (
        *name,
        _image(fn.__code__, seen),
        _image((fn.__defaults__, fn.__kwdefaults__), seen),
        tuple(_image(cell.cell_contents, seen) for cell in fn.__closure__ or ()),
        tuple((each, _image(fn.__globals__[each], seen)) for each in names),
    )


def _is_installed(module: str | None) -> bool:
    """Do the versions in the cache key stand for the code?"""
    return (module or "").partition(".")[0] in ("builtins", "torch", "math", "operator", "typing", "functools")


def _global_names(code: types.CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
