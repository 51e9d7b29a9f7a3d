"""A pytest plugin: names the learner's modules in the header, and separates blanks from failures.

A test that reaches a blank exercise counts as failed, but is not shown as a failure: each blank exercise is
named once at the end, with the number of tests that wait for it. Tracebacks in a learner's run leave out the
reference's lines, because they would show solutions of other days.
"""

import os
import re
import traceback
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from .outcome import OUTCOME_FILE, write_outcome, write_running
from .time_limit import STOPPED

BLANK = "blank"
OF_A_BLANK = re.compile(r"\d\.\d\.\d+ \S+: ")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show which modules are the learner's, and whose compiled kernels run."""
    import tiny_llm_kernels

    overlay, reference = _folders()
    own = _own(overlay)
    number = len([file for file in reference.glob("*.py") if file.stem not in {*own, "__init__"}])
    whose = os.environ.get("TINY_LLM_COURSE_RUN", "")
    yours = ", ".join(f"{name}.py" for name in own) or "no modules"
    library = tiny_llm_kernels.library()
    kernels = "none" if library is None else "yours" if library.parent == overlay else "the reference's"
    about = f"course: {whose}" if whose else "course:"
    return [about, f"yours: {yours}; from the reference: {number} modules; compiled kernels: {kernels}"]


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Store which file is being imported, because a crash leaves no report."""
    _note_running(collector.nodeid)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Store which test is running, because a crash leaves no report."""
    _note_running(nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a blank's message to the report of the test that reached it; hide the reference's lines."""
    raised = call.excinfo.value if call.excinfo is not None else None
    if raised is not None:
        _hide_reference(raised)
    report = yield
    if isinstance(raised, NotImplementedError) and OF_A_BLANK.match(str(raised)):
        report.user_properties.append((BLANK, str(raised)))
    return report


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport,
) -> tuple[str, str, str] | None:
    """Put tests that reached a blank into a separate category."""
    if report.failed and _message(report) is not None:
        return BLANK, "b", "BLANK"
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name each blank once, with the number of tests that wait for it."""
    for message, count in Counter(message for _, message in _waiting(terminalreporter)).items():
        terminalreporter.write_line(f"{f'{count} tests wait' if count > 1 else '1 test waits'} for {message}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Store the outcome, if a file for it is set, before pytest prints its summary."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(OUTCOME_FILE) and reporter is not None:
        failed = [report.nodeid for kind in ("failed", "error") for report in reporter.stats.get(kind, ())]
        stopped = STOPPED in session.config.stash
        write_outcome(Path(os.environ[OUTCOME_FILE]), failed, _waiting(reporter), stopped=stopped)


def _note_running(what: str) -> None:
    if os.environ.get(OUTCOME_FILE):
        write_running(Path(os.environ[OUTCOME_FILE]), what)


def _waiting(reporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    """The id of each waiting test, with the message of the blank that it reached."""
    return [(report.nodeid, str(_message(report))) for report in reporter.stats.get(BLANK, ())]


def _folders() -> list[Path]:
    """The overlay and the reference."""
    import tiny_llm

    return [Path(folder) for folder in tiny_llm.__path__]


def _own(overlay: Path) -> list[str]:
    """The learner's modules."""
    return sorted(file.stem for file in overlay.glob("*.py") if file.stem != "__init__")


def _hide_reference(raised: BaseException) -> None:
    """Hide the reference's frames in an error's traceback, unless --full-trace is set.

    If the learner has no modules, the run tests the reference itself, and no frame is hidden.
    """
    overlay, reference = _folders()
    if _own(overlay):
        for frame, _ in traceback.walk_tb(raised.__traceback__):
            if Path(frame.f_code.co_filename).parent == reference:
                frame.f_globals["__tracebackhide__"] = True


def _message(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The message of the blank that a test reached; None if it reached none, or for a collection error."""
    properties = getattr(report, "user_properties", ())
    return next((str(value) for name, value in properties if name == BLANK), None)
