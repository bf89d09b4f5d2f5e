"""A fused operation, declared once by the type of its call, and the implementations that register themselves for it.

``torch.ops.fx_fusion.<name>`` is registered with ``Library.define`` and ``impl``: a ``torch.library.custom_op`` adds
about twice as much to a call (docs/verification.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fx_fusion.decline import Decline
from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import value_of
from fx_fusion.graph.torch_compat import OpOverload
from fx_fusion.kernels.call import AnyCall, changed_defaults, schema, tensor_names, written_names
from fx_fusion.kernels.capture_guard import only_warm
from fx_fusion.kernels.insert import Results, insert_operation
from fx_fusion.kernels.target import Target

C = TypeVar("C", bound=AnyCall[Any])

LIBRARY = torch.library.Library("fx_fusion", "DEF")


class KernelUnavailable(RuntimeError):
    """A kernel that was asked for by name cannot serve; asking by name means no fallback."""


class Implementation(ABC, Generic[C]):
    """One kernel of an operation. Subclass it, and :meth:`Operation.register` an instance.

    Attributes:
        name: as in ``fx_fusion.kernel=name``.
        fast: whether ``auto`` may choose it.
        serves: names of the options with a default that it understands; a call in which another one is set is refused.
        home: where the report asks for its contract, whatever this machine has.
    """

    name: str
    fast: bool = True
    serves: frozenset[str] = frozenset()
    home: Target = Target("cuda")

    def version(self) -> str | None:
        """Of the code that runs, where it is not fx_fusion's own: part of the keys of compile caches."""
        return None

    def unavailable(self, target: Target) -> str | None:
        """Why it cannot run on `target`, with what is installed here; None if it can."""
        return None

    def remedy(self, target: Target) -> str | None:
        """What a user can do where it is unavailable; None where nothing helps."""
        return None

    def refuses(self, call: C, target: Target) -> str | None:
        """Why it may not serve `call`, whose tensors are real or fake: the argument, what was expected, what found.

        Sizes and strides may be symbolic: compare them with :mod:`fx_fusion.graph.sizes`, which adds no guard.
        """
        return None

    @abstractmethod
    def run(self, call: C, setting: Any = None) -> tuple[Tensor, ...]:
        """Do it now, and return the results; what is written is written in place.

        Args:
            setting: one of :meth:`settings`; by default what was measured to be the fastest, or a built-in rule.
        """
        ...

    def trial(self, call: C, setting: Any = None) -> tuple[Tensor, ...]:
        """As :meth:`run`, but never another kernel in its place: for those who compare and time."""
        return self.run(call, setting)

    def found_wrong(self, call: C) -> str | None:
        """Why :meth:`run` would have another kernel do `call`: what a check on this device found; None for nothing."""
        return None

    def insert(self, emit: Emitter, operation: Operation[C], call: Any) -> Results:
        """Put `call`, whose tensors are nodes, into a functional graph. By default as the operation itself."""
        return insert_operation(emit, operation.overload, self.name, call, operation.empty(call.map(value_of)))

    def settings(self, call: C) -> list[Any]:
        """What can be chosen for a call like this besides its arguments, the built-in rule's choice first."""
        return [None]

    def setting_to_json(self, setting: Any) -> dict[str, Any]:
        """One of :meth:`settings`, for the file of measurements."""
        return {}

    def setting_from_json(self, content: Mapping[str, Any]) -> Any:
        """What :meth:`setting_to_json` was given.

        Raises:
            ValueError: it is no setting of this kernel.
        """
        return None

    def reason_against(self, call: C, target: Target) -> str | None:
        """Why it cannot serve `call` on `target`; None if it can."""
        return self.unavailable(target) or self.objects(call, target)

    def objects(self, call: C, target: Target) -> str | None:
        """What its contract has against `call`, wherever it may run."""
        for name, (default, value) in changed_defaults(call.options).items():  # pyright: ignore[reportAttributeAccessIssue]
            if name not in self.serves:
                return f"option {name}: the kernel {self.name} knows only {default!r}, found {value!r}"
        return self.refuses(call, target)


class Registration(Generic[C]):
    """An implementation's place in an operation; `remove` ends it."""

    def __init__(self, operation: Operation[C], implementation: Implementation[C]) -> None:
        self._operation = operation
        self.implementation = implementation

    def remove(self) -> None:
        """The operation no longer knows the implementation. Removing twice is allowed."""
        self._operation.forget(self.implementation)


class Operation(Generic[C]):
    """``torch.ops.fx_fusion.<name>``.

    Args:
        name: of the operation.
        call_type: its tensors, a frozen dataclass (:class:`fx_fusion.kernels.call.AnyCall`).
        options_type: what it is told by value, likewise; its ``of`` takes the arguments of the operation.
        returns: the schema's result types.
        empty: the results of a call, not yet computed: the fake implementation.
        decode: of a call as it arrives, what implementations get.
        measured: microseconds of a call by the name of the implementation, as measured on the target.
    """

    def __init__(
        self,
        name: str,
        call_type: Any,
        options_type: Any,
        returns: str,
        *,
        empty: Callable[[C], tuple[Tensor, ...]],
        decode: Callable[[C], C] = lambda call: call,
        measured: Callable[[C, Target], Mapping[str, float]] = lambda call, target: {},
    ) -> None:
        self.name = name
        self.call_type = call_type
        self.options_type = options_type
        self.schema = name + schema(call_type, options_type, returns)
        self._names = tensor_names(call_type)
        self.empty = empty
        self._decode = decode
        self._measured = measured
        self._implementations: dict[str, Implementation[C]] = {}
        LIBRARY.define(self.schema, tags=(torch.Tag.needs_exact_strides,))
        LIBRARY.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fx_fusion::{name}", self._fake, lib=LIBRARY)
        self.overload: OpOverload = getattr(torch.ops.fx_fusion, name).default
        OPERATIONS[name] = self

    def __iter__(self) -> Iterator[Implementation[C]]:
        """Its implementations, in the order in which ``auto`` prefers them where nothing was measured."""
        return iter(tuple(self._implementations.values()))

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the tensors that it writes in place."""
        return written_names(self.call_type)

    def register(self, implementation: Implementation[C]) -> Registration[C]:
        """Have `implementation` serve calls, after those that are there already.

        Raises:
            TypeError: it is no :class:`Implementation` with a name.
            ValueError: the name is taken.
        """
        if not isinstance(implementation, Implementation) or not isinstance(getattr(implementation, "name", None), str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{self.name}.register: expected a fx_fusion.Implementation with a name, got {implementation!r}"
            )
        if implementation.name in (*self._implementations, "auto"):
            raise ValueError(f"{self.name}.register: a kernel named {implementation.name!r} is there already")
        self._implementations[implementation.name] = implementation
        return Registration(self, implementation)

    def forget(self, implementation: Implementation[C]) -> None:
        if self._implementations.get(implementation.name) is implementation:
            del self._implementations[implementation.name]

    def implementation(self, name: str) -> Implementation[C]:
        """
        Raises:
            ValueError: no implementation has this name.
        """
        found = self._implementations.get(name)
        if found is None:
            raise ValueError(
                f"{self.name}: implementation must be one of {sorted(self._implementations)}, got {name!r}"
            )
        return found

    # --- what torch calls -------------------------------------------------------------------------------------------

    def run(self, *tensors: Tensor | None, implementation: str, **options: Any) -> tuple[Tensor, ...]:
        found = self.implementation(implementation)
        call = self._decode(self._call(tensors, options))
        with only_warm(f"the kernel {implementation}"):
            return found.run(call)

    def _fake(self, *tensors: Tensor | None, implementation: str, **options: Any) -> tuple[Tensor, ...]:
        return self.empty(self._call(tensors, options))

    def _call(self, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> C:
        given = dict(zip(self._names, tensors, strict=True))
        return self.call_type(**given, options=self.options_type.of(**options))

    # --- which implementation serves --------------------------------------------------------------------------------

    def eligible(self, call: C) -> dict[str, str | None]:
        """For each fast implementation: what its contract has against `call`, wherever it may run; None for nothing."""
        call = self._decode(call)
        return {each.name: each.objects(call, each.home) for each in self if each.fast}

    def choose(self, name: str, call: C, target: Target) -> str:
        """The implementation to call: with ``auto``, of the fast ones that serve, the fastest as measured.

        Raises:
            Decline: ``contract.kernel`` if `name` is ``auto`` and no fast implementation serves.
            KernelUnavailable: if `name` is one that cannot serve.
        """
        call = self._decode(call)
        if name != "auto":
            found = self._implementations.get(name)
            reason = found.reason_against(call, target) if found else f"{self.name} has no kernel of this name"
            if reason is not None:
                raise KernelUnavailable(f"fx_fusion.kernel={name!r} cannot serve this call: {reason}")
            return name
        reasons = {each.name: each.reason_against(call, target) for each in self if each.fast}
        serving = [kernel for kernel, reason in reasons.items() if reason is None]
        if serving:
            return self._fastest(serving, call, target)
        found = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
        raise Decline("contract.kernel", f"no fast kernel serves on {target.name} ({found})")

    def _fastest(self, serving: list[str], call: C, target: Target) -> str:
        microseconds = self._measured(call, target)
        measured = [kernel for kernel in serving if kernel in microseconds]
        return min(measured, key=microseconds.__getitem__, default=serving[0])


OPERATIONS: dict[str, Operation[Any]] = {}


def kernel_names() -> tuple[str, ...]:
    """What ``fx_fusion.kernel`` may be: ``auto``, or the name of an implementation of any operation."""
    return ("auto", *dict.fromkeys(each.name for operation in OPERATIONS.values() for each in operation))
