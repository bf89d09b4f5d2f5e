"""The parameters of a pattern: which are tensors of the graph, which are numbers to read off, which are alternatives.

===================  =================================================================================
annotation           meaning
===================  =================================================================================
none, ``Tensor``     a tensor of the graph
``Tensor | None``    an optional part: the pattern is tried with the tensor, then with None
``int``, ``float``   a number that stands in the graph, read off and handed to the replacement
``float | None``     likewise; the pattern is also tried with None
``bool``             an alternative: the pattern is tried with True, then with False
``Literal[...]``     alternatives, tried in order
===================  =================================================================================
"""

from __future__ import annotations

import enum
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


class Kind(enum.Enum):
    TENSOR = "tensor"
    INT = "int"
    FLOAT = "float"
    CHOICE = "choice"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a pattern. ``choices`` are the values of a CHOICE; `optional`: None is tried too."""

    name: str
    kind: Kind
    optional: bool = False
    choices: tuple[Any, ...] = ()


Variant = Mapping[str, Any]
"""What is decided before the graph is asked: the value of each CHOICE, and None for each part that is left out."""


def read_parameters(fn: Callable[..., Any], argument: str = "pattern") -> tuple[Parameter, ...]:
    """The parameters of `fn`, from its signature.

    Raises:
        TypeError: `fn` is no function, or a parameter has a kind or an annotation that means nothing here.
    """
    if not callable(fn):
        raise TypeError(f"register_fusion: {argument} must be a function, got {fn!r}")
    hints = _hints(fn)
    found: list[Parameter] = []
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"register_fusion: {argument} has the parameter {parameter}; expected parameters that can be named"
            )
        found.append(_read(name, hints.get(name, torch.Tensor), argument))
    if not any(parameter.kind is Kind.TENSOR for parameter in found):
        raise TypeError(f"register_fusion: {argument} takes no tensor; expected at least one tensor parameter")
    return tuple(found)


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(fn)
    except NameError as error:
        raise TypeError(f"register_fusion: an annotation of {_name(fn)} cannot be resolved: {error}") from error


def _read(name: str, annotation: Any, argument: str) -> Parameter:
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        rest = [member for member in members if member is not type(None)]
        optional = len(rest) < len(members)
        annotation = rest[0] if len(rest) == 1 else annotation
    if annotation is torch.Tensor:
        return Parameter(name, Kind.TENSOR, optional)
    if annotation is bool:
        return Parameter(name, Kind.CHOICE, choices=(True, False, None) if optional else (True, False))
    if annotation in (int, float):
        return Parameter(name, Kind.INT if annotation is int else Kind.FLOAT, optional)
    if typing.get_origin(annotation) is Literal:
        return Parameter(name, Kind.CHOICE, choices=(*typing.get_args(annotation), *((None,) if optional else ())))
    raise TypeError(
        f"register_fusion: parameter {name!r} of {argument} is annotated {annotation!r}; expected Tensor, "
        "Tensor | None, int, float, bool or Literal[...]"
    )


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def variants(parameters: Sequence[Parameter]) -> list[Variant]:
    """Every combination of choices and optional parts; parts that are present come first."""
    ways: list[list[tuple[str, Any]]] = []
    for parameter in parameters:
        if parameter.kind is Kind.CHOICE:
            ways.append([(parameter.name, choice) for choice in parameter.choices])
        elif parameter.optional:
            ways.append([("", None), (parameter.name, None)])
    return [{name: value for name, value in way if name} for way in itertools.product(*ways)]


def asked(parameters: Sequence[Parameter], variant: Variant, *kinds: Kind) -> list[str]:
    """The names of those of these `kinds` that the graph must supply."""
    return [parameter.name for parameter in parameters if parameter.kind in kinds and parameter.name not in variant]


def check_replacement(pattern: Sequence[Parameter], replacement: Callable[..., Any], argument: str) -> None:
    """The replacement is called with every parameter of the pattern, by name.

    Raises:
        TypeError: it does not take exactly those.
    """
    names = [parameter.name for parameter in pattern]
    try:
        inspect.signature(replacement).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise TypeError(
            f"register_fusion: {argument} {_name(replacement)} is called with the parameters of the pattern, "
            f"{', '.join(names)}, by name; {error}"
        ) from error
