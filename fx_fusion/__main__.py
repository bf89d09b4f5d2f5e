"""``python -m fx_fusion COMMAND``. A command is a module with `add_to`, which sets `run` for its arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fx_fusion.cli import doctor, explain, patch, tune

COMMANDS = (doctor, explain, patch, tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if it failed, 2 if it could not be asked."""
    parser = argparse.ArgumentParser(prog="python -m fx_fusion", description="Attention prologues, fused.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
