"""A module fused by Triton on a CUDA or ROCm device, beside itself in eager."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fx_fusion
from fx_fusion.report import FusionReport


class Outcome(NamedTuple):
    """The result, then the arguments as they are afterwards: of the compiled module, and of the module itself."""

    fused: tuple[Any, ...]
    eager: tuple[Any, ...]
    report: FusionReport
    code: str


def fused_and_eager(module: nn.Module, given: Sequence[Tensor], count: int = 1) -> Outcome:
    """All `count` layers are fused, by Triton, or this fails."""
    torch.backends.cuda.matmul.allow_tf32 = False
    module, args = module.cuda(), [arg.cuda() for arg in given]
    expected = copy.deepcopy(args)
    options = {"fx_fusion.kernel": "triton", "fx_fusion.require": count, "fx_fusion.strict": True}
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = module(*expected)
        actual, (code, *_) = run_and_get_code(torch.compile(module, backend="fx_fusion", options=options), *args)
    report = fx_fusion.last_report()
    assert [layer.kernel for layer in report.fused] == ["triton"] * count, str(report)
    return Outcome((actual, *args), (wanted, *expected), report, code)
