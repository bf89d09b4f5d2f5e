"""``python -m fx_fusion tune``: measure kernels and their settings on this machine's GPU, for the pass to use."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fx_fusion.cli.terminal import print_table
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.bench import Bench, Refused
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Tuned
from fx_fusion.kernels.measure.tuning import Best, Found, Times, all_settings, measure, settings_to_measure

#: Powers of two: between two of them the tile of the lower one serves.
TOKENS = [1 << power for power in range(15)]
HEADS = "32/8/128"
DTYPES = ("bfloat16", "float16", "float32")

MakeBench = Callable[[Shape, int, torch.device], Times]


def add_to(commands: Any) -> None:
    """Add the command to the sub-parsers `commands`."""
    parser = commands.add_parser("tune", help="measure on this machine's GPU, for the pass to use", description=__doc__)
    parser.add_argument(
        "--heads", nargs="+", type=_heads, default=[_heads(HEADS)], metavar="HQ/HK/D",
        help=f"query heads, KV heads and head_dim of one rank; /R for a smaller rotary_dim (default: {HEADS})",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=_counts, default=TOKENS, metavar="N,N,…", help="token counts (default: 1,2,4,…,16384)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of q, k, v and the cache")
    parser.add_argument("--output", type=Path, help=f"the file (default: {tuned.VARIABLE}, else Inductor's cache)")
    parser.add_argument("--quick", action="store_true", help="only the settings that the built-in rules choose among")
    parser.set_defaults(run=run)


def _heads(text: str) -> tuple[int, ...]:
    """(num_heads, num_kv_heads, head_dim, rotary_dim)"""
    sizes = _numbers(text, "/")
    if len(sizes) == 3:
        sizes = (*sizes, sizes[2])
    if len(sizes) != 4 or sizes[0] % sizes[1] or sizes[3] > sizes[2] or sizes[3] % 2:
        raise argparse.ArgumentTypeError(f"expected HQ/HK/D or HQ/HK/D/R, as in {HEADS}, got {text!r}")
    return sizes


def _counts(text: str) -> list[int]:
    return sorted(set(_numbers(text, ",")))


def _numbers(text: str, separator: str) -> tuple[int, ...]:
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers with {separator!r} between, got {text!r}")
    return tuple(map(int, parts))


def run(arguments: argparse.Namespace, make_bench: MakeBench = Bench) -> int:
    """Measure, write the file, print what changed.

    Returns:
        The exit code: 1 if something failed, 2 where there is nothing to measure on or to write to.
    """
    device, path = torch.device("cuda"), arguments.output or tuned.location()
    machine = tuned.machine(device)
    if machine is None:
        return _say_why("PyTorch finds no CUDA or ROCm device here; run this on the machine that will serve", 2)
    if path is None:
        return _say_why(f"{tuned.VARIABLE} is {tuned.OFF!r}; name a file with --output", 2)
    try:
        found = _measure_all(arguments, device, make_bench)
        tuned.save(path, _as_file(machine, found))
    except Refused as refused:
        return _say_why(f"no kernel could be timed:\n{refused}", 1)
    except OSError as error:
        return _say_why(f"{path} cannot be written: {error}", 1)
    _print(machine, found, path)
    return 0


def _say_why(reason: str, code: int) -> int:
    print(f"fx_fusion tune: {reason}", file=sys.stderr)
    return code


def _measure_all(arguments: argparse.Namespace, device: torch.device, make_bench: MakeBench) -> list[Found]:
    found: list[Found] = []
    for sizes in arguments.heads:
        shape = Shape(*sizes, dtype=arguments.dtype)
        every = {count: all_settings(make_bench(shape, count, device)) for count in arguments.tokens}
        settings = settings_to_measure(every, quick=arguments.quick)
        for count in arguments.tokens:
            found.append(measure(shape, count, settings[count], make_bench(shape, count, device)))
            times = ", ".join(f"{name} {best.us:.2f} us" for name, best in found[-1].best.items())
            print(f"{shape}, {count} tokens: {times}", file=sys.stderr, flush=True)
    return found


def _as_file(machine: Machine, found: Sequence[Found]) -> Tuned:
    shapes = dict.fromkeys(each.shape for each in found)
    timings = {shape: tuple(each.timing for each in found if each.shape == shape) for shape in shapes}
    return Tuned(machine, torch.__version__, datetime.date.today().isoformat(), timings)


def _print(machine: Machine, found: Sequence[Found], path: Path) -> None:
    kernels = list(dict.fromkeys(name for each in found for name in each.best))
    tuned_kernels = [name for name in kernels if any(name in each.settings for each in found)]
    columns = ["heads", "tokens"]
    for name in kernels:
        columns += [f"{name}, built in", "us", "best", "us", "gain"] if name in tuned_kernels else [f"{name} us"]
    rows = [_cells(each, kernels, tuned_kernels) for each in found]
    print_table(f"{machine.device}, microseconds a call", [*columns, "auto calls"], rows)
    changed = [each for each in found if any(best.setting != best.rule for best in each.best.values())]
    print(f"another setting than the built-in rule's for {len(changed)} of {len(found)} token counts")
    for reason in dict.fromkeys(reason for each in found for reason in each.refusals):
        print(f"not timed: {reason}")
    print(f"written to {path}")
    if path != tuned.location():
        print(f"to use it: export {tuned.VARIABLE}={path.resolve()}")


def _cells(found: Found, kernels: Sequence[str], tuned_kernels: Sequence[str]) -> list[str]:
    cells = [str(found.shape), str(found.num_tokens)]
    for name in kernels:
        best = found.best.get(name)
        cells += _tuned_cells(best) if name in tuned_kernels else [_number(best and best.us)]
    return [*cells, found.fastest]


def _tuned_cells(best: Best | None) -> list[str]:
    if best is None:
        return ["-"] * 5
    return [str(best.rule), _number(best.rule_us), str(best.setting), _number(best.us), _number(best.gain)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
