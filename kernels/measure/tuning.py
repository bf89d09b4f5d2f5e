"""How long each kernel takes for each token count of a shape, and which of its settings is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fx_fusion.kernels.measure.bench import Refused
from fx_fusion.kernels.measure.tuned_file import Shape, Timing
from fx_fusion.kernels.operation import Implementation

#: Another setting must beat the built-in rule's by this factor. Less is noise, which a file should not keep.
WORTH_IT = 1.02

Settings = Mapping[str, Sequence[Any]]
"""By the name of a kernel, what to time: the built-in rule's setting first."""


class Times(Protocol):
    """As :class:`fx_fusion.kernels.measure.bench.Bench` measures them."""

    @property
    def kernels(self) -> Sequence[Implementation[Any]]: ...
    def settings(self, kernel: Implementation[Any]) -> list[Any]: ...
    def time(self, kernel: Implementation[Any], setting: Any) -> float: ...


@dataclass(frozen=True)
class Best:
    """What was found of one kernel at one token count.

    Attributes:
        rule: the setting of the built-in rule; None for a kernel without settings.
        rule_us: microseconds of a call with it; None if it was refused.
        setting, us: what the file keeps.
    """

    rule: Any
    rule_us: float | None
    setting: Any
    us: float

    @property
    def gain(self) -> float | None:
        """How many times as long the rule's setting takes; 1.0 where the rule stays."""
        return None if self.rule_us is None else self.rule_us / self.us


@dataclass(frozen=True)
class Found:
    """What was found for one token count: by kernel, and why what was not timed was not."""

    shape: Shape
    num_tokens: int
    best: Mapping[str, Best]
    settings: Mapping[str, Mapping[str, Any]]
    refusals: tuple[str, ...]

    @property
    def timing(self) -> Timing:
        """What the file keeps."""
        return Timing(self.num_tokens, {name: best.us for name, best in self.best.items()}, self.settings)

    @property
    def fastest(self) -> str:
        """The name of the kernel that ``auto`` calls."""
        return min(self.best, key=lambda name: self.best[name].us)


def all_settings(bench: Times) -> Settings:
    return {kernel.name: bench.settings(kernel) for kernel in bench.kernels}


def settings_to_measure(every: Mapping[int, Settings], *, quick: bool) -> Mapping[int, Settings]:
    """Of all settings for each token count, what to time: all, or if `quick`, those that the built-in rule chooses
    among.
    """
    if not quick:
        return every
    rules = {name: [of[name][0] for of in every.values()] for of in every.values() for name in of}
    return {
        count: {name: list(dict.fromkeys([settings[0], *rules[name]])) for name, settings in of.items()}
        for count, of in every.items()
    }


def measure(shape: Shape, num_tokens: int, settings: Settings, bench: Times) -> Found:
    """Time each kernel with each of its `settings`.

    Raises:
        Refused: nothing could be timed.
    """
    best: dict[str, Best] = {}
    chosen: dict[str, Mapping[str, Any]] = {}
    refusals: list[str] = []
    for kernel in bench.kernels:
        timed: dict[Any, float] = {}
        for setting in settings[kernel.name]:
            try:
                timed[setting] = bench.time(kernel, setting)
            except Refused as refused:
                refusals.append(f"{kernel.name}{'' if setting is None else f' {setting}'}: {refused}")
        if not timed:
            continue
        rule = settings[kernel.name][0]
        setting = _best(timed, rule)
        best[kernel.name] = Best(rule, timed.get(rule), setting, timed[setting])
        if setting is not None:
            chosen[kernel.name] = kernel.setting_to_json(setting)
    if not best:
        raise Refused("\n".join(refusals))
    return Found(shape, num_tokens, best, chosen, tuple(refusals))


def _best(timed: Mapping[Any, float], rule: Any) -> Any:
    best = min(timed, key=timed.__getitem__)
    return rule if rule in timed and timed[rule] <= WORTH_IT * timed[best] else best
