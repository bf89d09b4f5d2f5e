"""Everything that a machine with a GPU can tell about fx_fusion, in one report.

    make amd-acceptance            # on a ROCm machine; on a CUDA machine it is a rehearsal, and says so

Runs each step in a process of its own, goes on after a failure, and writes one self-contained Markdown file, anew after
each step: what ran, what differed, numbers, versions. Exit code 0 if every step passed, 1 if one failed, 2 if there is
no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter

ROOT = Path(__file__).resolve().parent.parent
#: Tests compile for most of their time. Nothing is timed in them.
IN_PARALLEL = ("-n", str(min(8, os.cpu_count() or 1)))
QUICK = ("--quick", "--tokens", "1,64,1024,16384")
SMALL = ("--layers", "6", "--batch", "1,32", "--context", "256")
NO_GPU = "no GPU: PyTorch finds neither a ROCm nor a CUDA device here, so nothing of this report can be produced"


@dataclass(frozen=True)
class Step:
    """One process. `tests` steps are pytest runs, whose cases are counted; others just succeed or fail."""

    title: str
    command: tuple[str, ...]
    tests: bool = False
    shows: str | None = None
    """A file in the output folder whose text belongs in the report."""


@dataclass(frozen=True)
class Outcome:
    step: Step
    returncode: int
    seconds: float
    summary: str
    details: str


def steps(folder: Path) -> list[Step]:
    python = sys.executable

    def pytest(title: str, *arguments: str) -> Step:
        return Step(title, (python, "-m", "pytest", "-q", "-m", "gpu", *IN_PARALLEL, *arguments), tests=True)

    def benchmark(title: str, script: str, *arguments: str, shows: str | None = None) -> Step:
        return Step(title, (python, f"examples/benchmarks/{script}", *arguments), shows=shows)

    output = ("--output", str(folder))
    tune = (python, "-m", "fx_fusion", "tune", *QUICK, "--output", str(folder / "tuned.json"))
    return [
        Step("What this machine can run", (python, "-m", "fx_fusion", "doctor")),
        pytest("The Triton kernel against float64, every variant", "tests/kernels/test_triton.py"),
        pytest("The self-check of Triton and aiter, layout by layout", "tests/kernels/test_self_check_device.py"),
        pytest("Capture and replay", "tests/test_capture.py", "tests/test_gpu_capture.py"),
        pytest("Every kind of store, through Inductor", "tests/test_gpu_stores.py", "tests/test_gpu_opaque_stores.py"),
        pytest("Transformers models, through Inductor", "tests/test_gpu.py"),
        pytest("The other fusions", "tests/function_fusions/test_shipped.py"),
        Step("The serving example", (python, "examples/qwen3_vl_serving.py")),
        Step("Triton and aiter, side by side", tune),
        benchmark("Kernel benchmark", "kernel.py", *output, shows="kernel.md"),
        benchmark("A decode step of 6 layers", "decode_step.py", *SMALL, *output, shows="decode_step.md"),
        benchmark("Host time of a call", "launch_host_cost.py"),
    ]


def machine() -> dict[str, str]:
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "architecture": device.gcnArchName if torch.version.hip else f"sm_{device.major}{device.minor}",
        "torch": torch.__version__,
        "HIP": torch.version.hip or "none",
        "CUDA": torch.version.cuda or "none",
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "aiter": aiter.installed() or _version("amd-aiter"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(step: Step, folder: Path) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [*step.command, f"--junitxml={results}"] if step.tests else [*step.command]
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "examples")))
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - started
        if step.tests and results.exists():
            summary, details, failed = count(results)
            return Outcome(step, done.returncode if done.returncode != 5 else int(failed), seconds, summary, details)
    shown = folder / step.shows if step.shows else None
    if done.returncode == 0 and shown and shown.exists():
        return Outcome(step, 0, seconds, "passed", shown.read_text())
    output = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    return Outcome(step, done.returncode, seconds, "failed" if done.returncode else "passed", fenced(output))


def count(results: Path) -> tuple[str, str, bool]:
    """A line of counts, the reasons of what failed or was skipped, and whether anything failed."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    failed = [(case, problem) for case in cases for kind in ("failure", "error") for problem in case.findall(kind)]
    skipped = [skip.get("message", "") for case in cases for skip in case.findall("skipped")]
    passed = len(cases) - len({id(case) for case, _ in failed}) - len(skipped)
    lines = [f"* **{case.get('name')}**: {(problem.get('message') or '').splitlines()[:1]}" for case, problem in failed]
    lines += [f"* skipped: {reason}" for reason in dict.fromkeys(skipped)]
    return f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped", "\n".join(lines), bool(failed)


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def report(facts: dict[str, str], outcomes: Sequence[Outcome]) -> str:
    amd = facts["HIP"] != "none"
    heading = "AMD acceptance" if amd else "AMD acceptance, rehearsed: **no AMD device is present**, this ran on CUDA"
    lines = [f"# {heading}", "", *(f"* {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    for outcome in outcomes:
        verdict = outcome.summary if outcome.returncode == 0 else f"**{outcome.summary}**"
        lines.append(f"| {outcome.step.title} | {verdict} | {outcome.seconds:.0f} |")
    for outcome in outcomes:
        lines += ["", f"## {outcome.step.title}", "", fenced(" ".join(outcome.step.command)), "", outcome.details]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "amd-acceptance")
    folder = parser.parse_args().output.resolve()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    facts, path = machine(), folder / "report.md"
    outcomes: list[Outcome] = []
    for step in steps(folder):
        print(f"{step.title} …", flush=True)
        outcomes.append(run(step, folder))
        print(f"  {outcomes[-1].summary}, {outcomes[-1].seconds:.0f} s", flush=True)
        path.write_text(report(facts, outcomes))
    print(f"report: {path}")
    return int(any(outcome.returncode for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
