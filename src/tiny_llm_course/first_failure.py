"""A pytest plugin (`--brief`): shows one failure at the end of the output, and lists the others by name.

It is the first failure of the first exercise that fails, in at most 40 lines. It replaces pytest's own
section of failures.
"""

import logging
from collections import Counter
from collections.abc import Generator

import pytest

from .outcome import task_of

MAX_LINES = 40
MAX_NAMES = 20
PRINTED = 6  # last lines of the test's output that are shown
HEAD = 12  # first lines of a long failure that are shown


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--brief`, which `runs` passes."""
    parser.addoption("--brief", action="store_true", help="show the first failure, list the others by name")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Remove the failures from pytest's summary, and show one of them after it."""
    if not terminalreporter.config.getoption("brief"):
        return (yield)
    failed = terminalreporter.stats.pop("failed", [])
    try:
        return (yield)
    finally:
        if failed:
            terminalreporter.stats["failed"] = failed
            _show(terminalreporter, failed)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Turn logging off, so that unread futures do not log their errors below the failure at exit."""
    if config.getoption("brief"):
        logging.disable()


def _show(terminal: pytest.TerminalReporter, failed: list[pytest.TestReport]) -> None:
    first = min(failed, key=lambda report: task_of(report.nodeid))  # the lowest task's first failure
    others = Counter(_name(report) for report in failed if report is not first)
    if others:
        failures = "1 other failure" if others.total() == 1 else f"{others.total()} other failures"
        terminal.write_line(f"{failures} (-v --tb=short shows everything):")
    for name, count in list(others.items())[:MAX_NAMES]:
        terminal.write_line(f"  {name}{f' ({count})' if count > 1 else ''}")
    if len(others) > MAX_NAMES:
        terminal.write_line(f"  and {len(others) - MAX_NAMES} more")
    terminal.write_sep("_", first.nodeid.partition("::")[2], red=True, bold=True)
    for line in lines_of(first.longreprtext, first.capstdout):
        terminal.write_line(line)


def lines_of(failure: str, printed: str) -> list[str]:
    """A failure and the end of its test's output, in at most 39 lines; the title makes them 40."""
    end = printed.splitlines()[-PRINTED:]
    said = ["printed:", *end] if end else []
    lines, limit = failure.splitlines(), MAX_LINES - 1 - len(said)
    if len(lines) > limit:
        left_out = len(lines) - limit + 1
        lines = [*lines[:HEAD], f"... {left_out} lines (-x shows them)", *lines[HEAD + left_out :]]
    return [*lines, *said]


def _name(report: pytest.TestReport) -> str:
    """The test's name without its parameters."""
    return report.nodeid.partition("::")[2].partition("[")[0]
