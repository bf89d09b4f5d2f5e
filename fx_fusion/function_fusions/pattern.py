"""A user's pattern: a plain function, its parameters, and an example of each of its variants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.parameters import Kind, Parameter, Variant, asked, read_parameters, variants
from fx_fusion.function_fusions.steps import Kind as StepKind
from fx_fusion.graph.torch_compat import disable_current_modes
from fx_fusion.graph.tracing import Functional, NotTraceable, fakes_like, quiet, trace

#: Shapes that a tensor of a made-up example may have. Sizes that mean different things differ.
_SHAPES: tuple[tuple[int, ...], ...] = ((5, 16), (16,), (5, 3, 16), (5,), (5, 8), (1,), (64, 3, 16), (2, 5, 16))
_DTYPES = (torch.float32, torch.int64)
_WHOLE = (16, 8, 3, 2, 1, 4)
_FRACTION = 0.37
_ATTEMPTS = 1500


@dataclass(frozen=True)
class Example:
    """Tensors (fake) and numbers with which the pattern was traced once, to see what it is made of."""

    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, int | float]
    traced: Functional


@dataclass(frozen=True)
class Pattern:
    """``fn`` and its parameters. Each variant has been traced on an example."""

    fn: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    variants: tuple[Variant, ...]
    _examples: dict[str, Example] = field(repr=False, compare=False)

    def example(self, variant: Variant) -> Example:
        return self._examples[repr(variant)]

    @staticmethod
    def of(fn: Callable[..., Any], example: Mapping[str, Any] | Sequence[Any] | None) -> Pattern:
        """
        Raises:
            TypeError: a parameter that means nothing here, or an example that does not fit.
            ValueError: the pattern cannot be traced on the example, or no example could be made up.
        """
        parameters = read_parameters(fn)
        given = _named(parameters, example) if example is not None else None
        ways = variants(parameters)
        examples: dict[str, Example] = {}
        for variant in ways:
            examples[repr(variant)] = (
                _given(fn, parameters, variant, given) if given else _made_up(fn, parameters, variant)
            )
        for found in examples.values():
            _check(fn, found.traced)
        return Pattern(fn, parameters, tuple(ways), examples)


def _named(parameters: Sequence[Parameter], example: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    names = [parameter.name for parameter in parameters]
    values = dict(example) if isinstance(example, Mapping) else dict(zip(names, example, strict=False))
    missing = [p.name for p in parameters if p.kind is not Kind.CHOICE and p.name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown or (not isinstance(example, Mapping) and len(example) > len(names)):
        raise TypeError(
            f"register_fusion: example must give a value for each of {', '.join(names)}; "
            f"missing {missing}, unknown {unknown}"
        )
    for parameter in parameters:
        if parameter.kind is Kind.TENSOR and not isinstance(values[parameter.name], torch.Tensor):
            raise TypeError(
                f"register_fusion: example: {parameter.name!r} must be a tensor (for its rank and dtype), "
                f"got {values[parameter.name]!r}"
            )
    return values


def _given(
    fn: Callable[..., Any], parameters: Sequence[Parameter], variant: Variant, given: Mapping[str, Any]
) -> Example:
    shapes = {n: (tuple(given[n].shape), given[n].dtype) for n in asked(parameters, variant, Kind.TENSOR)}
    numbers = {name: given[name] for name in asked(parameters, variant, Kind.INT, Kind.FLOAT)}
    tensors = fakes_like(shapes)
    try:
        return Example(tensors, numbers, trace(fn, tensors, {**variant, **numbers}))
    except NotTraceable as error:
        raise ValueError(
            f"register_fusion: the pattern cannot be traced on the example{_with(variant)}: {error}"
        ) from error


def _made_up(fn: Callable[..., Any], parameters: Sequence[Parameter], variant: Variant) -> Example:
    names = asked(parameters, variant, Kind.TENSOR)
    ints = asked(parameters, variant, Kind.INT)
    floats = dict.fromkeys(asked(parameters, variant, Kind.FLOAT), _FRACTION)
    last: Exception | None = None
    for shapes, whole in itertools.islice(_guesses(len(names), len(ints)), _ATTEMPTS):
        tensors = fakes_like(dict(zip(names, shapes, strict=True)))
        numbers: dict[str, int | float] = {**floats, **dict(zip(ints, whole, strict=True))}
        others = {**variant, **numbers}
        try:
            with quiet(), disable_current_modes(), torch.no_grad():
                fn(**tensors, **others)
        except Exception as error:
            last = last or error
            continue
        try:
            return Example(tensors, numbers, trace(fn, fakes_like(dict(zip(names, shapes, strict=True))), others))
        except NotTraceable as error:
            raise ValueError(f"register_fusion: the pattern cannot be traced{_with(variant)}: {error}") from error
    raise ValueError(
        f"register_fusion: no example shapes could be made up for the pattern{_with(variant)} ({last}); "
        f"pass example=({', '.join(p.name for p in parameters)}), one small tensor or number each"
    )


def _guesses(tensors: int, ints: int) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Shapes and dtypes of all tensors, and values of all ints; what is likely comes first."""
    kinds = [(shape, torch.float32) for shape in _SHAPES] + [((5,), torch.int64), ((5, 16), torch.int64)]
    choices = [range(len(kinds))] * tensors + [range(len(_WHOLE))] * ints
    most = sum(len(choice) - 1 for choice in choices)
    for total in range(most + 1):
        for picks in _summing(choices, total):
            yield tuple(kinds[i] for i in picks[:tensors]), tuple(_WHOLE[i] for i in picks[tensors:])


def _summing(choices: Sequence[range], total: int) -> Iterator[tuple[int, ...]]:
    """Every pick of one number a choice, together `total`."""
    if not choices:
        if total == 0:
            yield ()
        return
    for pick in choices[0]:
        if pick <= total:
            for rest in _summing(choices[1:], total - pick):
                yield (pick, *rest)


def _with(variant: Variant) -> str:
    return f" with {', '.join(f'{name}={value!r}' for name, value in variant.items())}" if variant else ""


def _check(fn: Callable[..., Any], traced: Functional) -> None:
    for step in map(Steps(traced.graph.nodes).__getitem__, traced.nodes):
        if step.kind is StepKind.RANDOM:
            raise ValueError(f"register_fusion: the pattern draws random numbers ({step.target})")
        if step.kind is StepKind.BY_STRIDES:
            raise ValueError(
                f"register_fusion: the pattern reads memory by strides ({step.target}), which depend on the graph"
            )
