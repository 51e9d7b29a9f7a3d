"""Runs suites and Python code in a separate process, on a given overlay."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from .cpp import libraries
from .outcome import OUTCOME_FILE, Outcome, read_outcome
from .progress import helper_files
from .repo import Repo
from .suite_files import suite_files
from .units import Part, Unit

TIME_LIMIT = 30.0  # seconds for one test: ten times the slowest of the course
PLUGINS = ("time_limit", "provenance", "steady_parse", "first_failure", "chosen_tasks")
GRACE = 15  # seconds after a test's time limit until a process that does not react is killed
OWN_OUTPUT_OPTIONS = (
    "-x",
    "--exitfirst",
    "--full-trace",
    "--pdb",
    "--tb",
)  # pytest options that choose how failures are shown
INTERRUPT_GRACE = 5.0  # seconds for an interrupted process to print the line that was running


@contextmanager
def overlay_of(repo: Repo, sources: Mapping[str, str], *, kernels: bool = False) -> Iterator[Repo]:
    """Yield the repo with a temporary overlay of these modules and the learner's helper files.

    sources: source by module name. kernels: add the learner's compiled library.
    """
    with TemporaryDirectory(prefix="tiny-llm-overlay-") as folder:
        for module, source in sources.items():
            Path(folder, f"{module}.py").write_text(source, encoding="utf-8")
        for file in (*helper_files(repo), *(libraries(repo) if kernels else ())):
            shutil.copy(file, folder)
        yield repo.with_overlay(Path(folder))


def own_sources(repo: Repo, modules: Iterable[str]) -> dict[str, str]:
    """The learner's source of each of these modules."""
    return {module: (repo.overlay / f"{module}.py").read_text(encoding="utf-8") for module in modules}


def run_suites(
    repo: Repo,
    suites: Iterable[Path],
    arguments: Sequence[str] = (),
    *,
    about: str = "",
    quiet: bool = False,
    outcome: Path | None = None,
    time_limit: float = TIME_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run test files on the engine with this repo's overlay.

    quiet: capture the output instead of printing it. outcome: the file in which the run stores its outcome.
    time_limit: seconds for each test, 0 for no limit.
    """
    suites = list(suites)
    command = [sys.executable, "-m", "pytest", *_plugins(suites, arguments), "-o", "addopts="]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "--no-header" if quiet else "--tb=short"]
    if time_limit:
        hard_limit = (f"faulthandler_timeout={time_limit + GRACE}", "faulthandler_exit_on_timeout=1")
        command += [part for setting in hard_limit for part in ("-o", setting)]
    paths = [os.path.relpath(suite, repo.root) for suite in suites]
    return _run(
        [*command, f"--time-limit={time_limit}", *arguments, *paths],
        repo,
        {
            **_environment(repo, about),
            OUTCOME_FILE: str(outcome or ""),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )


def tests_of(unit: Unit) -> list[str]:
    """The pytest option that selects a part's tests; empty for a day, whose suite is the whole file."""
    tasks = ",".join(str(exercise.task) for exercise in unit.exercises)
    return [f"--tasks={tasks}"] if isinstance(unit, Part) else []


def run_suite_of(repo: Repo, unit: Unit, arguments: Sequence[str], about: str, time_limit: float) -> Outcome:
    """Run the tests of a day or a part, print their output, and return the outcome."""
    brief = [] if any(argument.startswith(OWN_OUTPUT_OPTIONS) for argument in arguments) else ["--brief"]
    with TemporaryDirectory(prefix="tiny-llm-outcome-") as folder:
        stored = Path(folder, "outcome.json")
        suites = [repo.suites / unit.suite]
        arguments = [*brief, *tests_of(unit), *arguments]
        start = time.monotonic()
        run = run_suites(repo, suites, arguments, about=about, outcome=stored, time_limit=time_limit)
        seconds = time.monotonic() - start
        return replace(read_outcome(stored, run.returncode), seconds=seconds)


def run_python(
    repo: Repo, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python on the engine with this repo's overlay, and capture its output.

    variables: additional environment variables.
    """
    command, environment = [sys.executable, *arguments], {**_environment(repo, ""), **(variables or {})}
    return _run(command, repo, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_python(repo: Repo, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start Python on the engine with this repo's overlay, with pipes for its input and output."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=repo.root,
        env=_environment(repo, ""),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _plugins(suites: Sequence[Path], arguments: Sequence[str]) -> list[str]:
    """The options for the course's plugins and the other plugins that the run needs.

    All installed plugins together take seconds to import. One of them (schemathesis) also makes Hypothesis
    print its examples without their values.
    """
    wanted = [f"tiny_llm_course.{name}" for name in PLUGINS]
    files = [file for suite in suites if suite.is_file() for file in suite_files(suite)]
    if not files or any("hypothesis" in file.read_text(encoding="utf-8") for file in files):
        wanted.append("_hypothesis_pytestplugin")
    if any(argument.startswith(("-n", "--dist")) for argument in arguments):
        wanted.append("xdist.plugin")
    return [part for name in wanted for part in ("-p", name)]


def _run(
    command: Sequence[str],
    repo: Repo,
    environment: Mapping[str, str],
    *,
    stdout: int | None,
    stderr: int | None,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run`, but an interrupted process has time to print the line that was running."""
    with subprocess.Popen(
        command, cwd=repo.root, env=environment, text=True, stdout=stdout, stderr=stderr
    ) as process:
        try:
            out, err = process.communicate()
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):
                _wait_after_interrupt(process)
            process.kill()
            raise
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _wait_after_interrupt(process: subprocess.Popen[str]) -> None:
    """Wait for a process that the terminal has interrupted too; interrupt it if it was not."""
    try:
        process.wait(timeout=INTERRUPT_GRACE / 2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=INTERRUPT_GRACE)


def _environment(repo: Repo, about: str) -> dict[str, str]:
    sources = [str(repo.root / "src"), str(Path(__file__).resolve().parents[1])]
    path = os.pathsep.join([*dict.fromkeys(sources), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "TINY_LLM_OVERLAY": str(repo.overlay),
        "TINY_LLM_COURSE_RUN": about,
        "PYTHONPATH": path,
    }
