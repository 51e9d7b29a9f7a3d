"""A pytest plugin: a test that takes too long fails with the traceback of where it stands; Ctrl-C shows
that too.

The limit is raised in the main thread, so the traceback is the test's own, and the run stops there: the
next test would most likely loop as well. It is no `Exception`, so `except Exception` in a learner's loop
does not catch it. While the main thread is in compiled code it cannot be interrupted: for that `runs` sets
pytest's own faulthandler, which prints all threads and ends the process. A debugger has all the time that
it wants.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

SUITES = "tests_refsol"
FRAMES = 6  # of a traceback after Ctrl-C
STOPPED = pytest.StashKey[bool]()  # whether a test was out of time


class OutOfTimeError(BaseException):
    """A test, or a file that is imported, took longer than the limit."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The limit, 0 for none."""
    parser.addoption("--time-limit", type=float, default=0, metavar="SECONDS", help="a test's longest time")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Fixtures run the learner's code too."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """The test itself."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """What ends a fixture may wait for a thread that never ends."""
    with _limited(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A loop at a module's top level runs when the suite imports it."""
    with _limited(collector.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Stop the run at the first test that is out of time."""
    if call.excinfo is not None and isinstance(call.excinfo.value, OutOfTimeError):
        item.session.shouldstop = "a test is out of time (--time-limit SECONDS sets another limit)"
    return (yield)


def pytest_enter_pdb() -> None:
    """Who debugs is not out of time."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Say where Ctrl-C met the run: the lines of the tests and of the learner, the reference's left out."""
    if type(excinfo.value) is not KeyboardInterrupt:
        return  # pytest itself has stopped the run
    frames = [frame for frame in traceback.extract_tb(excinfo.tb) if _is_shown(Path(frame.filename))]
    print("\nCtrl-C: it stood here (the last line is the innermost)", file=sys.__stdout__)
    for frame in frames[-FRAMES:]:
        print(f"  {frame.filename}:{frame.lineno}, {frame.name}: {frame.line}", file=sys.__stdout__)
    sys.__stdout__.flush()  # type: ignore[union-attr]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Do not wait for a thread that does not end: everything has been told."""
    endless = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    if endless and STOPPED in config.stash:
        sys.__stdout__.flush()  # type: ignore[union-attr]
        os._exit(pytest.ExitCode.TESTS_FAILED)


@contextmanager
def _limited(config: pytest.Config) -> Iterator[None]:
    """Raise `OutOfTimeError` in the main thread once the limit has passed."""
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
    """Where the other threads stand in the learner's code: one of them may be the reason."""
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
