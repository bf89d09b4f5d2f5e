"""What may not happen while a CUDA or HIP graph is being captured: building, checking or compiling a kernel.

A capture records launches and runs nothing. What must read back from the device, or load code into it, breaks the
capture, or leaves a graph that holds half of the work. So it is refused by name, before it changes anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch


class FirstUseInCapture(RuntimeError):
    """Something was used for the first time while a graph is being captured."""


def is_capturing() -> bool:
    """Is the current stream being captured? Without a GPU, or before its first use, no."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(what: str) -> None:
    """Raise if a graph is being captured: `what` reads back from the device, or compiles for minutes."""
    if is_capturing():
        raise FirstUseInCapture(_message(what))


def _message(what: str) -> str:
    return (
        f"{what} while a graph is being captured, where it can be neither built nor checked; run the call once, with "
        "tensors like these, before the capture: fx_fusion.warmup(compiled, *args) does"
    )


def only_warm(what: str) -> contextlib.AbstractContextManager[None]:
    """While a graph is being captured, no Triton kernel may be compiled or loaded in this context. Else, no effect."""
    return _refuse_compilation(what) if is_capturing() else contextlib.nullcontext()


@contextlib.contextmanager
def _refuse_compilation(what: str) -> Generator[None]:
    """Triton asks this hook before it compiles; a launch of a kernel that is there never does."""
    from triton import knobs

    runtime: Any = knobs.runtime
    before, thread = runtime.jit_cache_hook, threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise FirstUseInCapture(_message(f"{what} is used for the first time"))
        return before(*args, **kwargs) if before is not None else None

    runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        runtime.jit_cache_hook = before
