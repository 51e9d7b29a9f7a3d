"""A pytest plugin: of many failures one is shown, last, and the others are named.

It is the first failure of the first exercise that has one, in at most 40 lines. pytest's own section of
failures is left out. `runs` asks for it by `--brief`.
"""

import logging
from collections import Counter
from collections.abc import Generator

import pytest

from .outcome import task_of

MAX_LINES = 40
MAX_NAMES = 20
PRINTED = 6  # last lines of what the test has printed
HEAD = 12  # lines that a long failure begins with


def pytest_addoption(parser: pytest.Parser) -> None:
    """Asked for by the course's run, never by hand."""
    parser.addoption("--brief", action="store_true", help="show the first failure, name the others")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Take the failures from pytest's summary, and show one of them after it."""
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
    """Nothing follows what was shown: futures that are left log their errors when the process ends."""
    if config.getoption("brief"):
        logging.disable()


def _show(terminal: pytest.TerminalReporter, failed: list[pytest.TestReport]) -> None:
    first = min(failed, key=lambda report: task_of(report.nodeid))  # the first of equals
    others = Counter(_name(report) for report in failed if report is not first)
    if others:
        terminal.write_line(f"failing too, {others.total()} in all (-v --tb=short shows everything):")
    for name, count in list(others.items())[:MAX_NAMES]:
        terminal.write_line(f"  {name}{f' ({count})' if count > 1 else ''}")
    if len(others) > MAX_NAMES:
        terminal.write_line(f"  and {len(others) - MAX_NAMES} more")
    terminal.write_sep("_", first.nodeid.partition("::")[2], red=True, bold=True)
    for line in lines_of(first.longreprtext, first.capstdout):
        terminal.write_line(line)


def lines_of(failure: str, printed: str) -> list[str]:
    """A failure and the end of what its test printed, in at most 39 lines: with its title they are 40."""
    end = printed.splitlines()[-PRINTED:]
    said = ["printed:", *end] if end else []
    lines, room = failure.splitlines(), MAX_LINES - 1 - len(said)
    if len(lines) > room:
        left_out = len(lines) - room + 1
        lines = [*lines[:HEAD], f"... {left_out} lines (-x shows them)", *lines[HEAD + left_out :]]
    return [*lines, *said]


def _name(report: pytest.TestReport) -> str:
    """The test without the values that it was run with."""
    return report.nodeid.partition("::")[2].partition("[")[0]
