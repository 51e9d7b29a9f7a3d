"""Test runs of wrong code: endless loops, crashes, many failures, faults in other modules; and watching.

Most tests use the small course of `toy_course`; those that need a thread or a terminal use the real one.
"""

import ast
import dataclasses
import gc
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_llm_course import blame
from tiny_llm_course.blame import find_blame
from tiny_llm_course.first_failure import MAX_LINES, lines_of
from tiny_llm_course.outcome import UNFINISHED, Outcome, first_to_fix
from tiny_llm_course.progress import note_first_to_fix
from tiny_llm_course.repo import Repo
from tiny_llm_course.runs import run_suite_of, run_suites
from tiny_llm_course.steady_parse import steady_parse
from tiny_llm_course.testing import run_day
from tiny_llm_course.views import NextHint
from tiny_llm_course.watch import Key, Keyboard, watch
from toy_course import ADDING, COUNTING, DOUBLING, replace, repo, suite, syllabus_of, write

__all__ = ["repo"]

LOOP = "    while True:\n        try:\n            pass\n        except Exception:\n            pass\n"


def looping() -> str:
    return ADDING.replace("    return sum((one, other))\n", LOOP)


# ---- loops ----


def test_an_endless_loop_fails_with_the_running_line(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", looping())
    start = time.monotonic()
    assert run_day(repo, syllabus, syllabus.day("1.1"), [], time_limit=1) != 0
    assert time.monotonic() - start < 30
    out = capfd.readouterr().out
    assert "still running after 1 s" in out
    assert "adding.py:10: in add" in out
    assert "time_limit.py" not in out.replace("tiny_llm_course.time_limit", "")
    assert "searching for the cause" not in out, "any further run would loop too"
    assert out.endswith(
        "first: 1.1.1 add (1 of its tests fails): pdm run test 1.1.1 -x; pdm run hint 1.1.1\n"
    )


def test_an_endless_loop_at_a_modules_top_level_is_stopped(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", f"{ADDING}\nwhile True:\n    pass\n")
    assert run_day(repo, syllabus, syllabus.day("1.1"), [], time_limit=1) != 0
    assert "still running after 1 s" in capfd.readouterr().out


def test_a_looping_thread_is_named_and_not_waited_for(repo: Repo) -> None:
    """The test waits for a thread of the learner's that never ends, and neither does the process."""
    threaded = "    import threading\n\n    def spin() -> None:\n        while True:\n            pass\n\n"
    threaded += (
        "    thread = threading.Thread(target=spin, name='engine')\n    thread.start()\n    thread.join()\n"
    )
    write(repo, "adding", ADDING.replace("    return sum((one, other))\n", threaded))
    run = run_suites(repo, [suite(repo, 1)], quiet=True, time_limit=1)
    assert run.returncode == 1
    assert re.search(r"the thread 'engine' is at adding\.py, line (13|14), in spin", run.stdout)


def test_a_thread_that_outlives_the_tests_is_named_and_not_waited_for(repo: Repo) -> None:
    forgotten = "    import threading\n    import time\n\n"
    forgotten += "    threading.Thread(target=time.sleep, args=(10**6,), name='engine').start()\n"
    own = ADDING.replace("    return sum((one, other))\n", forgotten + "    return sum((one, other))\n")
    write(repo, "adding", own)
    run = run_suites(repo, [suite(repo, 1)], quiet=True, time_limit=30)
    assert run.returncode == 1
    assert "still running after the tests: the threads 'engine'" in run.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_the_learners_code_ends_has_not_passed(
    repo: Repo, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(
        repo,
        "adding",
        ADDING.replace("    return sum((one, other))\n", f"    import os\n\n    os._exit({code})\n"),
    )
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == (code or UNFINISHED)
    out = capfd.readouterr().out
    assert "passes" not in out
    assert ("the tests did not finish" in out) == (code == 0)


def test_without_a_limit_and_in_a_debugger_nothing_is_stopped(repo: Repo) -> None:
    slow = "    import time\n\n    time.sleep(1.5)\n    return one + other\n"
    write(repo, "adding", ADDING.replace("    return sum((one, other))\n", slow))
    assert run_suites(repo, [suite(repo, 1)], quiet=True, time_limit=0).returncode == 0
    assert run_suites(repo, [suite(repo, 1)], quiet=True, time_limit=0.5).returncode != 0


def interrupted(overlay: Path, until: str) -> subprocess.CompletedProcess[str]:
    """Run `pdm run test 1.1` in a separate session, and interrupt it once it has printed `until`."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "tiny_llm_course", "test", "1.1", "-v"],
        env={**os.environ, "TINY_LLM_OVERLAY": str(overlay), "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        while until not in said:
            said += process.stdout.readline()
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, said + rest)


def real_loop(overlay: Path) -> None:
    """Day 1.1 with a mask that loops."""
    code = "from tiny_llm_course.repo import Repo\nfrom tiny_llm_course.syllabus import read_syllabus\n"
    code += "from tiny_llm_course.starter import start\nrepo = Repo.here()\n"
    code += "start(repo, read_syllabus(repo.syllabus).day('1.1'))\n"
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TINY_LLM_OVERLAY": str(overlay)}, check=True
    )
    source = (overlay / "attention.py").read_text("utf-8")
    blank = next(line for line in source.splitlines() if '"1.1.1 softmax' in line)
    replace(overlay / "attention.py", blank, "    while True:\n        pass")


def test_ctrl_c_shows_the_running_line(tmp_path: Path) -> None:
    real_loop(tmp_path)
    run = interrupted(tmp_path, "collected ")
    assert run.returncode == 130, run.stdout
    assert "Ctrl-C: interrupted here" in run.stdout
    assert "attention.py:" in run.stdout
    assert ", softmax: " in run.stdout


def test_a_save_stops_a_looping_run_and_starts_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command loops until its file is saved; the run is ended, and the next one uses the fixed file."""
    code = tmp_path / "code.py"
    code.write_text("print('looping', flush=True)\nwhile True: pass\n", "utf-8")

    def polls() -> Iterator[bool]:
        time.sleep(1)
        yield False
        code.write_text("print('mended')\n", "utf-8")
        yield True
        for _ in range(60):
            time.sleep(0.1)
            yield False

    assert watch(Repo(tmp_path, tmp_path), [sys.executable, str(code)], polls()) == 0
    out = capfd.readouterr().out
    assert "file saved: this run is stopped, and a new one starts" in out
    assert out.index("looping") < out.index("mended") < out.index("watching ")


class Typed(Keyboard):
    """A keyboard on which these keys are pressed, one at each poll while no run is going."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self._keys, self._is_listening = list(keys), False

    def listen(self) -> None:
        self._is_listening = True

    def stop(self) -> None:
        self._is_listening = False

    def pressed(self) -> str:
        return self._keys.pop(0) if self._is_listening and self._keys else ""


def no_saves() -> Iterator[bool]:
    """Polls without a save, for at most ten seconds."""
    for _ in range(100):
        time.sleep(0.1)
        yield False


def test_between_runs_a_key_starts_another_run_or_runs_an_action_or_quits(tmp_path: Path) -> None:
    runs, pressed = tmp_path / "runs", list[str]()
    append = f"open({str(runs)!r}, 'a').write('run ')"
    keys = {"h": Key("hint", lambda: pressed.append("h"))}
    code = watch(Repo(tmp_path, tmp_path), [sys.executable, "-c", append], no_saves(), keys, Typed("hrxhq"))
    assert code == 0
    assert runs.read_text("utf-8") == "run run "
    assert pressed == ["h", "h"]


def test_a_key_is_read_from_a_terminal_without_enter_and_the_terminal_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal, device = pty.openpty()
    with os.fdopen(terminal, "wb", buffering=0) as typing, os.fdopen(device) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin)
        keyboard = Keyboard()
        assert keyboard.pressed() == ""
        keyboard.listen()
        typing.write(b"H")
        select.select([stdin], [], [], 5)
        assert [keyboard.pressed(), keyboard.pressed()] == ["h", ""]
        keyboard.stop()
        typing.write(b"h")
        assert keyboard.pressed() == "", "a run has the terminal now"
        assert termios.tcgetattr(stdin) == before


def test_the_next_hint_is_for_the_exercise_that_the_last_run_named(
    repo: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        repo,
        "adding",
        "def add(one, other):\n    raise NotImplementedError('1.1.1 add: pdm run hint 1.1.1')\n",
    )
    syllabus = syllabus_of(repo)
    next_hint = NextHint(repo, syllabus)

    def shown() -> str:
        next_hint()
        return capsys.readouterr().out.splitlines()[0]

    assert shown() == "no exercise to fix: the last run did not name one"
    assert run_day(repo, syllabus, syllabus.day("1.1"), ["-q"]) == 1
    capsys.readouterr()
    steps = [f"1.1.1 add, {step}:" for step in ("a question", "a fact", "a sketch")]
    assert [shown() for _ in range(4)] == [*steps, steps[-1]]
    note_first_to_fix(repo, "1.2.2")
    assert shown() == "1.2.2 double, a question:"
    write(repo, "adding", ADDING)
    assert run_day(repo, syllabus, syllabus.day("1.1"), ["-q"]) == 0
    capsys.readouterr()
    assert shown() == "no exercise to fix: the last run did not name one"


# ---- crashes of pytest ----


class _Parses:
    """Garbage that parses when it is collected, like a future that logs its unread error with a traceback."""

    def __init__(self) -> None:
        self.circle = self

    def __del__(self) -> None:
        ast.parse("a = 1\nfor i in x:\n    pass")


def test_a_parse_succeeds_even_if_collected_garbage_parses_too() -> None:
    """Plain `ast.parse` fails here up to Python 3.11.7 and 3.12.1, and pytest reports INTERNALERROR."""
    source = "\n".join(f"def f{i}(x):\n    return [x + {i}, (x, {i}, [x])]" for i in range(1000))
    for _ in range(5):
        garbage = [_Parses() for _ in range(50)]
        del garbage
        assert len(steady_parse(source).body) == 1000
    assert gc.isenabled()
    gc.collect()  # or it would disturb a parse of a later test


def test_parses_in_many_threads_leave_the_garbage_collector_on() -> None:
    threads = [threading.Thread(target=steady_parse, args=("a = 1\n" * 500,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()


CRASH = "    import os\n    import signal\n\n    os.kill(os.getpid(), signal.SIGSEGV)\n    return one\n"


@pytest.mark.parametrize("isolated", [False, True])
def test_a_crash_of_python_names_the_signal_the_test_and_its_exercise(
    repo: Repo, isolated: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("    return sum((one, other))\n", CRASH))
    assert run_day(repo, syllabus, syllabus.day("1.1"), [], isolated=isolated) == 128 + signal.SIGSEGV
    assert capfd.readouterr().out.splitlines()[-4:] == [
        "SIGSEGV ended Python in test_task_1_two_and_three",
        "the test is about 1.1.1 add. MLX does not check indices: an index out of range can crash.",
        "MLX is lazy, so the traceback may point past the mistake: read add in adding.py",
        "try again: pdm run test 1.1.1 -x; pdm run hint 1.1.1",
    ]


def test_a_crash_while_a_file_is_read_names_the_file(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", f"{ADDING}\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 128 + signal.SIGSEGV
    out = capfd.readouterr().out
    assert out.endswith("SIGSEGV ended Python while importing tests_refsol/test_week_1_day_1.py\n")


# ---- many failures ----


def test_the_first_failure_of_the_first_exercise_is_shown_last(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    many = "\n\n@pytest.mark.parametrize('x', range(60))\ndef test_task_2_many(x: int) -> None:\n"
    many += '    """Oracle: by hand."""\n    print("value", x)\n    assert double(x) == 2 * x\n'
    replace(suite(repo, 2), "from tiny_llm.counting", "import pytest\nfrom tiny_llm.counting")
    suite(repo, 2).write_text(suite(repo, 2).read_text("utf-8") + many, "utf-8")
    write(repo, "counting", COUNTING.replace("return add(self.value, 1)", "return add(self.value, 2)"))
    write(repo, "doubling", DOUBLING.replace("add(x, x)", "x - 1"))
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert "  test_task_2_many (60)\n" in out
    last = out[out.index("___ test_task_1_counts ___") :]
    assert "assert [counter.count(), counter.count()] == [1, 2]" in last
    assert "test_task_2_many" not in last
    assert len(last.splitlines()) < MAX_LINES
    assert len(out.splitlines()) < 2 * MAX_LINES
    assert run_day(repo, syllabus, syllabus.day("1.2"), ["--tb=short"]) == 1
    assert capfd.readouterr().out.count("assert double(x) == 2 * x") == 60


def test_a_long_failure_keeps_its_start_its_end_and_the_output() -> None:
    failure = "\n".join(f"line {number}" for number in range(200))
    printed = "\n".join(f"said {number}" for number in range(20))
    shown = lines_of(failure, printed)
    assert len(shown) == MAX_LINES - 1, "and a title"
    assert (shown[0], shown[-1]) == ("line 0", "said 19")
    assert "line 199" in shown
    [gap] = [line for line in shown if line.startswith("...")]
    lines = [line for line in shown if line.startswith("line ")]
    assert gap == f"... {200 - len(lines)} lines (-x shows them)"
    assert lines_of("one\ntwo", "") == ["one", "two"]


def test_an_example_of_hypothesis_is_shown_with_its_values(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the installed plugins (schemathesis) would print the example without its values."""
    syllabus = syllabus_of(repo)
    drawn = "\n\n@given(x=st.integers(3, 30))\ndef test_task_1_any(x: int) -> None:\n"
    drawn += '    """Oracle: by hand."""\n    assert add(x, 1) == x + 1\n'
    replace(
        suite(repo, 1),
        "from tiny_llm",
        "from hypothesis import given\nimport hypothesis.strategies as st\nfrom tiny_llm",
    )
    suite(repo, 1).write_text(suite(repo, 1).read_text("utf-8") + drawn, "utf-8")
    write(repo, "adding", ADDING.replace("sum((one, other))", "5"))
    assert run_day(repo, syllabus, syllabus.day("1.1"), ["-k", "any"]) == 1
    out = capfd.readouterr().out
    assert "x=3," in out or "x=5," in out


# ---- the cause of a failure ----


def failing(*tests: str, number: int = 2) -> Outcome:
    return Outcome(1, tuple(f"tests_refsol/test_week_1_day_{number}.py::{test}" for test in tests))


def test_the_cause_may_be_in_another_exercise_than_the_one_that_fails(repo: Repo) -> None:
    """Task 2's test calls task 1, whose own tests pass; the search finds it."""
    syllabus = syllabus_of(repo)
    day = syllabus.day("1.2")
    replace(suite(repo, 2), "double(4) == 8", "double(4) == 8 and Counter().count() == 1")
    replace(suite(repo, 2), "== [1, 2]", "!= [0, 0]")
    write(repo, "counting", COUNTING.replace("        return self.value\n", "        return 7\n", 1))
    write(repo, "doubling", DOUBLING)
    found = find_blame(repo, syllabus_of(repo), day, failing("test_task_2_doubles"))
    assert found.today
    assert found.exercise is not None
    assert found.exercise.id == "1.2.1"
    line = first_to_fix(failing("test_task_2_doubles"), day, found.exercise)
    assert str(line) == (
        "first: 1.2.1 Counter.count (1 of 1.2.2's tests fails): pdm run test 1.2.2 -x; pdm run hint 1.2.1"
    )


def test_a_fault_outside_of_the_exercises_is_reported(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blame, "SHORTEST", blame.LONGEST)  # on a busy machine the search takes longer
    syllabus = syllabus_of(repo)
    write(repo, "counting", COUNTING.replace("self.value = 0", "self.value = 3"))
    write(repo, "doubling", DOUBLING)
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    assert "in several exercises, or outside of the exercises" in capfd.readouterr().out


SOMETIMES = """from collections.abc import Callable
from pathlib import Path


class Counter:
    def __init__(self) -> None:
        self.value = 0
        self.runs = Path({runs!r})

    def count(self) -> int:
        self.runs.write_text(self.runs.read_text() + "x")
        self.value += 1 if len(self.runs.read_text()) > 1 else 7
        return self.value
"""


def test_code_that_fails_only_sometimes_is_reported(
    repo: Repo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The search must not say that today's code is correct, or that another module is the cause."""
    runs = tmp_path / "runs"
    runs.write_text("")
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING)
    write(repo, "counting", SOMETIMES.format(runs=str(runs)))
    write(repo, "doubling", DOUBLING)
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert "test_task_1_counts fails only sometimes: the same code passed when it ran again" in out
    assert "today's code is correct" not in out
    assert "together do" not in out


def test_unrelated_modules_are_not_tried(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Day 1.1 does not use the other modules, so one run finds the exercise."""
    runs = counted_runs(monkeypatch)
    write(repo, "adding", ADDING.replace("sum((one, other))", "5"))
    write(repo, "counting", COUNTING)
    write(repo, "doubling", DOUBLING)
    replace(suite(repo, 1), "== 5", "== 5 and add(1, 1) == 2")
    found = find_blame(
        repo, syllabus_of(repo), syllabus_of(repo).day("1.1"), failing("test_task_1_two_and_three", number=1)
    )
    assert found.exercise is not None
    assert len(runs) == 1


def test_results_of_the_search_are_cached_until_a_file_changes(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted_runs(monkeypatch)
    write(repo, "counting", COUNTING.replace("return self.value\n", "return 7\n", 1))
    write(repo, "doubling", DOUBLING)
    day, outcome = syllabus_of(repo).day("1.2"), failing("test_task_1_counts")
    first = find_blame(repo, syllabus_of(repo), day, outcome)
    made = len(runs)
    assert find_blame(repo, syllabus_of(repo), day, outcome) == first
    assert len(runs) == made
    write(repo, "doubling", f"{DOUBLING}# changed\n")
    find_blame(repo, syllabus_of(repo), day, outcome)
    assert len(runs) > made


def test_the_search_stops_after_its_time_limit_and_says_so(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blame, "LONGEST", 0.0)
    syllabus = syllabus_of(repo)
    write(repo, "counting", COUNTING.replace("return self.value\n", "return 7\n", 1))
    write(repo, "doubling", DOUBLING)
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    assert "the search for the exercise stopped after 0 s" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("took", "limit"), [(0.0, 20.0), (2.0, 20.0), (4.0, 20.0), (13.0, 65.0), (24.0, 120.0), (300.0, 120.0)]
)
def test_the_search_may_take_as_long_as_five_runs_within_limits(took: float, limit: float) -> None:
    assert blame.time_for(Outcome(1, seconds=took)) == limit


def test_the_search_has_more_time_after_a_slow_run(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "SHORTEST", 0.0)
    write(repo, "counting", COUNTING.replace("return self.value\n", "return 7\n", 1))
    write(repo, "doubling", DOUBLING)
    day, outcome = syllabus_of(repo).day("1.2"), failing("test_task_1_counts")
    stopped = find_blame(repo, syllabus_of(repo), day, outcome)
    assert (stopped.exercise, stopped.stopped_after) == (None, 0.0)
    found = find_blame(repo, syllabus_of(repo), day, dataclasses.replace(outcome, seconds=60.0))
    assert found.exercise is not None
    assert (found.exercise.id, found.stopped_after) == ("1.2.1", None)


def test_a_run_measures_how_long_it_took(repo: Repo) -> None:
    write(repo, "adding", ADDING)
    start = time.monotonic()
    outcome = run_suite_of(repo, syllabus_of(repo).day("1.1"), ["-q"], "", 30.0)
    assert 0 < outcome.seconds <= time.monotonic() - start


def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    runs: list[object] = []

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        runs.append(arguments)
        return run_suites(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(blame, "run_suites", run)
    return runs


# ---- plugins ----


def test_a_run_imports_only_the_plugins_that_it_needs(repo: Repo) -> None:
    """Importing all installed pytest plugins would take longer than the tests of a day."""
    write(repo, "adding", ADDING)
    used = "\n\ndef test_task_1_plugins() -> None:\n" + '    """Oracle: by hand."""\n    import sys\n'
    used += "    assert not {'schemathesis', 'xdist', 'anyio', 'hypothesis'} & sys.modules.keys()\n"
    suite(repo, 1).write_text(suite(repo, 1).read_text("utf-8") + used, "utf-8")
    run = run_suites(repo, [suite(repo, 1)], quiet=True)
    assert run.returncode == 0, run.stdout
