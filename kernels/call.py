"""What a call of a fused operation is made of, declared once as two dataclasses.

A *call* holds tensors (graph nodes, fake tensors or real ones) and, in its field ``options``, a frozen dataclass of
everything that is told by value. Schema, argument order and conversions are derived from their fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: How an option's annotation is written in a schema.
_SCHEMA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "float | None": "float?",
    "str | None": "str?",
    "tuple[int, ...]": "int[]",
    "CacheLayout": "SymInt[]",
}


#: Metadata of a field whose tensor the operation writes in place.
WRITTEN: Mapping[str, bool] = {"written": True}


@dataclass(frozen=True)
class AnyCall(Generic[T]):
    """Base of the calls of all operations: a frozen dataclass of tensors, the last field ``options``."""

    @property
    def tensors(self) -> dict[str, T | None]:
        """By name, in the order of the schema."""
        return {name: getattr(self, name) for name in tensor_names(type(self))}


# --- what is derived from the fields ----------------------------------------------------------------------------------


@functools.cache
def _tensor_fields(call_type: type) -> tuple[Field[Any], ...]:
    return tuple(field for field in dataclasses.fields(call_type) if field.name != "options")


@functools.cache
def tensor_names(call_type: type) -> tuple[str, ...]:
    """Names of the tensors, in the order of the schema."""
    return tuple(field.name for field in _tensor_fields(call_type))


@functools.cache
def written_names(call_type: type) -> tuple[str, ...]:
    """Names of the tensors that the operation writes in place."""
    return tuple(field.name for field in _tensor_fields(call_type) if field.metadata.get("written"))


def schema(call_type: type, options_type: type, returns: str) -> str:
    """``(Tensor q, …, Tensor(a!) k_cache, *, float? q_eps, …, str implementation, str? float8=None) -> …``

    Raises:
        TypeError: an option has an annotation that no schema knows.
    """
    letters = dict(zip(written_names(call_type), "abcdefgh", strict=False))

    def tensor(field: Field[Any]) -> str:
        alias = f"({letters[field.name]}!)" if field.name in letters else ""
        return f"Tensor{alias}{'?' if 'None' in str(field.type) else ''} {field.name}"

    options = dataclasses.fields(options_type)
    required = [f"{_schema_type(field)} {field.name}" for field in options if field.default is MISSING]
    defaulted = [
        f"{_schema_type(field)} {field.name}={field.default!r}" for field in options if field.default is not MISSING
    ]
    told = [*required, "str implementation", *defaulted]
    return f"({', '.join(map(tensor, _tensor_fields(call_type)))}, *, {', '.join(told)}) -> {returns}"


def _schema_type(field: Field[Any]) -> str:
    found = _SCHEMA_TYPES.get(str(field.type))
    if found is None:
        raise TypeError(f"option {field.name}: expected one of {', '.join(_SCHEMA_TYPES)}, found {field.type}")
    return found


def to_arguments(options: Any) -> dict[str, Any]:
    """`options` as arguments of the operation: sequences are lists, what has its default is left out."""
    told = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    unset = {field.name for field in dataclasses.fields(options) if field.default == told[field.name]}
    return {
        name: list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]
        for name, value in told.items()
        if name not in unset
    }


def changed_defaults(options: Any) -> dict[str, tuple[Any, Any]]:
    """(default, value) of each option that has a default and another value."""
    return {
        field.name: (field.default, getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.default is not MISSING and getattr(options, field.name) != field.default
    }
