"""Set up pytest for the suites: import paths, assertion rewriting and the order of the tests."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TASK = re.compile(r"test_task_(\d+)_")

sys.path.insert(0, str(HERE))  # for `common` and `week_W_day_D`
pytest.register_assert_rewrite(*sorted(file.parent.name for file in HERE.glob("*/*.py")))


def pytest_configure(config: pytest.Config) -> None:
    """Let all suites run without compiled kernels: ignore the engine's warning."""
    config.addinivalue_line("filterwarnings", "ignore:no compiled kernels:RuntimeWarning")


@pytest.fixture
def compiled() -> None:
    """Skip a test of compiled kernels if they are missing, and say why."""
    from tiny_llm.kernels import kernel_info

    if not kernel_info().available:
        pytest.skip(f"no compiled kernels: {kernel_info().why_unavailable}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort a day's tests by task, across its files, so that `-x` stops at the first failing task."""
    days = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (days.index(item.path), _task_of(item.name)))


def _task_of(name: str) -> int:
    """The number of a test's task, 0 if its name has none."""
    match = TASK.match(name)
    return int(match[1]) if match else 0
