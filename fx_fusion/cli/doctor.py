"""``python -m fx_fusion doctor``: what this machine can run, why not, and what to do about it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fx_fusion.cli.doctor_checks import Check, KernelCheck, check_all, check_kernels
from fx_fusion.cli.terminal import print_lines, print_table
from fx_fusion.kernels.operation import kernel_names

EXIT_CODES = (
    """exit code: 0 if the kernel asked for runs on this machine, 1 if it does not, or if a check found a problem"""
)
_SIGNS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def add_to(commands: Any) -> None:
    """Add the command to the sub-parsers `commands`."""
    parser = commands.add_parser(
        "doctor", help="what this machine can run, and why not", description=__doc__, epilog=EXIT_CODES
    )
    parser.add_argument(
        "--kernel", choices=kernel_names(), default="auto", help="the kernel that must run (auto: any fast one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and return the exit code: 0 if ``arguments.kernel`` runs here, else 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks, kernels = check_all(), check_kernels(device)
    serves = _serves(arguments.kernel, kernels)
    problems = any(check.state == "problem" for check in checks)
    if arguments.json:
        print(json.dumps(_as_json(arguments.kernel, serves and not problems, checks, kernels), indent=2))
    else:
        _print(checks, kernels, device)
        print_lines([_verdict(arguments.kernel, serves, problems)])
    return int(not serves or problems)


def _serves(name: str, kernels: Sequence[KernelCheck]) -> bool:
    wanted = {kernel.name for kernel in kernels if kernel.fast} if name == "auto" else {name}
    return any(kernel.runs for kernel in kernels if kernel.name in wanted)


def _as_json(name: str, ok: bool, checks: Sequence[Check], kernels: Sequence[KernelCheck]) -> dict[str, Any]:
    return {
        "ok": ok, "kernel": name, "checks": [asdict(check) for check in checks],
        "kernels": [asdict(kernel) for kernel in kernels],
    }  # fmt: skip


def _print(checks: Sequence[Check], kernels: Sequence[KernelCheck], device: torch.device) -> None:
    print_table("This machine", ("", "found", ""), [(c.name, c.found, _SIGNS[c.state]) for c in checks])
    rows = [(k.name, _says(k), k.reason or "") for k in kernels]
    print_table(f"Kernels on this machine's {device.type}", ("kernel", "runs", "why not"), rows)
    remedies = [(c.name, c.remedy) for c in checks if c.remedy] + [(k.name, k.remedy) for k in kernels if k.remedy]
    print_lines([f"{name}: {remedy}" for name, remedy in dict.fromkeys(remedies)])


def _says(kernel: KernelCheck) -> str:
    if kernel.runs:
        return "yes, agrees with float32"
    return "no, it was tried" if kernel.tried else "no"


def _verdict(name: str, serves: bool, problems: bool) -> str:
    if problems:
        return "\nA problem is in the way: see PROBLEM above."
    if serves:
        return "\nModels are fused here."
    if name == "auto":
        return "\nNo fast kernel runs here: models are recognised and proved, and run unfused."
    return f"\nThe kernel {name!r} does not run here."
