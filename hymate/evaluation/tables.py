"""Numbers and tables, as reports and the console show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def number(value: float | None, decimals: int = 3) -> str:
    """With so many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{decimals}f}"


def with_interval(score: Mapping[str, Any], decimals: int = 3) -> str:
    """A `value` with its `ci`, where it has one."""
    if score["value"] is None or score["ci"] is None:
        return number(score["value"], decimals)
    low, high = (number(bound, decimals) for bound in score["ci"])
    return f"{number(score['value'], decimals)} [{low}, {high}]"


def percent(value: float | None) -> str:
    """A fraction in percent, or a dash; one decimal below 10 %."""
    return "-" if value is None else f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %"


def percent_with_interval(score: Mapping[str, Any]) -> str:
    """A fraction's `value` with its `ci`, both in percent, with as many decimals."""
    if score["value"] is None or score["ci"] is None:
        return percent(score["value"])
    low, high = (f"{100 * bound:.{1 if score['value'] < 0.0995 else 0}f}" for bound in score["ci"])
    return f"{percent(score['value'])} [{low}, {high}]"


def duration(days: float) -> str:
    """In days, or in hours where it is less than one."""
    amount, unit = (days, "day") if days >= 1 else (24 * days, "hour")
    return f"{amount:g} {unit}{'s' * (amount != 1)}"


# The first row of each table is its header.


def markdown(rows: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """A Markdown table; aligned: easy to read as plain text, too, with all columns but the first to the right."""
    if not aligned:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def show(title: str, rows: Sequence[Sequence[str]], width: int = 130) -> None:
    """Print a table; `width` is that of an output that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    table = Table(*rows[0], title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
