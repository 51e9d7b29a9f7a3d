"""A pytest plugin: `--tasks=1,2` runs only the tests of these tasks, such as those of a part.

The task is the number in a test's name, so `--tasks=1` does not select `test_task_11_...`; `-k task_1` would.
"""

import pytest

from .outcome import task_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--tasks`; without it, all tests run."""
    parser.addoption("--tasks", default="", metavar="N,N", help="run only the tests of these tasks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of all other tasks."""
    wanted = {int(task) for task in str(config.getoption("tasks")).split(",") if task}
    others = [item for item in items if wanted and task_of(item.nodeid) not in wanted]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if task_of(item.nodeid) in wanted]
