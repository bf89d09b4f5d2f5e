"""``python -m fx_fusion explain``: what would be fused in a model, and why not, without weights and without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fx_fusion.cli.subject import Subject, SubjectError, add_arguments, build, explain_quietly
from fx_fusion.cli.terminal import print_lines, print_table
from fx_fusion.config import Config, OptionError
from fx_fusion.kernels.operation import kernel_names
from fx_fusion.report import FusionReport, runs
from fx_fusion.reporting.anatomy import Recorder
from fx_fusion.reporting.diff import Change, compare
from fx_fusion.reporting.html import page
from fx_fusion.trace import home
from fx_fusion.version import __version__

EXAMPLE = """examples:
  python -m fx_fusion explain --transformers Qwen3VLTextModel --config config.json --batch 8 --target gfx942
  python -m fx_fusion explain my_engine.model:decode_step --target cuda --html report.html
  python -m fx_fusion explain --diff before.json after.json

exit code: 0; 1 if fewer layers than --require are recognised, or with --diff if a fusion was lost; 2 if the model
cannot be built"""


def add_to(commands: Any) -> None:
    """Add the command to the sub-parsers `commands`."""
    parser = commands.add_parser(
        "explain", help="what would be fused in a model, and why not", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    group = parser.add_argument_group("what to ask, and how to answer")
    group.add_argument("--target", help="check kernels for this place: cpu, cuda, hip, gfx942, sm_90 (default: here)")
    group.add_argument("--kernel", choices=kernel_names(), default="auto", help="as the option fx_fusion.kernel")
    group.add_argument("--require", type=int, default=0, metavar="N", help="exit code 1 if fewer layers are recognised")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the report for programs")
    group.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page, with the graphs")
    group.add_argument(
        "--diff", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="compare two files of --json instead"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Explain or compare, print, and return the exit code."""
    try:
        if arguments.diff:
            return _diff(*arguments.diff)
        return _explain(build(arguments), arguments)
    except (SubjectError, OptionError) as error:
        print(f"fx_fusion explain: {error}", file=sys.stderr)
        return 2


# --- explain --------------------------------------------------------------------------------------------------------


def _explain(subject: Subject, arguments: argparse.Namespace) -> int:
    target = arguments.target or home((subject.fn, subject.args, subject.kwargs))
    recorder = Recorder()
    started = time.perf_counter()
    report = explain_quietly(recorder, subject, Config(kernel=arguments.kernel, target=target))
    notes = (*subject.notes, f"target {target}; torch {torch.__version__}, fx_fusion {__version__}")
    _print(report, subject.title, notes, time.perf_counter() - started)
    if arguments.json:
        arguments.json.write_text(_to_json(report, subject.title, notes))
        print(f"report: {arguments.json}")
    if arguments.html:
        arguments.html.write_text(page(report, recorder.graphs, subject.title, notes))
        print(f"page: {arguments.html}")
    return int(len(report.recognised) < arguments.require)


def _to_json(report: FusionReport, title: str, notes: tuple[str, ...]) -> str:
    return json.dumps({"title": title, "notes": notes, "report": json.loads(report.to_json())}, indent=1)


def _print(report: FusionReport, title: str, notes: tuple[str, ...], seconds: float) -> None:
    rows: list[tuple[str, ...]] = []
    for first, last, layer in runs(report.layers):
        state = f"{layer.state} by {layer.kernel}" if layer.kernel else layer.state
        words = layer.read if layer.state != "declined" else f"{layer.code}: {layer.reason}"
        if layer.state == "recognised" and layer.reason:
            words += f"\n{layer.code}: {layer.reason}"
        rows.append((f"{first}" if first == last else f"{first}-{last}", state, words))
    print_table(f"{title}: {len(report.fused)} of {len(report.layers)} layers fused", ("layers", "", "found"), rows)
    print_lines(_sources(report) + _kernels(report) + [*notes, f"explained in {seconds:.1f} s"])


def _sources(report: FusionReport) -> list[str]:
    """Whole, unlike a cell of a table: terminals make links of them."""
    return list(dict.fromkeys(f"{layer.code} at {layer.source}" for layer in report.declined if layer.source))


def _kernels(report: FusionReport) -> list[str]:
    found = {(name, reason) for layer in report.recognised for name, reason in layer.eligible.items()}
    return [
        f"{name}: {'could serve' if reason is None else f'cannot, {reason}'}" for name, reason in sorted(found, key=str)
    ]


# --- diff -----------------------------------------------------------------------------------------------------------


def _diff(before: Path, after: Path) -> int:
    changes = compare(_read(before), _read(after))
    if not changes:
        print("nothing changed")
        return 0
    print_table(f"{before} → {after}", ("layer", "", "before", "after"), [_cells(change) for change in changes])
    lost = sum(change.lost for change in changes)
    print_lines([f"{lost} fusions lost" if lost != 1 else "1 fusion lost"] if lost else ["no fusion lost"])
    return int(lost > 0)


def _read(path: Path) -> FusionReport:
    try:
        content = json.loads(path.read_text())
        return FusionReport.from_json(json.dumps(content["report"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SubjectError(f"{path} is not what `explain --json` writes: {type(error).__name__}: {error}") from error


def _cells(change: Change) -> tuple[str, ...]:
    return change.layer, "LOST" if change.lost else change.kind, change.before, change.after
