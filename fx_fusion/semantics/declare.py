"""What an opaque custom operation computes, declared in plain PyTorch, so that graphs that hold it can be fused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from fx_fusion.fingerprint import Unreadable, fingerprint
from fx_fusion.graph.torch_compat import OpOverload, OpOverloadPacket
from fx_fusion.semantics.libraries import READY_MADE
from fx_fusion.semantics.meaning import Function, Meaning, qualified_name, signature_mismatch


class MeaningHandle:
    """A declaration; `remove` ends it, as does leaving a ``with`` block."""

    def __init__(self, declared: dict[str, Meaning], meaning: Meaning) -> None:
        self._declared = declared
        self.meaning = meaning

    def remove(self) -> None:
        """Later compilations take the operation as opaque again. Removing twice is allowed."""
        if self._declared.get(self.meaning.name) is self.meaning:
            del self._declared[self.meaning.name]

    def __enter__(self) -> MeaningHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class Meanings:
    """Declared meanings, and behind them those that come with the package."""

    def __init__(self) -> None:
        self._declared: dict[str, Meaning] = {}

    def add(self, meaning: Meaning) -> MeaningHandle:
        if meaning.name in self._declared:
            raise ValueError(f"declare_meaning: {meaning.name} has a declared meaning already; remove that one first")
        self._declared[meaning.name] = meaning
        return MeaningHandle(self._declared, meaning)

    def of(self, op: OpOverload) -> Meaning | None:
        """What `op` is declared to compute; None if nothing is."""
        name = qualified_name(op)
        found = self._declared.get(name) or READY_MADE.get(name)
        return found if found is not None and found.fn is not None else None

    def fingerprint(self) -> str | None:
        """Changes whenever a declared function does, or what it refers to; None if that cannot be told.

        What comes with the package is covered by the hash of its sources.
        """
        try:
            parts = [fingerprint(meaning) for _, meaning in sorted(self._declared.items())]
        except Unreadable:
            return None
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


MEANINGS = Meanings()


def declare_meaning(op: Any, fn: Any = ..., *, example: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """Declare what the custom operation `op` computes, in plain PyTorch, for all later compilations.

    `fn` takes the operation's arguments (by name if it has the schema's names, else in order), returns what it returns,
    and writes in place what it writes::

        handle = fx_fusion.declare_meaning(torch.ops.mylib.norm, my_norm)

        @fx_fusion.declare_meaning("mylib::rope_")           # before or after the library is loaded
        def rope(positions, q, k, table): ...

        with fx_fusion.declare_meaning(torch.ops.mylib.store, my_store):
            ...

    A fusion that relies on it is marked *assumed* in its report. Where the operation can run, the two are compared
    once on small random arguments, and a meaning that differs is not used.

    Args:
        op: ``torch.ops.namespace.name`` (or one of its overloads), or its name, ``"namespace::name"``.
        fn: the function, or None: the operation stays opaque, even if a meaning for it comes with the package.
        example: makes random arguments admissible for the comparison. It gets them by name and changes them in place,
            for instance ``given["positions"].random_(0, len(given["table"]))``. Without one, integers below the
            smallest leading size of the float arguments are tried.

    Returns:
        A handle with `remove`, which is also a context manager; as a decorator, the function.

    Raises:
        TypeError: `op` is no operation outside ATen, or `fn` cannot be called with its arguments.
        ValueError: `op` has a declared meaning already.
    """
    name, overload = _identify(op)
    if fn is ...:

        def decorate(function: Function) -> Function:
            _declare(name, overload, function, example)
            return function

        return decorate
    return _declare(name, overload, fn, example)


def _declare(
    name: str,
    overload: OpOverload | None,
    fn: Function | None,
    example: Callable[[dict[str, Any]], None] | None,
) -> MeaningHandle:
    if fn is not None and not callable(fn):
        raise TypeError(f"declare_meaning: expected a function or None as the meaning of {name}, got {fn!r}")
    if example is not None and not callable(example):
        raise TypeError(f"declare_meaning: expected a function as example, got {example!r}")
    if fn is not None and overload is not None:
        problem = signature_mismatch(overload, fn)
        if problem is not None:
            raise TypeError(f"declare_meaning: {problem}")
    return MEANINGS.add(Meaning(name, fn, example))


def _identify(op: Any) -> tuple[str, OpOverload | None]:
    """The qualified name of `op`, and `op` itself where it is registered."""
    op = getattr(op, "_opoverload", op)
    if isinstance(op, str):
        return _named(op)
    if isinstance(op, OpOverloadPacket):
        overloads = op.overloads()
        if "default" not in overloads and len(overloads) != 1:
            raise TypeError(f"declare_meaning: {op} has overloads {', '.join(overloads)}; name one of them")
        op = getattr(op, "default" if "default" in overloads else overloads[0])
    if not isinstance(op, OpOverload):
        raise TypeError(
            "declare_meaning: expected an operation (torch.ops.namespace.name) or its name ('namespace::name'), "
            f"got {op!r}"
        )
    if op.namespace in ("aten", "prims"):
        raise TypeError(f"declare_meaning: {op} is PyTorch's own, its meaning is known; expected a custom operation")
    return qualified_name(op), op


def _named(name: str) -> tuple[str, OpOverload | None]:
    namespace, separator, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if not (separator and namespace.isidentifier() and base.isidentifier()):
        raise TypeError(f"declare_meaning: expected a name like 'namespace::name', got {name!r}")
    found = getattr(getattr(getattr(torch.ops, namespace), base, None), overload or "default", None)
    return f"{namespace}::{base}.{overload or 'default'}", found
