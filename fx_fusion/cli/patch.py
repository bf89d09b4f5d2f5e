"""``python -m fx_fusion patch``: the change by hand, for those who want no compiler in production.

Prints Python: for each kind of layer the lines that a call replaces, as comments, and a function with that call, every
argument of it read off the model and proved. The lines are yours to change: nothing is written to your files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fx_fusion.cli.subject import Subject, SubjectError, add_arguments, build, explain_quietly
from fx_fusion.config import Config, OptionError
from fx_fusion.fusion import AnyFusion
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.observer import Observer
from fx_fusion.patterns.qk_norm_rope_cache.fusion import Lowered
from fx_fusion.patterns.qk_norm_rope_cache.match import Match
from fx_fusion.patterns.qk_norm_rope_cache.source_text import function, identifier, place, quoted, unwritable
from fx_fusion.report import LayerReport
from fx_fusion.trace import home

EXIT_CODES = "exit code: 0 if every layer can be patched, 1 if one cannot, 2 if the model cannot be built"


def add_to(commands: Any) -> None:
    """Add the command to the sub-parsers `commands`."""
    parser = commands.add_parser(
        "patch", help="the same change by hand, as a snippet to review", description=__doc__, epilog=EXIT_CODES
    )
    add_arguments(parser)
    parser.add_argument("--target", help="check kernels for this place: cpu, cuda, hip, gfx942, sm_90 (default: here)")
    parser.add_argument(
        "--kernel",
        choices=[kernel.name for kernel in OPERATION],
        help="the implementation that is called (default: what `auto` takes)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the snippets, and return the exit code."""
    try:
        subject = build(arguments)
        text, complete = patch(subject, arguments.target, arguments.kernel)
    except (SubjectError, OptionError) as error:
        print(f"fx_fusion patch: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return int(not complete)


def patch(subject: Subject, target: str | None = None, kernel: str | None = None) -> tuple[str, bool]:
    """The snippets as one Python source, and whether every layer has one.

    Raises:
        OptionError: `target` is unknown.
    """
    place_ = target or home((subject.fn, subject.args, subject.kwargs))
    writer = Writer(kernel)
    report = explain_quietly(writer, subject, Config(kernel="auto", target=place_))
    kinds = list(writer.kinds.values())
    head = [f'"""{subject.title}: what fx_fusion fuses, written by hand."""', "", "import fx_fusion"]
    blocks = [_block(kind) for kind in kinds] or [_reason(layer) for layer in report.layers]
    complete = bool(kinds) and all(kind.complete for kind in kinds)
    return "\n".join(head) + "\n\n\n" + "\n\n".join(blocks), complete


@dataclass
class Kind:
    """Layers that one snippet serves: their modules, the snippet, and whether it is a call or a reason why not."""

    modules: list[str]
    text: str
    complete: bool


class Writer(Observer):
    """Writes the snippet of every kind of layer that the pass reads, in `kinds`."""

    def __init__(self, kernel: str | None) -> None:
        self.kinds: dict[str, Kind] = {}
        self._kernel = kernel
        self._names: Sequence[str] = ()
        self._labels: dict[Node, str] = {}

    def names(self, inputs: Sequence[str]) -> None:
        self._names = inputs

    def starts(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._labels = dict(zip(inputs, self._names, strict=True)) if len(inputs) == len(self._names) else {}

    def reads(self, fusion: AnyFusion, analysis: GraphAnalysis, candidate: Any, match: Any, layer: LayerReport) -> None:
        module = layer.module or f"layer {sum(len(kind.modules) for kind in self.kinds.values())}"
        if layer.state != "declined" and not isinstance(match, Lowered):
            return
        match = match and match.match
        key = _key(analysis, match, layer)
        if key in self.kinds:
            self.kinds[key].modules.append(module)
        elif layer.state == "declined":
            self.kinds[key] = Kind([module], _reason(layer), complete=False)
        elif (reason := unwritable(match)) is not None:
            text = f"# fuses when compiled, but has no snippet: {reason}\n"
            self.kinds[key] = Kind([module], text, complete=False)
        else:
            self.kinds[key] = Kind([module], self._snippet(analysis, match, layer, module), complete=True)

    def _snippet(self, analysis: GraphAnalysis, match: Match, layer: LayerReport, module: str) -> str:
        where = place(analysis, match)
        kernel = self._kernel or layer.kernel or "reference"
        name = f"fused_{identifier(module)}"
        lines = [quoted(where)] if where else []
        return "\n".join([*lines, "", function(name, match, self._labels, kernel)])


def _key(analysis: GraphAnalysis, match: Any, layer: LayerReport) -> str:
    """Equal for layers that one function serves: what was read, and the lines that it replaces."""
    where = place(analysis, match) if match is not None else None
    return f"{layer} {where}"


def _reason(layer: LayerReport) -> str:
    where = f"\n# at {layer.source}" if layer.source else ""
    return f"# stays as it is: {layer.code}: {layer.reason}{where}\n"


def _block(kind: Kind) -> str:
    modules = kind.modules[0] if len(kind.modules) == 1 else f"{kind.modules[0]} … {kind.modules[-1]}"
    count = "" if len(kind.modules) == 1 else f" ({len(kind.modules)} layers alike)"
    return f"# --- {modules}{count}\n{kind.text}"
