"""Which kernel serves a call."""

from __future__ import annotations

import torch

from fx_fusion.decline import Decline
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.target import Kernel, Problem, Target

REFERENCE = Kernel("reference", unavailable=lambda target: None, refuses=lambda problem, target: None)

#: In the order in which ``auto`` prefers them where nothing was measured. The reference is not among them: nothing
#: about it is fast. Triton comes first: on an H200, aiter's geometry, ported, took 1.3 to 4 times as long at every
#: number of tokens from 1 to 16384; and our call of aiter launches more kernels, for indices that count from the end.
#: On AMD nothing was measured: ``python -m fx_fusion tune`` does, and what it finds goes before this order.
FAST = (triton.KERNEL, aiter.KERNEL)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (*FAST, REFERENCE)}

NAMES = ("auto", *KERNELS)


class KernelUnavailable(RuntimeError):
    """A kernel that was asked for by name cannot serve; asking by name means no fallback."""


def choose(name: str, problem: Problem, target: Target) -> str:
    """The kernel to call: with ``auto``, of those that serve, the fastest as measured for this number of tokens.

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
    serving = [kernel for kernel, reason in reasons.items() if reason is None]
    if serving:
        return _fastest(serving, problem, target)
    found = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
    raise Decline("contract.kernel", f"no fast kernel serves on {target.name} ({found})")


def _fastest(serving: list[str], problem: Problem, target: Target) -> str:
    microseconds = _measured(problem, target)
    measured = [kernel for kernel in serving if kernel in microseconds]
    return min(measured, key=microseconds.__getitem__, default=serving[0])


def _measured(problem: Problem, target: Target) -> dict[str, float]:
    """Microseconds of a call like this, of the kernels that were measured on the device that is `target`."""
    device = torch.device("cuda")
    here = tuned.machine(device)
    if here is None or target.name not in (here.architecture, Target.of(device).name):
        return {}
    shape = Shape.of(problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.rotary_dim, problem.dtype)
    found = tuned.timing(shape, problem.num_tokens, device)
    times = {"triton": found.triton_us, "aiter": found.aiter_us} if found else {}
    return {kernel: time for kernel, time in times.items() if time is not None}


def eligibility(problem: Problem) -> dict[str, str | None]:
    """For each fast kernel: what its contract objects to, wherever it may run; None for nothing."""
    home = {"aiter": Target("hip"), "triton": Target("cuda")}
    return {kernel.name: kernel.refuses(problem, home[kernel.name]) for kernel in FAST}
