"""What an operation computes, as a function in plain PyTorch, and how that function is called in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fx_fusion.graph.torch_compat import OpOverload

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


def qualified_name(op: OpOverload) -> str:
    """``namespace::name.overload``"""
    return f"{op._schema.name}.{op._overloadname}"


def signature_mismatch(op: OpOverload, fn: Function) -> str | None:
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


def call_meaning(fn: Function, op: OpOverload, given: Mapping[str, Any]) -> Any:
    """``fn`` with the arguments `given`: by name if it has all of the schema's names, else in the schema's order."""
    parameters = inspect.signature(fn).parameters
    places, named = arrange(op, given, by_name=all(each.name in parameters for each in op._schema.arguments))
    return fn(*places, **named)


def arrange(op: OpOverload, given: Mapping[str, Any], *, by_name: bool) -> tuple[list[Any], dict[str, Any]]:
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
