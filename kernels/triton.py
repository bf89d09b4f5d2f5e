"""The Triton kernel: not written yet; what it will be asked is."""

from __future__ import annotations

from fx_fusion.kernels.contract import Kernel, Problem, Target


def refuses(problem: Problem, target: Target) -> str | None:
    return None


def unavailable(target: Target) -> str | None:
    if target.platform not in ("cuda", "hip"):
        return f"Triton kernels run on GPUs, the target is {target.name}"
    return "this version of fx_fusion has no Triton kernel yet"


KERNEL = Kernel("triton", unavailable, refuses)
