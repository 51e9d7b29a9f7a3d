"""What pytest needs to know before it imports a suite: where its further files are, and what they are."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TASK = re.compile(r"test_task_(\d+)_")

sys.path.insert(0, str(HERE))  # for `common` and `week_W_day_D`
pytest.register_assert_rewrite(*sorted(file.parent.name for file in HERE.glob("*/*.py")))


def pytest_configure(config: pytest.Config) -> None:
    """Let all suites run without compiled kernels: the engine's warning is no error there."""
    config.addinivalue_line("filterwarnings", "ignore:no compiled kernels:RuntimeWarning")


@pytest.fixture
def compiled() -> None:
    """Skip a test about compiled kernels where there are none, and say why."""
    from tiny_llm.kernels import kernel_info

    if not kernel_info().available:
        pytest.skip(f"no compiled kernels: {kernel_info().why_unavailable}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a day's tests in the order of its tasks, whichever file they are in: `-x` stops at the first."""
    days = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (days.index(item.path), _task_of(item.name)))


def _task_of(name: str) -> int:
    """The number of the task that a test is about; 0 where its name says none."""
    match = TASK.match(name)
    return int(match[1]) if match else 0
