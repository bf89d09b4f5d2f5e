"""Before a kernel is trusted: one small call of it beside the reference, on the device that it is to run on.

A kernel that others build and change can be wrong in silence: other strides, another order of arguments, another
rounding. So its first use for each :class:`Specialization` is checked, and it is used there only if it agrees. What is
found holds for this process.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import torch

from fx_fusion.kernels.capture_guard import refuse_in_capture
from fx_fusion.kernels.qk_norm_rope_cache.agreement import Difference, Run, compare
from fx_fusion.kernels.qk_norm_rope_cache.examples import small_call
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the check of one kernel found for one specialization."""

    kernel: str
    specialization: Specialization
    reason: str | None
    """Why the kernel is not used; None: it agrees."""
    differences: tuple[Difference, ...]
    """For each result; none if the kernel raised."""

    def __str__(self) -> str:
        found = "agrees with the reference" if self.reason is None else f"is not used: {self.reason}"
        return f"{self.kernel} on {self.specialization.device} {found} ({self.specialization})"


_verdicts: dict[tuple[str, Specialization], Verdict] = {}
_lock = threading.Lock()


def verdicts() -> tuple[Verdict, ...]:
    """Every check of this process, in the order in which they were made."""
    return tuple(_verdicts.values())


def clear() -> None:
    """Forget them: every kernel is checked again."""
    _verdicts.clear()


def verdict(kernel: str, run: Run, specialization: Specialization) -> Verdict:
    """Whether `run` agrees with the reference; checked once for each specialization.

    Raises:
        FirstUseInCapture: if it was not checked yet, and a graph is being captured.
    """
    found = _verdicts.get((kernel, specialization))
    if found is not None:
        return found
    refuse_in_capture(f"the kernel {kernel} is used for the first time ({specialization})")
    with _lock:
        found = _verdicts.get((kernel, specialization)) or _examine(kernel, run, specialization)
        _verdicts[kernel, specialization] = found
    return found


def _examine(kernel: str, run: Run, specialization: Specialization) -> Verdict:
    differences: tuple[Difference, ...] = ()
    try:
        with torch.no_grad():
            differences = compare(run, small_call(specialization))
        wrong = [str(difference) for difference in differences if not difference.error <= difference.allowed]
        reason = "; ".join(wrong) or None
    except torch.OutOfMemoryError:
        # Says nothing about the kernel.
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    found = Verdict(kernel, specialization, reason, differences)
    if reason is not None:
        log.warning("fx_fusion: %s; another kernel serves these calls", found)
    return found
