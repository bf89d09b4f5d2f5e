"""One shape and token count on one device: each kernel checked against the reference, then timed."""

from __future__ import annotations

import functools

import torch

from fx_fusion.kernels.measure.stopwatch import microseconds
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.measure.typical_problem import bytes_moved, typical_problem
from fx_fusion.kernels.qk_norm_rope_cache import self_check
from fx_fusion.kernels.qk_norm_rope_cache.agreement import Launch, compare
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.aiter.call import Operands, Options, problem
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Signature
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile
from fx_fusion.kernels.target import Target

#: Of all calls of a graph together: past every cache, and little of any memory.
_BYTES = 1 << 30
_FEWEST, _MOST = 3, 200


class Refused(RuntimeError):
    """A kernel that is not timed here; the message says why."""


class Bench:
    """Times calls of `num_tokens` tokens of `shape` on `device`, a CUDA or ROCm device."""

    def __init__(self, shape: Shape, num_tokens: int, device: torch.device) -> None:
        self._device = device
        count = min(_MOST, max(_FEWEST, _BYTES // bytes_moved(shape, num_tokens)))
        self._problems = [typical_problem(shape, num_tokens, device) for _ in range(count)]

    def triton(self, tile: Tile) -> float:
        """Microseconds of a call with `tile`.

        Raises:
            Refused: it does not compile, or does not agree with the reference.
        """
        return self._time(functools.partial(triton.qk_norm_rope_cache, tile=tile))

    def aiter(self) -> float:
        """Microseconds of a call, with the launches that our call adds.

        Raises:
            Refused: it is not there, its contract does not admit the call, or it does not agree with the reference.
        """
        operands, options = self._problems[0]
        asked = problem(Operands(*operands), Options(**options))  # pyright: ignore[reportArgumentType]
        reason = aiter.KERNEL.reason_against(asked, Target.of(self._device))
        if reason is not None:
            raise Refused(reason)
        spent = self._time(aiter.qk_norm_rope_cache)
        # Where aiter fails its own check, its entry calls another kernel: that was timed, then.
        signature = Signature.of(*operands, **options)
        verdict = next(each for each in self_check.verdicts() if (each.kernel, each.signature) == ("aiter", signature))
        if verdict.reason is not None:
            raise Refused(verdict.reason)
        return spent

    def _time(self, launch: Launch) -> float:
        try:
            differences = compare(launch, self._problems[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        wrong = [str(difference) for difference in differences if not difference.error <= difference.allowed]
        if wrong:
            raise Refused("; ".join(wrong))

        def call(index: int) -> object:
            operands, options = self._problems[index]
            return launch(*operands, **options)

        return microseconds(call, len(self._problems), self._device)
