"""Which kernel serves a call."""

from __future__ import annotations

from fx_fusion.decline import Decline
from fx_fusion.kernels import aiter, triton
from fx_fusion.kernels.contract import Kernel, Problem, Target

REFERENCE = Kernel("reference", unavailable=lambda target: None, refuses=lambda problem, target: None)

#: In the order in which ``auto`` prefers them. The reference is not among them: nothing about it is fast.
FAST = (aiter.KERNEL, triton.KERNEL)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (*FAST, REFERENCE)}

NAMES = ("auto", *KERNELS)


class KernelUnavailable(RuntimeError):
    """A kernel that was asked for by name cannot serve; asking by name means no fallback."""


def choose(name: str, problem: Problem, target: Target) -> str:
    """The kernel to call.

    Raises:
        Decline: ``contract.kernel`` if `name` is ``auto`` and no fast kernel serves.
        KernelUnavailable: if `name` is a kernel that cannot serve.
    """
    if name != "auto":
        reason = KERNELS[name].reason_against(problem, target)
        if reason is not None:
            raise KernelUnavailable(f"fx_fusion.kernel={name!r} cannot serve this call: {reason}")
        return name
    reasons = {kernel.name: kernel.reason_against(problem, target) for kernel in FAST}
    for kernel, reason in reasons.items():
        if reason is None:
            return kernel
    found = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
    raise Decline("contract.kernel", f"no fast kernel serves on {target.name} ({found})")


def eligibility(problem: Problem) -> dict[str, str | None]:
    """For each fast kernel: what its contract objects to, wherever it may run; None for nothing."""
    home = {"aiter": Target("hip"), "triton": Target("cuda")}
    return {kernel.name: kernel.refuses(problem, home[kernel.name]) for kernel in FAST}
