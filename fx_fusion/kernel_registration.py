"""``register_kernel``, and packages that bring kernels of their own."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from fx_fusion.kernels.operation import OPERATIONS, Implementation, Registration

#: Entry points of other packages: functions without arguments that call :func:`register_kernel`.
GROUP = "fx_fusion.kernels"

log = logging.getLogger(__name__)


def register_kernel(implementation: Implementation[Any], operation: str = "qk_norm_rope_cache") -> Registration[Any]:
    """Have a kernel of your own serve a fused operation, in this process.

    It is then one of the names that ``fx_fusion.kernel`` takes, ``doctor`` checks it and ``tune`` times it; ``auto``
    may choose it where it is ``fast``. A package registers its kernels wherever it is installed by an entry point of
    the group ``fx_fusion.kernels``: a function without arguments that calls this one.

    Args:
        implementation: of a subclass of :class:`fx_fusion.Implementation`.
        operation: what it implements.

    Returns:
        A registration with `remove`.

    Raises:
        ValueError: the operation is unknown, or the kernel's name is taken.
        TypeError: it is no :class:`fx_fusion.Implementation`.
    """
    known = OPERATIONS.get(operation)
    if known is None:
        names = ", ".join(map(repr, OPERATIONS))
        raise ValueError(f"register_kernel: operation must be one of {names}, got {operation!r}")
    return known.register(implementation)


def load_installed() -> None:
    """Register what installed packages bring. One that fails is named in a warning, and does without."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:
            log.warning("fx_fusion: the kernels of %s are not there: %s: %s", entry, type(error).__name__, error)
