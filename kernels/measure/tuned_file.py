"""What was measured on one GPU, and the JSON file that keeps it. Nothing here touches a device or a disk."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

VERSION = 4


class Machine(NamedTuple):
    """What times depend on besides the call: they hold where all of it is the same."""

    device: str
    """As the driver names it: ``NVIDIA H200``, ``AMD Instinct MI300X``."""
    architecture: str
    """``sm_90``, ``gfx942``."""
    triton: str | None
    aiter: str | None


class Shape(NamedTuple):
    """The calls that one list of timings serves."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str
    """Of q, k and v, without ``torch.``."""

    @staticmethod
    def of(num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> Shape:
        return Shape(num_heads, num_kv_heads, head_dim, rotary_dim, str(dtype).removeprefix("torch."))

    def __str__(self) -> str:
        rotary = "" if self.rotary_dim == self.head_dim else f"/{self.rotary_dim}"
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}{rotary} {self.dtype}"


@dataclass(frozen=True)
class Timing:
    """One token count.

    Attributes:
        microseconds: of a call, by the name of the kernel; of those that ran.
        settings: what was the fastest of a kernel's settings, by its name, as JSON.
    """

    num_tokens: int
    microseconds: Mapping[str, float]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])


Timings = tuple[Timing, ...]


@dataclass(frozen=True)
class Tuned:
    """The content of a file. `date` is ISO 8601; timings ascend by token count."""

    machine: Machine
    torch: str
    date: str
    shapes: Mapping[Shape, Timings]

    def at(self, shape: Shape, num_tokens: int) -> Timing | None:
        """What was measured at the largest token count that is not above `num_tokens`.

        Not at the nearest one: a tile for fewer tokens costs some loads that could have been shared, one for more
        leaves processors idle, which costs a multiple. Below the smallest measured count there is no answer.
        """
        timings = self.shapes.get(shape, ())
        position = bisect.bisect_right(timings, num_tokens, key=lambda timing: timing.num_tokens)
        return timings[position - 1] if position else None

    def updated(self, newer: Tuned) -> Tuned:
        """`newer`, and what it did not measure again. Nothing of this stays if it was measured elsewhere."""
        if self.machine != newer.machine:
            return newer
        shapes = {shape: _merge(timings, newer.shapes.get(shape, ())) for shape, timings in self.shapes.items()}
        return Tuned(newer.machine, newer.torch, newer.date, {**newer.shapes, **shapes})


def _merge(older: Timings, newer: Timings) -> Timings:
    by_count = {timing.num_tokens: timing for timing in (*older, *newer)}
    return tuple(by_count[count] for count in sorted(by_count))


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(tuned: Tuned) -> str:
    shapes = [
        {**shape._asdict(), "timings": [asdict(timing) for timing in timings]}
        for shape, timings in tuned.shapes.items()
    ]
    content = {
        "version": VERSION,
        "machine": tuned.machine._asdict(),
        "torch": tuned.torch,
        "date": tuned.date,
        "shapes": shapes,
    }
    return json.dumps(content, indent=1) + "\n"


def from_json(text: str) -> Tuned:
    """The content of a file.

    Raises:
        ValueError: it is not such a file, or one of another version of the format; the message says what is wrong.
    """
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"its format has version {content['version']!r}, this fx_fusion reads {VERSION}")
        return Tuned(
            Machine(**{name: _text(content["machine"], name, optional=True) for name in Machine._fields}),  # pyright: ignore[reportArgumentType]
            _text(content, "torch") or "",
            _text(content, "date") or "",
            dict(_shape(shape) for shape in content["shapes"]),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"it is not what `python -m fx_fusion tune` writes ({type(error).__name__}: {error})"
        ) from error


def _shape(content: Mapping[str, Any]) -> tuple[Shape, Timings]:
    sizes = [_whole(content, name) for name in Shape._fields[:-1]]
    timings = _merge((), tuple(_timing(timing) for timing in content["timings"]))
    return Shape(*sizes, dtype=_text(content, "dtype") or ""), timings


def _timing(content: Mapping[str, Any]) -> Timing:
    return Timing(
        _whole(content, "num_tokens"),
        {kernel: _microseconds(content["microseconds"], kernel) for kernel in content["microseconds"]},
        {kernel: dict(setting) for kernel, setting in content["settings"].items()},
    )


def _text(content: Mapping[str, Any], name: str, *, optional: bool = False) -> str | None:
    value = content[name]
    if isinstance(value, str) or (optional and value is None):
        return value
    raise ValueError(f"{name} must be a text, found {value!r}")


def _whole(content: Mapping[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, found {value!r}")
    return value


def _microseconds(content: Mapping[str, Any], name: str) -> float:
    value = content[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number of microseconds, found {value!r}")
    return float(value)
