"""Mutate every region of the corpus, and write what became of the mutants to docs/mutation.md.

python tests/mutation/run.py --count 300 --seed 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402

from mutation import campaign  # noqa: E402
from mutation.corpus import CASES  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants of each region")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=60, help="boundary inputs for each rewritten mutant")
    parser.add_argument("--case", choices=CASES, action="append", help="only this region")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "mutation.md")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    tallies = []
    for name in given.case or CASES:
        tallies.append(campaign.run(name, given.count, given.seed, trials=given.trials))
        tally = tallies[-1]
        print(f"{name}: {tally.mutants} mutants, {tally.right} right, {len(tally.wrong)} wrong", flush=True)
        for description, wrong in tally.wrong:
            print(f"  WRONG {description}\n        {wrong.trial}: {wrong.what}", flush=True)
    command = f"python tests/mutation/run.py --count {given.count} --seed {given.seed} --trials {given.trials}"
    given.output.write_text(campaign.markdown(tallies, command))
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
