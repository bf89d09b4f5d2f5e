"""One shape and token count on one device: each kernel checked against the reference, then timed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.measure.stopwatch import microseconds
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.operation import Implementation
from fx_fusion.kernels.qk_norm_rope_cache.agreement import Run, compare
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.typical import bytes_moved, typical_call
from fx_fusion.kernels.target import Target

#: Of all calls of a graph together: past every cache, and little of any memory.
_BYTES = 1 << 30
_FEWEST, _MOST = 3, 200


class Refused(RuntimeError):
    """A kernel that is not timed here; the message says why."""


class Bench:
    """Times calls of `num_tokens` tokens of `shape` on `device`, a CUDA or ROCm device."""

    def __init__(self, shape: Shape, num_tokens: int, device: torch.device) -> None:
        self._shape, self._num_tokens, self._device = shape, num_tokens, device

    @functools.cached_property
    def _calls(self) -> list[Call[Tensor]]:
        """Enough that none finds its tensors in a cache of the device."""
        count = min(_MOST, max(_FEWEST, _BYTES // bytes_moved(self._shape, self._num_tokens)))
        return [typical_call(self._shape, self._num_tokens, self._device) for _ in range(count)]

    @property
    def kernels(self) -> list[Implementation[Any]]:
        """What there is to time."""
        return [each for each in OPERATION if each.fast]

    def settings(self, kernel: Implementation[Any]) -> list[Any]:
        """The built-in rule's setting for these calls first, then the others that are worth a measurement."""
        return kernel.settings(typical_call(self._shape, self._num_tokens, self._device))

    def time(self, kernel: Implementation[Any], setting: Any) -> float:
        """Microseconds of a call, with the launches that the implementation adds.

        Raises:
            Refused: it cannot run here, its contract does not admit the call, it does not compile, or it does not agree
                with the reference.
        """
        reason = kernel.reason_against(self._calls[0], Target.of(self._device))
        if reason is not None:
            raise Refused(reason)
        spent = self._time(functools.partial(kernel.trial, setting=setting))
        wrong = kernel.found_wrong(self._calls[0])
        if wrong is not None:
            raise Refused(wrong)
        return spent

    def _time(self, run: Run) -> float:
        try:
            differences = compare(run, self._calls[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        wrong = [str(difference) for difference in differences if not difference.error <= difference.allowed]
        if wrong:
            raise Refused("; ".join(wrong))
        return microseconds(lambda index: run(self._calls[index]), len(self._calls), self._device)
