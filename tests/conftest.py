"""Shared by all tests: how much runs and in how many processes, and fixtures.

By default the suite is spread over the cores, properties draw few examples, and tests marked `deep` are left
out. CI sets `HYPOTHESIS_PROFILE=ci`, with which properties draw twice as many. Both profiles draw the same
examples in every run; `HYPOTHESIS_PROFILE=deep` draws many more, and new ones each time.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

import tiny_llm_kernels
from tiny_llm import LLM

if find_spec("ray") is None:  # the group `cluster` is not installed
    collect_ignore = [
        "test_cluster_figures.py",
        "test_cluster_file.py",
        "test_cluster_remote.py",
        "test_cluster_streams.py",
    ]

MAX_PROCESSES = 8  # each loads the embedded model
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

for profile, max_examples in (("quick", 25), ("ci", 50)):
    settings.register_profile(
        profile,
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=SLOW_IS_FINE,
    )
settings.register_profile(
    "deep", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config: pytest.Config) -> None:
    """Without compiled kernels the tests run on the readable twins, and the engine's warning is no error.

    A shell starts what runs in its background with Ctrl-C ignored, and tests interrupt commands.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:no compiled kernels:RuntimeWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread the whole suite over processes; tests chosen by file run in this one, where a debugger works.

    There are more processes than cores, because many tests wait for other programs. A process gets one
    thread: the threads of all would wait for each other.
    """
    option = config.option
    if "PYTEST_XDIST_WORKER" not in os.environ:
        share_bytecode(config)
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    if option.numprocesses is None and not option.usepdb and not any(".py" in given for given in config.args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        option.numprocesses, option.dist = min(cores + cores // 2, MAX_PROCESSES), "worksteal"
    if option.numprocesses:
        for variable in ("TINY_LLM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(variable, "1")


def share_bytecode(config: pytest.Config) -> None:
    """Where Python is told to write no bytecode, keep it in a temporary folder until the run ends.

    A run starts hundreds of processes; without bytecode each compiles everything that it imports.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        folder = TemporaryDirectory(prefix="tiny-llm-bytecode-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark properties as `drawn`, and refuse two tests with the same id: parallel runs would lose one."""
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("drawn")
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
