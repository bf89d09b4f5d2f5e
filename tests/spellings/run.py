"""Thousands of combinations: how many fuse, which are declined, whether any is wrong.

python tests/spellings/run.py --count 2000 --seed 1
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402

from spellings.combination import draw, simplest, verdict  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simplify", type=int, default=3, help="of each kind of failure, simplify this many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance, counts, shown = random.Random(given.seed), Counter(), Counter()
    failures = 0
    for number in range(given.count):
        combination = draw(chance.choice)
        found = verdict(combination, seed=number)
        counts[f"{found.state} {found.code or ''}".strip()] += 1
        if found.justified(combination):
            continue
        failures += 1
        kind = (found.state, found.code)
        shown[kind] += 1
        print(f"{number}: {found.state} {found.code or ''}: {combination}", flush=True)
        if shown[kind] <= given.simplify:
            print(f"   simplest: {simplest(combination, found)}\n   {found.message[:700]}", flush=True)
    for what, count in counts.most_common():
        print(f"{count:6} {what}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
