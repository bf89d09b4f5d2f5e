"""What the behaviour of functions and objects of others depends on, as text: for the keys of compile caches."""

from __future__ import annotations

import builtins
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fx_fusion.graph.torch_compat import CustomOpDef, OpOverload, OpOverloadPacket

_LITERALS = (bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum)
_TORCH_LITERALS = (torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload, OpOverloadPacket)

#: The versions in the cache key stand for their code.
_INSTALLED = ("torch", "triton", "typing", "math", "operator", "functools")


class Unreadable(Exception):
    """Something whose content cannot be told from outside: no cache may be used."""


def fingerprint(value: Any) -> str:
    """Equal for values that behave alike; changes with the source of functions and classes, with what they close over
    and with what they name.

    Raises:
        Unreadable: a tensor, a value of an unknown kind, or code without source.
    """
    return _Reader().read(value)


class _Reader:
    """Reads one value and all that it refers to, each function and class once."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._known: dict[int, str] = {}

    def read(self, value: Any) -> str:
        if isinstance(value, (*_LITERALS, *_TORCH_LITERALS)):
            return f"{type(value).__qualname__}:{value!r}"
        if isinstance(value, torch.Tensor):
            raise Unreadable("a tensor")
        if id(value) in self._known:
            return self._known[id(value)]
        if id(value) in self._open:
            return "seen"
        self._open.add(id(value))
        text = self._inside(value)
        self._open.remove(id(value))
        if isinstance(value, (types.FunctionType, type)):
            # These live as long as what refers to them, so that their place in memory names nothing else meanwhile.
            text = self._known[id(value)] = hashlib.sha256(text.encode()).hexdigest()
        return text

    def _inside(self, value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({self._all(value)})"
        if isinstance(value, (set, frozenset)):
            return f"set({','.join(sorted(map(self.read, value)))})"
        if isinstance(value, Mapping):
            return f"map({','.join(sorted(f'{self.read(k)}={self.read(v)}' for k, v in value.items()))})"
        if isinstance(value, functools.partial):
            return f"partial({self._all((value.func, value.args, value.keywords))})"
        if isinstance(value, types.MethodType):
            return f"method({self._all((value.__func__, value.__self__))})"
        if isinstance(value, types.ModuleType):
            return f"module({value.__name__},{getattr(value, '__version__', '')},{_source_of_module(value.__name__)})"
        if isinstance(value, types.CodeType):
            return f"code({value.co_code.hex()},{value.co_names},{value.co_varnames},{self._all(value.co_consts)})"
        if isinstance(value, CustomOpDef):
            return f"op({value._qualname},{self.read(value._init_fn)})"
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
            return self._named(value)
        if not hasattr(value, "__dict__"):
            raise Unreadable(repr(type(value)))
        return f"object({self._all((type(value), vars(value)))})"

    def _named(self, value: Any) -> str:
        name = f"{value.__module__}.{value.__qualname__}"
        if _is_installed(value):
            return f"named({name})"
        return f"def({name},{self._source(value)},{self._all(_referred_to(value))})"

    def _source(self, value: Any) -> str:
        """The source of its module, or of itself where it has none (a notebook)."""
        of_module = _source_of_module(value.__module__)
        if of_module:
            return of_module
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            if isinstance(value, types.FunctionType):
                return self.read(value.__code__)
            raise Unreadable(repr(value)) from None

    def _all(self, values: Iterable[Any]) -> str:
        return ",".join(map(self.read, values))


def _referred_to(value: Any) -> list[Any]:
    """Of a class: its bases. Of a function: what it closes over, its defaults, and what it names of its module."""
    if isinstance(value, type):
        return [value.__bases__]
    cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
    named = [value.__globals__[name] for name in sorted(_names(value.__code__)) if name in value.__globals__]
    return [cells, value.__defaults__, value.__kwdefaults__, named]


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _names(code: types.CodeType) -> set[str]:
    nested = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _is_installed(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType) or value is getattr(builtins, value.__name__, None):
        return True
    return (value.__module__ or "").partition(".")[0] in _INSTALLED


@functools.cache
def _source_of_module(name: str) -> str:
    """A hash of it; empty where there is none to read."""
    module = sys.modules.get(name)
    if module is None or not getattr(module, "__file__", None):
        return ""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):
        return ""
