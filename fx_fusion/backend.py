"""``torch.compile(model, backend="fx_fusion")``: Inductor with our pass hooked in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from fx_fusion.config import Config
from fx_fusion.fusion_pass import FusionPass
from fx_fusion.graph.torch_compat import (
    checked_options,
    compile_fx,
    inductor_option,
    is_backend,
    mode_options,
    register_backend,
)
from fx_fusion.graph_capture.warm import refuse_compilation_in_captures
from fx_fusion.report import REPORTS, FusionReport

_HOOK = "post_grad_custom_pre_pass"


class NotFused(RuntimeError):
    """Fewer calls were fused than ``fx_fusion.require`` asks for. Carries the ``report``."""

    def __init__(self, required: int, report: FusionReport) -> None:
        super().__init__(
            f"fx_fusion.require={required}, but {len(report.fused)} fused calls are in this graph\n{report}"
        )
        self.report = report


def fx_fusion(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend. Called by Dynamo, not by people.

    Args:
        mode: a ``torch.compile`` mode, passed on to Inductor.
        options: ``fx_fusion.*`` options (see :class:`fx_fusion.Config`); all others are Inductor's.

    Raises:
        OptionError: an unknown ``fx_fusion.*`` option, or a wrong value.
        KernelUnavailable: a kernel asked for by name cannot serve.
        NotFused: fewer fused calls than ``fx_fusion.require``.
    """
    refuse_compilation_in_captures()
    config, inductor_options = Config.from_options(options or {})
    before = REPORTS.snapshot()
    if config.inner == "eager":
        from fx_fusion.trace import compile_eager

        compiled = compile_eager(gm, example_inputs, config)
    else:
        compiled = _compile_inductor(gm, example_inputs, config, mode or config.mode, inductor_options)
    for report in REPORTS.since(before):
        if report.concerns and len(report.fused) < config.require:
            raise NotFused(config.require, report)
    REPORTS.latest()
    return compiled


def _compile_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    patches = {**mode_options(mode), **checked_options(options)}
    already = patches.pop(_HOOK, None) or inductor_option(_HOOK)
    patches[_HOOK] = FusionPass(config, before=already or None)
    return compile_fx(gm, example_inputs, config_patches=patches)


def register() -> None:
    """Make the name ``"fx_fusion"`` known, also where the package's entry point is not installed."""
    if not is_backend("fx_fusion"):
        register_backend(fx_fusion, name="fx_fusion")
