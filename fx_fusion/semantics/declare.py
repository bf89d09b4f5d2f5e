"""What an opaque custom operation computes, declared in plain PyTorch, so that graphs that hold it can be fused."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fx_fusion.semantics.code_identity import describe

Function = Callable[..., Any]


@dataclass(frozen=True)
class Meaning:
    """`fn` computes what the operation called `name` (``namespace::name.overload``) computes.

    ``fn`` None: the operation stays opaque, whatever is said elsewhere. `example` makes random arguments admissible.
    """

    name: str
    fn: Function | None
    example: Callable[[dict[str, Any]], None] | None = None

    @property
    def title(self) -> str:
        """The operation, as people write it, and the function that stands for it."""
        assert self.fn is not None
        return f"{self.name.removesuffix('.default')} = {self.fn.__module__}.{self.fn.__qualname__}"


#: What can be had where the store is out of sight.
WITHOUT_STORE = "Norm and rotation can: fx_fusion.register_fusion(fx_fusion.QkNormRope())"


class Hidden(NamedTuple):
    """Why an operation that stores has no meaning: what it stores where is not in the graph.

    `attention` stores keys and values itself, unless another operation does.
    """

    reason: str
    attention: bool = False


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

    def of(self, op: torch._ops.OpOverload) -> Meaning | None:
        """What `op` is declared to compute; None if nothing is."""
        name = qualified_name(op)
        found = self._declared.get(name) or ready_made().get(name)
        return found if found is not None and found.fn is not None else None

    def fingerprint(self) -> str | None:
        """Changes whenever a declared function does, or what it refers to; None if that cannot be told.

        What comes with the package is covered by the hash of its sources.
        """
        digest = hashlib.sha256()
        for name, meaning in sorted(self._declared.items()):
            for fn in (meaning.fn, meaning.example):
                try:
                    described = describe(fn)
                except TypeError:
                    return None
                digest.update(f"{name}\n{described}\n".encode())
        return digest.hexdigest()


MEANINGS = Meanings()


def ready_made() -> Mapping[str, Meaning]:
    from fx_fusion.semantics.libraries import READY_MADE

    return READY_MADE


def qualified_name(op: torch._ops.OpOverload) -> str:
    """``namespace::name.overload``"""
    return f"{op._schema.name}.{op._overloadname}"


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
    overload: torch._ops.OpOverload | None,
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


def _identify(op: Any) -> tuple[str, torch._ops.OpOverload | None]:
    """The qualified name of `op`, and `op` itself where it is registered."""
    op = getattr(op, "_opoverload", op)
    if isinstance(op, str):
        return _named(op)
    if isinstance(op, torch._ops.OpOverloadPacket):
        overloads = op.overloads()
        if "default" not in overloads and len(overloads) != 1:
            raise TypeError(f"declare_meaning: {op} has overloads {', '.join(overloads)}; name one of them")
        op = getattr(op, "default" if "default" in overloads else overloads[0])
    if not isinstance(op, torch._ops.OpOverload):
        raise TypeError(
            "declare_meaning: expected an operation (torch.ops.namespace.name) or its name ('namespace::name'), "
            f"got {op!r}"
        )
    if op.namespace in ("aten", "prims"):
        raise TypeError(f"declare_meaning: {op} is PyTorch's own, its meaning is known; expected a custom operation")
    return qualified_name(op), op


def _named(name: str) -> tuple[str, torch._ops.OpOverload | None]:
    namespace, separator, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if not (separator and namespace.isidentifier() and base.isidentifier()):
        raise TypeError(f"declare_meaning: expected a name like 'namespace::name', got {name!r}")
    found = getattr(getattr(getattr(torch.ops, namespace), base, None), overload or "default", None)
    return f"{namespace}::{base}.{overload or 'default'}", found


def signature_mismatch(op: torch._ops.OpOverload, fn: Function) -> str | None:
    """What keeps `fn` from being called with the arguments of `op`; None if nothing does."""
    title = getattr(fn, "__qualname__", repr(fn))
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return f"the signature of {title}, the meaning of {op}, cannot be read"
    told = f"{title}{signature}, the meaning of {op._schema},"
    expected = {argument.name for argument in op._schema.arguments}
    missing = next((a.name for a in op._schema.arguments if a.name not in signature.parameters), None)
    places, named = arrange(op, {}, by_name=missing is None)
    try:
        bound = signature.bind(*places, **named).arguments
    except TypeError as error:
        about = f": it takes no argument {missing!r}" if missing is not None else ""
        return f"{told} cannot be called like the operation{about} ({error})"
    if missing is None:
        return None
    for parameter, argument in zip(bound, op._schema.arguments, strict=False):
        if parameter != argument.name and parameter in expected:
            return f"{told} takes {parameter!r} where the operation has {argument.name!r}"
    return None


def call_meaning(fn: Function, op: torch._ops.OpOverload, given: Mapping[str, Any]) -> Any:
    """``fn`` with the arguments `given`: by name if it has all of the schema's names, else in the schema's order."""
    parameters = inspect.signature(fn).parameters
    places, named = arrange(op, given, by_name=all(each.name in parameters for each in op._schema.arguments))
    return fn(*places, **named)


def arrange(op: torch._ops.OpOverload, given: Mapping[str, Any], *, by_name: bool) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of `op`, in order and by name; for one that is missing, the schema's default."""
    places: list[Any] = []
    named: dict[str, Any] = {}
    for argument in op._schema.arguments:
        value = given.get(argument.name, argument.default_value)
        if by_name or argument.kwarg_only:
            named[argument.name] = value
        else:
            places.append(value)
    return places, named
