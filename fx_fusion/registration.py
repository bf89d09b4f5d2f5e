"""``register_fusion`` and ``fusions``: how fusions enter and leave the registry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from fx_fusion.function_fusions.fusion import PLATFORMS, Check, FunctionFusion
from fx_fusion.fusion import REGISTRY, AnyFusion, Handle, check_fusion


def register_fusion(
    fusion: Any = None,
    *,
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    replacement: Callable[..., Any] | None = None,
    check: Check | None = None,
    name: str | None = None,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Any:
    """Add a fusion for all later compilations, in the order of registration.

    With plain PyTorch functions::

        handle = register_fusion(pattern=rms_norm, replacement=my_rms_norm, name="rms_norm")

    as a decorator of the replacement::

        @register_fusion(pattern=rms_norm)
        def my_rms_norm(x, weight, eps): ...

    with an object, ``register_fusion(MyFusion())``, or as a decorator of a class without constructor arguments.

    Args:
        fusion: an object of a subclass of :class:`fx_fusion.Fusion`, or the subclass.
        pattern: what to find: a function, or several with the same parameters (alternatives). A parameter is a tensor
            of the graph, unless annotated otherwise: ``int`` and ``float`` are numbers read off the graph,
            ``Tensor | None`` is an optional part, ``bool`` and ``Literal`` are alternatives. It may change its tensor
            arguments in place, call custom operations, and return several tensors. Sizes, dtypes and strides are those
            of each match.
        replacement: what to put there: takes the parameters of the pattern, by name, returns what it returns and
            changes what it changes.
        check: called with each proved match (:class:`fx_fusion.Found`); False, or a sentence, declines it.
        name: in the report; by default the name of the pattern.
        example: a value for each parameter, in order or by name: small tensors (of which rank, sizes and dtype count)
            and numbers. Needed only where none can be made up.
        platforms: where to rewrite, of ``cpu``, ``cuda`` and ``hip``; elsewhere a match is reported as recognised.

    Returns:
        A :class:`Handle` with `remove`; as a decorator, the class or function.

    Raises:
        TypeError: `fusion` is of no subclass of :class:`fx_fusion.Fusion`, or a parameter is missing or means nothing
            here.
        ValueError: the name is taken, the pattern cannot be traced, or the replacement differs from it (on the example,
            on the CPU; what cannot run there is compared at its first match).
    """
    if pattern is not None or replacement is not None:
        return _register_functions(fusion, pattern, replacement, check, name, example, platforms)
    if fusion is None:
        return _decorate
    return _decorate(fusion) if isinstance(fusion, type) else REGISTRY.add(fusion)


def _register_functions(
    fusion: Any,
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]] | None,
    replacement: Callable[..., Any] | None,
    check: Check | None,
    name: str | None,
    example: Mapping[str, Any] | Sequence[Any] | None,
    platforms: Sequence[str],
) -> Any:
    if fusion is not None:
        raise TypeError("register_fusion: expected either a fusion, or pattern= and replacement=, got both")
    if pattern is None:
        raise TypeError("register_fusion: replacement= is given without pattern=")

    def add(function: Callable[..., Any]) -> Handle:
        made = FunctionFusion(pattern, function, check=check, name=name, example=example, platforms=platforms)
        return REGISTRY.add(made)

    if replacement is not None:
        return add(replacement)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        add(function)
        return function

    return decorate


def _decorate(cls: Callable[[], Any]) -> Any:
    REGISTRY.add(cls())
    return cls


@contextlib.contextmanager
def fusions(*only: Any) -> Generator[None]:
    """Within the context, compile with the fusions given (handles, fusions or names of registered ones), and no other.

    Fusions that are registered inside the context end with it::

        with fx_fusion.fusions("qk_norm_rope_cache"):
            ...

    Raises:
        ValueError: a name that nothing is registered under.
    """
    before = list(REGISTRY)
    chosen = [_resolve(each, before) for each in only]
    REGISTRY.replace(chosen)
    try:
        yield
    finally:
        REGISTRY.replace(before)


def _resolve(given: Any, registered: Sequence[AnyFusion]) -> AnyFusion:
    if isinstance(given, Handle):
        return given.fusion
    if isinstance(given, str):
        found = next((fusion for fusion in registered if fusion.name == given), None)
        if found is None:
            names = ", ".join(repr(fusion.name) for fusion in registered)
            raise ValueError(f"fusions: no fusion is named {given!r}; registered are {names}")
        return found
    check_fusion(given)
    return given
