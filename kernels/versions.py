"""Versions of the packages whose code runs on the device; of either, None if it is not there."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util


@functools.cache
def triton_version() -> str | None:
    # From the module: the distribution has another name in some builds (pytorch-triton-rocm).
    if importlib.util.find_spec("triton") is None:
        return None
    return str(getattr(importlib.import_module("triton"), "__version__", "unknown"))


@functools.cache
def aiter_version() -> str | None:
    # From the metadata: importing aiter takes seconds.
    if importlib.util.find_spec("aiter") is None:
        return None
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
