"""What every test shares: hypothesis profiles, and the state of the kernels put back after each test.

`HYPOTHESIS_PROFILE=deep` runs the properties over many more examples, drawn anew each time; the
default, `ci`, draws the same ones in every run.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import tiny_llm_kernels
from tiny_llm import LLM

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "ci", max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile(
    "deep", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Without compiled kernels the tests run on the readable twins, and the engine's warning is no error.

    A shell starts what runs in its background with Ctrl-C ignored, and tests interrupt commands.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:no compiled kernels:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests with one name all but one are lost where several processes share the tests."""
    twice = [name for name, times in Counter(item.nodeid for item in items).items() if times > 1]
    if twice:
        raise pytest.UsageError(f"several tests have the same name: {', '.join(twice)}")


def pytest_report_header() -> str:
    """Say what the tests run on: what holds on MLX's own operators proves nothing for the kernels."""
    why = tiny_llm_kernels.why_unavailable()
    return f"kernels: {why or 'compiled, ' + tiny_llm_kernels.instruction_set()}"


@pytest.fixture(autouse=True)
def _kernels_as_they_were() -> Iterator[None]:
    """A test may change the threads and the instruction set; the next one finds them as they were."""
    if not tiny_llm_kernels.available():
        yield
        return
    threads, name = tiny_llm_kernels.num_threads(), tiny_llm_kernels.instruction_set()
    yield
    tiny_llm_kernels.set_num_threads(threads)
    tiny_llm_kernels.select_instruction_set(name)


@pytest.fixture(scope="session")
def embedded_llm() -> LLM:
    """The embedded model, loaded once for all tests that only generate with it."""
    if not tiny_llm_kernels.available():
        pytest.skip(f"the embedded model needs the compiled kernels: {tiny_llm_kernels.why_unavailable()}")
    return LLM(num_blocks=2048, max_num_seqs=32)
