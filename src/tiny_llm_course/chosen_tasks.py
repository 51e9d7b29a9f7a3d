"""A pytest plugin: of a day's suite only the tests of some tasks run, such as those of a part.

A test is about the task that its name gives, so `--tasks=1` leaves `test_task_11_...` out, which `-k` with a
part of a name may not.
"""

import pytest

from .outcome import task_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """The numbers of the tasks; all of them where it is not given."""
    parser.addoption("--tasks", default="", metavar="N,N", help="run only the tests of these tasks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests of all other tasks out of the run."""
    wanted = {int(task) for task in str(config.getoption("tasks")).split(",") if task}
    others = [item for item in items if wanted and task_of(item.nodeid) not in wanted]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if task_of(item.nodeid) in wanted]
