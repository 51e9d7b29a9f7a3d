"""A pytest plugin: fails a test that exceeds its time limit, with a traceback of the line that was running.

The error is raised in the main thread, so the traceback is the test's own. The run then stops, because the
next test would most likely loop too. The error is not an `Exception`, so that `except Exception` in a
learner's loop does not catch it. Compiled code in the main thread cannot be interrupted; for that case `runs`
sets pytest's faulthandler, which prints all threads and ends the process. The limit is off in a debugger.
Ctrl-C shows the line that was running, too.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

SUITES = "tests_refsol"
FRAMES = 6  # frames that are shown after Ctrl-C
THREADS_GRACE = 2.0  # seconds for threads to end after the tests
STOPPED = pytest.StashKey[bool]()  # whether a test exceeded its limit


class OutOfTimeError(BaseException):
    """A test, or the import of a test file, took longer than the limit."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--time-limit`, in seconds; 0 for no limit."""
    parser.addoption("--time-limit", type=float, default=0, metavar="SECONDS", help="limit for one test")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Limit the setup, because fixtures run the learner's code too."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Limit the test itself."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Limit the teardown, which may wait for a thread that never ends."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Limit the import of test files, which runs the top level of the learner's modules."""
    with _limited(collector.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Stop the run at the first test that exceeds its limit."""
    if call.excinfo is not None and isinstance(call.excinfo.value, OutOfTimeError):
        item.session.shouldstop = "a test exceeded its time limit (--time-limit SECONDS changes it)"
    return (yield)


def pytest_enter_pdb() -> None:
    """Turn the limit off in a debugger."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Show which line Ctrl-C interrupted, in the tests and the learner's code, without the reference's."""
    if type(excinfo.value) is not KeyboardInterrupt:
        return  # pytest itself stopped the run
    frames = [frame for frame in traceback.extract_tb(excinfo.tb) if _is_shown(Path(frame.filename))]
    print("\nCtrl-C: interrupted here (the last line is the innermost call)", file=sys.__stdout__)
    for frame in frames[-FRAMES:]:
        print(f"  {frame.filename}:{frame.lineno}, {frame.name}: {frame.line}", file=sys.__stdout__)
    sys.__stdout__.flush()  # type: ignore[union-attr]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Exit without waiting for threads that never end; everything has been printed."""
    ending = time.monotonic() + THREADS_GRACE
    while (left := _other_threads()) and time.monotonic() < ending and STOPPED not in config.stash:
        time.sleep(0.05)
    if left:
        names = ", ".join(repr(thread.name) for thread in left)
        print(f"still running after the tests: the threads {names}", file=sys.__stdout__)
        sys.__stdout__.flush()  # type: ignore[union-attr]
        os._exit(pytest.ExitCode.TESTS_FAILED)


def _other_threads() -> list[threading.Thread]:
    """The threads for which Python waits before it exits."""
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    return [thread for thread in others if not thread.daemon]


@contextmanager
def _limited(config: pytest.Config) -> Iterator[None]:
    """Raise `OutOfTimeError` in the main thread when the limit has passed."""
    limit: float = config.getoption("time_limit")
    if not limit:
        yield
        return

    def out_of_time(number: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        config.stash[STOPPED] = True
        raise OutOfTimeError(f"still running after {limit:g} s{_elsewhere()}")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _elsewhere() -> str:
    """Where other threads are in the learner's code, because one of them may be the cause."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        own = [one for one, _ in traceback.walk_stack(frame) if _is_own(Path(one.f_code.co_filename))]
        if own and ident != threading.main_thread().ident:
            where = (
                f"{Path(own[0].f_code.co_filename).name}, line {own[0].f_lineno}, in {own[0].f_code.co_name}"
            )
            found.append(f"; the thread {names.get(ident)!r} is at {where}")
    return "".join(found)


def _is_own(file: Path) -> bool:
    package = sys.modules.get("tiny_llm")
    return package is not None and str(file.parent) == package.__path__[0]


def _is_shown(file: Path) -> bool:
    return _is_own(file) or SUITES in file.parts
