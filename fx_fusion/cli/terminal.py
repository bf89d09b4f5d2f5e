"""Tables for people at a terminal; nicer where rich is installed, which is not required."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is None:
        print(plain_table(title, columns, rows))
    else:
        _print_rich(title, columns, rows)


def print_lines(lines: Sequence[str]) -> None:
    """Plain text; rich would break lines and colour numbers."""
    for line in lines:
        print(line)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
