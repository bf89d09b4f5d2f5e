"""Mutants of the corpus, each given to the pass and, where it rewrites, to the oracle; and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fx_fusion.kernels.operation import KernelUnavailable
from fx_fusion.mutation.mutants import Mutant, Mutants, rewritten
from fx_fusion.mutation.oracle import Wrong, judge
from fx_fusion.report import FusionReport
from mutation.corpus import CASES


@dataclass(frozen=True)
class Fate:
    """What became of a mutant: refused with a code, or rewritten, and then right unless `wrong`."""

    mutant: Mutant
    code: str | None
    wrong: Wrong | None = None


@dataclass
class Tally:
    """What became of the mutants of one case."""

    name: str
    mutants: int = 0
    discarded: int = 0
    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, Wrong]] = field(default_factory=list)


def mutants_of(name: str, count: int, seed: int) -> Mutants:
    torch.manual_seed(0)
    fn, args, kwargs = CASES[name]()
    return Mutants.of(fn, args, kwargs, count=count, seed=seed)


def fates(mutants: Mutants, trials: int) -> Iterator[Fate]:
    """Each mutant's; a rewritten one is tried on `trials` boundary inputs."""
    for number, mutant in enumerate(mutants):
        try:
            fused, report = rewritten(mutant)
        except KernelUnavailable:
            yield Fate(mutant, "contract.kernel")
            continue
        if not report.fused:
            yield Fate(mutant, _code(report))
            continue
        yield Fate(mutant, None, judge(mutant, fused, count=trials, seed=number))


def run(name: str, count: int, seed: int, *, trials: int) -> Tally:
    mutants = mutants_of(name, count, seed)
    tally = Tally(name)
    for fate in fates(mutants, trials):
        tally.mutants += 1
        if fate.code is not None:
            tally.refused[fate.code] += 1
        elif fate.wrong is not None:
            tally.wrong.append((fate.mutant.description, fate.wrong))
        else:
            tally.right += 1
    tally.discarded = mutants.discarded
    return tally


def _code(report: FusionReport) -> str:
    return str(report.layers[0].code)


def markdown(tallies: list[Tally], command: str) -> str:
    """``docs/mutation.md``."""
    lines = [
        "# Mutation testing",
        "",
        "One constant, operand or operation of a fused region is changed at random. The pass must refuse the mutant,",
        "or rewrite it into what the mutant itself computes: judged by the mutant, run unfused in eager PyTorch, on",
        "boundary inputs (zeros of both signs, one-hot, tiny and huge rows, infinities, NaN; first, last and negative",
        "indices; none with which one place is stored twice, which is undefined). Mutants that do not trace or do not",
        "run are discarded. This page was written by",
        "",
        f"    {command}",
        "",
        "| region | mutants | refused | rewritten, right | rewritten, **wrong** | discarded |",
        "|---|---|---|---|---|---|",
    ]
    counts = [[t.mutants, t.refused.total(), t.right, len(t.wrong), t.discarded] for t in tallies]
    rows = [(t.name, *numbers) for t, numbers in zip(tallies, counts, strict=True)]
    rows.append(("**all**", *map(sum, zip(*counts, strict=True))))
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    refused = sum((t.refused for t in tallies), Counter[str]())
    lines += ["", "| refused with | mutants |", "|---|---|"]
    lines += [f"| `{code}` | {number} |" for code, number in refused.most_common()]
    wrong = [f"* {t.name}: {what}; {how.trial}: {how.what}" for t in tallies for what, how in t.wrong]
    return "\n".join([*lines, *(["", "Wrong:", "", *wrong] if wrong else [])]) + "\n"
