"""Options: from ``torch.compile(options={"fx_fusion.…": …})`` and from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fx_fusion.kernels.operation import kernel_names
from fx_fusion.kernels.target import Target

PREFIX = "fx_fusion."
INNER = ("inductor", "eager")
TRUST = ("proved", "sampled")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class OptionError(ValueError):
    """An option with an unknown name or a wrong value."""


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        kernel: ``auto`` (the fastest that can serve, else no rewrite), or one kernel by name, which must then serve.
        require: compilation fails if a graph that contains a cache store gets fewer fused calls than this.
        strict: an exception inside a reader fails the compilation instead of declining.
        inner: ``inductor``, or ``eager`` to run the rewritten graph without compiling it (debugging, quick tests).
        mode: a ``torch.compile`` mode, for use together with other options (torch.compile refuses both at once).
        trust: what is enough to rewrite: ``proved`` (exactly, over finite fields), or ``sampled`` (on random floats,
            where a region holds an operation that has no meaning there).
        target: check contracts for this place (``gfx942``, ``cuda``, …) instead of the tensors' own device.
    """

    kernel: str = "auto"
    require: int = 0
    strict: bool = False
    inner: str = "inductor"
    mode: str | None = None
    trust: str = "proved"
    target: str | None = None

    def __post_init__(self) -> None:
        _one_of("kernel", self.kernel, kernel_names())
        _one_of("inner", self.inner, INNER)
        _one_of("trust", self.trust, TRUST)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if type(self.require) is not int or self.require < 0:
            raise OptionError(f"{PREFIX}require must be an integer of at least 0, got {self.require!r}")
        if type(self.strict) is not bool:
            raise OptionError(f"{PREFIX}strict must be True or False, got {self.strict!r}")
        if self.target is not None:
            try:
                Target.parse(self.target)
            except (ValueError, AttributeError) as error:
                raise OptionError(f"{PREFIX}target: {error}") from error

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
        """Our options as a Config, and the others, which are Inductor's.

        ``FX_FUSION_KERNEL`` stands in where the options name no kernel.
        """
        ours: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        known = [field.name for field in fields(Config)]
        for name, value in options.items():
            if not name.startswith(PREFIX):
                rest[name] = value
                continue
            if name.removeprefix(PREFIX) not in known:
                allowed = ", ".join(PREFIX + each for each in known)
                raise OptionError(f"unknown option {name!r}; fx_fusion's options are {allowed}")
            ours[name.removeprefix(PREFIX)] = value
        ours.setdefault("kernel", kernel_from_environment())
        return Config(**ours), rest


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{PREFIX}{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def kernel_from_environment() -> str:
    """``FX_FUSION_KERNEL``: the kernel where no option names one."""
    name = os.environ.get("FX_FUSION_KERNEL") or "auto"
    if name not in kernel_names():
        raise OptionError(
            f"the environment variable FX_FUSION_KERNEL must be one of {', '.join(kernel_names())}, got {name!r}"
        )
    return name


def disabled() -> bool:
    """``FX_FUSION_DISABLE=1``: recognise and rewrite nothing."""
    return os.environ.get("FX_FUSION_DISABLE", "0") not in ("", "0")


def fuel() -> int | None:
    """``FX_FUSION_FUEL=n``: stop after n rewrites in this process, to bisect a bad one. None for no limit."""
    text = os.environ.get("FX_FUSION_FUEL")
    if not text:
        return None
    if not text.isdecimal():
        raise OptionError(f"the environment variable FX_FUSION_FUEL must be a number of rewrites, got {text!r}")
    return int(text)
