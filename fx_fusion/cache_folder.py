"""Where files of ours lie beside Inductor's."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from fx_fusion.graph.torch_compat import inductor_cache


def cache_folder() -> Path:
    """``fx_fusion`` in Inductor's cache directory; it may not exist yet."""
    return _cache_folder(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))


@functools.cache
def _cache_folder(_: str | None) -> Path:
    """By what the answer depends on: Inductor makes the directory at every question, and a launch asks too."""
    return Path(inductor_cache()) / "fx_fusion"
