"""The switch: ``FX_FUSION_VLLM=auto|triton|aiter|reference[,require]``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fx_fusion.config import OptionError
from fx_fusion.kernels.operation import kernel_names

VARIABLE = "FX_FUSION_VLLM"


@dataclass(frozen=True)
class Switch:
    """
    Attributes:
        kernel: as ``fx_fusion.kernel``.
        require: the engine does not start unless every layer is fused.
    """

    kernel: str
    require: bool = False

    @staticmethod
    def from_environment() -> Switch | None:
        """None where the variable is empty or not set.

        Raises:
            OptionError: the variable holds something else than a kernel, and perhaps ``require``.
        """
        text = os.environ.get(VARIABLE, "").strip()
        return Switch.parse(text) if text else None

    @staticmethod
    def parse(text: str) -> Switch:
        """Raises OptionError."""
        kernel, *rest = (part.strip() for part in text.split(","))
        if kernel not in kernel_names() or rest not in ([], ["require"]):
            expected = f"{'|'.join(kernel_names())}[,require]"
            raise OptionError(f"the environment variable {VARIABLE}: expected {expected}, got {text!r}")
        return Switch(kernel, bool(rest))
