"""The table that these tests end in."""

from __future__ import annotations

import pytest

ROWS: list[tuple[str, str, int | str, float]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.write_line("\n| fault | what happens | steps done again | seconds to recover |")
        terminalreporter.write_line("| --- | --- | --- | --- |")
        for fault, happens, redone, seconds in ROWS:
            terminalreporter.write_line(f"| {fault} | {happens} | {redone} | {seconds:.0f} |")


@pytest.fixture(scope="session")
def table() -> list[tuple[str, str, int | str, float]]:
    """fault, what happens, steps done again, seconds until the run was again where the fault met it."""
    return ROWS
