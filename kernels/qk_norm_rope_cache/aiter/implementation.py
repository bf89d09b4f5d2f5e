"""AMD's aiter: is it there, does it do here what the operation does, and the call.

One of its functions serves three axes, a sibling one. They change often, so their first use on a device is checked too
(self_check.py). The PyPI project named ``aiter`` is an unrelated asyncio helper: importing it proves nothing, so the
function itself is looked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fx_fusion.kernels.operation import Implementation
from fx_fusion.kernels.qk_norm_rope_cache import reference, self_check
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import Arguments, prepare
from fx_fusion.kernels.qk_norm_rope_cache.aiter.contract import broken_line, refuses
from fx_fusion.kernels.qk_norm_rope_cache.aiter.launch import launch
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.target import Target
from fx_fusion.kernels.versions import aiter_version

THREE_AXES = "fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"
ONE_AXIS = "fused_qk_norm_rope_cache_pts_quant_shuffle"


class Aiter(Implementation[Call[Tensor]]):
    """On AMD GPUs, where it is installed."""

    name = "aiter"
    home = Target("hip")

    def version(self) -> str | None:
        return aiter_version()

    def unavailable(self, target: Target) -> str | None:
        if _is_unrelated():
            return installed()
        if target.platform != "hip":
            return f"aiter runs on AMD GPUs, the target is {target.name}"
        return installed()

    def remedy(self, target: Target) -> str | None:
        if target.platform == "hip" or importlib.util.find_spec("aiter") is not None:
            return "pip uninstall aiter, if it is there, and build https://github.com/ROCm/aiter"
        return None

    def refuses(self, call: Call[Tensor], target: Target) -> str | None:
        return refuses(call, target)

    def run(self, call: Call[Tensor], setting: Any = None) -> tuple[Tensor, ...]:
        """Call aiter now, or the next best kernel if aiter does not agree with the reference here.

        An index outside its table or its cache counts modulo the size; but where negative slots are skipped, a slot
        beyond the end is written beyond the end.

        Raises:
            ValueError: for what aiter would read as garbage.
            FirstUseInCapture: if aiter was not used like this before, and a graph is being captured.
        """
        prepared = _checked(call)
        wrong = self.found_wrong(call) is not None
        return _next_best(call) if wrong else launch(call, prepared, _function_for(call))

    def found_wrong(self, call: Call[Tensor]) -> str | None:
        return self_check.verdict(self.name, self.trial, Specialization.of(call)).reason

    def trial(self, call: Call[Tensor], setting: Any = None) -> tuple[Tensor, ...]:
        return launch(call, _checked(call), _function_for(call))


def _checked(call: Call[Tensor]) -> Arguments:
    reason = broken_line(call, of_memory=False)
    if reason is not None:
        raise ValueError(f"aiter: {reason}; pass it like that, or call another kernel")
    return prepare(call)


def _next_best(call: Call[Tensor]) -> tuple[Tensor, Tensor]:
    runs = triton.Triton().unavailable(Target.of(call.q.device)) is None
    return triton.launch(call) if runs else reference.qk_norm_rope_cache(call)


# --- is it there? -----------------------------------------------------------------------------------------------------


def installed() -> str | None:
    """None if AMD's aiter is installed, else what was found instead."""
    if importlib.util.find_spec("aiter") is None:
        return "aiter is not installed; build it from https://github.com/ROCm/aiter (it is not on PyPI)"
    if _is_unrelated():
        return (
            "the installed package 'aiter' is the unrelated asyncio helper from PyPI, not AMD's; "
            "uninstall it and build https://github.com/ROCm/aiter"
        )
    return None


def _is_unrelated() -> bool:
    """Told by metadata, so that asking imports nothing (AMD's distribution is named ``amd-aiter``)."""
    try:
        distribution = importlib.metadata.distribution("aiter")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "async" in (distribution.metadata.get("Summary") or "").lower()


def _module() -> Any:
    """Imported late: it is not everywhere, and takes seconds."""
    return importlib.import_module("aiter")


def _function_for(call: Call[Tensor]) -> Callable[..., None]:
    assert call.positions is not None, "the contract asks for positions"
    name = ONE_AXIS if call.positions.shape[0] == 1 else THREE_AXES
    function = getattr(_module(), name, None)
    if function is None:
        raise RuntimeError(installed() or f"the installed aiter has no function {name}; update it")
    return function
