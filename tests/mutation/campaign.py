"""Mutants of the corpus, each given to the pass and, where it rewrites, to the oracle; and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fx_fusion.dispatch import KernelUnavailable
from fx_fusion.mutants import Mutants, rewritten
from mutation.corpus import CASES
from mutation.oracle import Wrong, judge


@dataclass
class Tally:
    """What became of the mutants of one case."""

    name: str
    mutants: int = 0
    discarded: int = 0
    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, Wrong]] = field(default_factory=list)


def run(count: int, seed: int, *, trials: int, cases: Iterable[str] = tuple(CASES)) -> list[Tally]:
    """`count` mutants of each case; a rewritten one is tried on `trials` boundary inputs."""
    return [_run_case(name, count, seed, trials) for name in cases]


def _run_case(name: str, count: int, seed: int, trials: int) -> Tally:
    torch.manual_seed(0)
    tally = Tally(name)
    fn, args, kwargs = CASES[name]()
    mutants = Mutants.of(fn, args, kwargs, count=count, seed=seed)
    for mutant in mutants:
        tally.mutants += 1
        try:
            fused, report = rewritten(mutant)
        except KernelUnavailable:
            tally.refused["contract.kernel"] += 1
            continue
        if not report.fused:
            tally.refused[next((str(layer.code) for layer in report.layers), "nothing found")] += 1
            continue
        wrong = judge(mutant, fused, count=trials, seed=tally.mutants)
        if wrong is None:
            tally.right += 1
        else:
            tally.wrong.append((mutant.description, wrong))
    tally.discarded = mutants.discarded
    return tally


def markdown(tallies: list[Tally], command: str) -> str:
    """``docs/mutation.md``."""
    lines = [
        "# Mutation testing",
        "",
        "One constant, operand or operation of a fused region is changed at random. The pass must refuse the mutant, or",
        "rewrite it into what the mutant itself computes: judged by the mutant, run unfused in eager PyTorch, on boundary",
        "inputs (zeros of both signs, one-hot, tiny and huge rows, infinities, NaN, first, last and negative indices).",
        f"`{command}` wrote this page.",
        "",
        "| region | mutants | refused | rewritten, right | rewritten, **wrong** | discarded |",
        "|---|---|---|---|---|---|",
    ]
    for t in tallies:
        lines.append(f"| {t.name} | {t.mutants} | {t.refused.total()} | {t.right} | {len(t.wrong)} | {t.discarded} |")
    sums = [sum(column) for column in zip(*((t.mutants, t.refused.total(), t.right, len(t.wrong), t.discarded)
                                            for t in tallies), strict=True)]  # fmt: skip
    lines += [f"| **all** | {' | '.join(map(str, sums))} |", "", "Discarded mutants do not trace or do not run.", ""]
    refused = sum((t.refused for t in tallies), Counter[str]())
    lines += ["| refused with | mutants |", "|---|---|"]
    lines += [f"| `{code}` | {number} |" for code, number in refused.most_common()]
    wrong = [(t.name, description, what) for t in tallies for description, what in t.wrong]
    if wrong:
        lines += ["", "Wrong:", ""]
        lines += [f"* {name}: {description}; {what.trial}: {what.what}" for name, description, what in wrong]
    return "\n".join(lines) + "\n"
