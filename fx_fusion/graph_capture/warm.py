"""Everything that happens once, before a graph is captured: ``fx_fusion.warmup(compiled, *args)``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from fx_fusion.graph.torch_compat import CallbackArgs, CallbackTrigger, callback_handler, counters, pytree
from fx_fusion.kernels.capture_guard import refuse_in_capture
from fx_fusion.kernels.qk_norm_rope_cache import self_check
from fx_fusion.kernels.qk_norm_rope_cache.self_check import Verdict
from fx_fusion.report import REPORTS, FusionReport

#: Calls in a row that must compile nothing. Inductor's CUDA graphs record at the second call, and replay at the third.
_QUIET = 2
_MAX_CALLS = 8


class NotWarm(RuntimeError):
    """Every call compiled something: a capture would compile too."""


@dataclass(frozen=True)
class Warmup:
    """What a warm-up did.

    Attributes:
        calls: how often the function was called.
        graphs: how many graphs that compiled, or loaded from a compile cache; 0 if it was warm.
        reports: what became of each of them, if it was compiled by fx_fusion.
        verdicts: every check of a kernel that others build, in this process.
        seconds: how long it took.
    """

    calls: int
    graphs: int
    reports: tuple[FusionReport, ...]
    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def fused(self) -> int:
        """Fused calls in the graphs that were compiled."""
        return sum(len(report.fused) for report in self.reports)

    def __str__(self) -> str:
        made = f"{self.graphs} graphs compiled, {self.fused} fused calls" if self.graphs else "it was warm"
        lines = [f"fx_fusion: warm after {self.calls} calls, {self.seconds:.2f} s: {made}"]
        return "\n".join([*lines, *(f"  {verdict}" for verdict in self.verdicts)])


def warmup(compiled: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Warmup:
    """Call ``compiled(*args, **kwargs)`` until nothing is compiled, built or checked any more: then capture it.

    The calls are real ones, three at least: they store what they store, and advance what they advance. So do it before
    the caches hold anything that matters, in the same grad mode, and with arguments of the very sizes, dtypes and
    strides that will be captured. They run on a stream of their own, which the current one waits for.

    Args:
        compiled: what ``torch.compile`` returned, with any backend; or a function that calls it.
        args, kwargs: its arguments.

    Returns:
        What was done.

    Raises:
        FirstUseInCapture: a graph is being captured already.
        NotWarm: the function compiles anew at every call, so that it can never be captured.
    """
    refuse_in_capture("fx_fusion.warmup is called")
    started = time.perf_counter()
    before, graphs_before = REPORTS.snapshot(), _graphs()
    calls = quiet = 0
    with _side_stream(_device((compiled, args, kwargs))):
        while quiet < _QUIET:
            if calls == _MAX_CALLS:
                raise NotWarm(
                    f"fx_fusion.warmup: {calls} calls with the same arguments compiled {_graphs() - graphs_before} "
                    "graphs, the last one too; set TORCH_LOGS=recompiles to see what differs at every call"
                )
            known = _graphs()
            compiled(*args, **kwargs)
            calls += 1
            quiet = quiet + 1 if _graphs() == known else 0
    reports = tuple(REPORTS.since(before))
    return Warmup(
        calls, _graphs() - graphs_before, reports, self_check.verdicts(), seconds=time.perf_counter() - started
    )


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _device(value: Any) -> torch.device | None:
    """Of the first tensor on a GPU."""
    fn, args, kwargs = value
    parameters = fn.parameters() if isinstance(fn, torch.nn.Module) else ()
    for leaf in (*parameters, *pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
            return leaf.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


@contextlib.contextmanager
def _side_stream(device: torch.device | None) -> Generator[None]:
    """As ``torch.cuda.graph`` captures: not on the default stream."""
    if device is None:
        yield
        return
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)


def _refuse_compilation_in_capture(args: CallbackArgs) -> None:
    """Dynamo would read the state of the random generator, which fails in a capture without a word about the cause."""
    if args.callback_trigger is CallbackTrigger.DYNAMO:
        refuse_in_capture("torch.compile starts to compile")


def refuse_compilation_in_captures() -> None:
    """From now on, until ``torch._dynamo.reset()``, compiling inside a capture is refused by name."""
    if _refuse_compilation_in_capture not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_refuse_compilation_in_capture)
