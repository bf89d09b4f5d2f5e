"""Which models fuse: docs/coverage.md, found out by compiling each of them.

    make coverage

Small random configurations of the real Transformers classes, unmodified, with a StaticCache. Every run is also compared
with eager PyTorch: a layer that fuses and is not right ends the script.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from models import FAMILIES, FURTHER, VOCABULARY, Run

import fx_fusion
from fx_fusion.proof.region_function import relative_difference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
#: Relative difference of the logits that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    family: str
    phase: str
    dtype: torch.dtype
    dynamic: bool = False

    @property
    def tokens(self) -> int:
        return 1 if self.phase == "decode" else 5


def cases(families: list[str]) -> Iterator[Case]:
    for family in families:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(family, "decode", dtype)
            yield Case(family, "prefill", dtype)
        yield Case(family, "prefill", torch.float32, dynamic=True)


def report(case: Case) -> fx_fusion.FusionReport:
    """Compile and run one case, beside eager PyTorch."""
    torch._dynamo.reset()
    fused, eager = Run(case.family, case.dtype), Run(case.family, case.dtype)
    for run in (fused, eager):
        run.prefill()
    tokens = torch.randint(1, VOCABULARY, (fused.batch, case.tokens), generator=torch.Generator().manual_seed(2))
    expected = eager.step(tokens)
    options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
    model = torch.compile(fused.model, backend="fx_fusion", options=options)
    actual = fused.step(tokens, model, dynamic=case.dynamic)
    difference = relative_difference(actual, expected)
    if not difference <= TOLERANCE[case.dtype]:
        raise AssertionError(f"{case}: the logits differ from eager's by {difference:.1e}")
    return fx_fusion.last_report()


def cell(found: fx_fusion.FusionReport) -> str:
    """Fused layers of those that store keys and values, or why not."""
    states = [layer for layer in found.declined if layer.code != "store.unknown_writer"]
    codes = ", ".join(f"`{code}`" for code in dict.fromkeys(layer.code for layer in states))
    layers = len(found.fused) + len(states)
    return f"{len(found.fused)} of {layers}" + (f", {codes}" if codes else "")


def page(rows: dict[str, list[str]]) -> str:
    columns = [
        "decode, float32",
        "prefill, float32",
        "decode, bfloat16",
        "prefill, bfloat16",
        "prefill, symbolic length",
    ]
    lines = [
        "# Coverage",
        "",
        "Small random configurations of the Transformers classes, unmodified, StaticCache, batch 2: layers fused, of",
        "those that store keys and values; else the code of the decline ([what they mean](declines.md)). Every cell",
        "was run, and its logits compared with eager PyTorch's. The states of linear attention (Qwen3-Next, Qwen3.5)",
        "are no KV cache and are not counted. Written by",
        f"`make coverage`; torch {torch.__version__}, Transformers {transformers.__version__}.",
        "",
        f"| model | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {model} | {' | '.join(cells)} |" for model, cells in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    logging.disable(logging.WARNING)
    rows: dict[str, list[str]] = {}
    for case in cases(sys.argv[1:] or [*FAMILIES, *FURTHER]):
        model = type(Run(case.family).model).__name__
        rows.setdefault(model, []).append(cell(report(case)))
        print(case, rows[model][-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
