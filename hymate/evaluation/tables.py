"""Numbers and tables, as reports and the console show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console


def new_console(width: int = 130) -> Console:
    """Where tables are shown; `width` is that of a stream that is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=width)


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def with_interval(score: Mapping[str, Any]) -> str:
    """A `value` with its `ci`, where it has one."""
    if score["value"] is None or score["ci"] is None:
        return number(score["value"])
    low, high = score["ci"]
    return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"


def percent(value: float | None) -> str:
    """A share in percent, or a dash; one decimal below 10 %."""
    return "-" if value is None else f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %"


def percent_with_interval(score: Mapping[str, Any]) -> str:
    """A share's `value` with its `ci`, both in percent."""
    if score["value"] is None or score["ci"] is None:
        return percent(score["value"])
    low, high = score["ci"]
    return f"{percent(score['value'])} [{100 * low:.0f}, {100 * high:.0f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
