"""The learner's files: moved aside and restored, helper files, changes, editor links, ignored by git."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course import views
from tiny_llm_course.backups import backups
from tiny_llm_course.errors import CourseError
from tiny_llm_course.overview import progress_text
from tiny_llm_course.progress import remember
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import restore, set_aside, start
from tiny_llm_course.testing import run_day
from toy_course import ADDING, COUNTING, DOUBLING, ROOT, replace, repo, run, syllabus_of, write

__all__ = ["repo"]


def test_restore_brings_back_the_newest_copy_and_a_second_restore_undoes_it(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    for text in ("first", "second"):
        write(repo, "counting", f"x = '{text}'\n")
        set_aside(repo, day)
    assert restore(repo, day) == [repo.overlay / "counting.py"]
    assert (repo.overlay / "counting.py").read_text("utf-8") == "x = 'second'\n"
    write(repo, "counting", "x = 'third'\n")
    restore(repo, day)
    assert (repo.overlay / "counting.py").read_text("utf-8") == "x = 'first'\n"
    restore(repo, day)
    assert (repo.overlay / "counting.py").read_text("utf-8") == "x = 'third'\n"
    backups = {file.read_text("utf-8") for file in repo.overlay.rglob("*.bak")}
    assert backups == {"x = 'first'\n"}, "nothing is lost"
    assert restore(repo, syllabus_of(repo).day("1.1")) == []


def versions(repo: Repo) -> list[str]:
    """The backups of counting.py, the oldest first."""
    return [file.read_text("utf-8").strip() for file in backups(repo.overlay / "counting.py")]


def test_the_five_newest_versions_of_each_file_are_kept(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    for number in range(12):
        write(repo, "counting", f"{number}\n")
        write(repo, "doubling", "x = 1\n")
        set_aside(repo, day)
    assert versions(repo) == ["7", "8", "9", "10", "11"]
    write(repo, "counting", "now\n")
    for expected in ("11\n", "now\n"):
        restore(repo, day)
        assert (repo.overlay / "counting.py").read_text("utf-8") == expected
    assert versions(repo) == ["7", "8", "9", "10", "11"]
    assert [file.name for file in repo.overlay.iterdir() if file.suffix == ".bak"] == []


def test_blank_starters_do_not_displace_older_work_from_the_backups(repo: Repo) -> None:
    """Each `start --again` makes a backup, and most of these are the same blank file."""
    day = syllabus_of(repo).day("1.2")
    write(repo, "counting", "mine\n")
    for _ in range(12):
        set_aside(repo, day)
        start(repo, day)
    assert versions(repo)[0] == "mine"
    assert len(versions(repo)) == 2


def test_a_learners_helper_file_is_not_a_module(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "my_tools", "def plus(a: int, b: int) -> int:\n    return a + b\n")
    own = ADDING.replace("sum((one, other))", "plus(one, other)")
    write(repo, "adding", own.replace('"""Sums."""\n', '"""Sums."""\n\nfrom .my_tools import plus\n'))
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 0
    assert run_day(repo, syllabus, syllabus.day("1.1"), [], isolated=True) == 0, (
        "helper files are copied with the modules"
    )
    write(repo, "my_tools", "def plus(a: int, b: int) -> int:\n    return a - b\n")
    assert "my_tools.py changed since its tests ran" in progress_text(repo, syllabus)
    for editors in (".#adding", "#adding", ".adding"):
        write(repo, editors, "")
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 1, (
        "and they do not count for the engine either"
    )
    write(repo, "tools", "")
    with pytest.raises(
        CourseError, match=r"tools\.py does not replace any module of the engine \(name your own helper"
    ):
        run_day(repo, syllabus, syllabus.day("1.1"), [])


def test_progress_names_the_file_that_has_changed(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    for module, source in (("adding", ADDING), ("counting", COUNTING), ("doubling", DOUBLING)):
        write(repo, module, source)
    for day in syllabus.days[:2]:
        remember(repo, day, passed=True)
    write(repo, "adding", f"{ADDING}# mine\n")
    rows = progress_text(repo, syllabus).splitlines()
    says = "adding.py changed since its tests ran: pdm run test 1.2"
    assert says in rows[1], "the changed file belongs to another day"
    write(repo, "doubling", f"{DOUBLING}# mine\n")
    assert "adding.py and 1 more changed since its tests ran" in progress_text(repo, syllabus)


@pytest.mark.parametrize("wanted", ["1.2.1", "counting", "counting.py", "src/tiny_llm/counting.py", "1.2"])
def test_a_day_may_be_named_by_an_exercise_or_a_file_of_it(repo: Repo, wanted: str) -> None:
    assert syllabus_of(repo).to_start(wanted).id == "1.2"


@pytest.mark.parametrize("wanted", ["1", "1.9.1", "count", "x.py", ""])
def test_an_unknown_day_is_reported(repo: Repo, wanted: str) -> None:
    with pytest.raises(CourseError, match="pdm run map"):
        syllabus_of(repo).to_start(wanted)


def test_start_and_a_passing_day_name_the_days_labs(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    (repo.root / "labs").mkdir()
    for name, docstring in (("sums", "1.1: What a sum costs."), ("other", "1.2: Something else.")):
        (repo.root / "labs" / f"lab_{name}.py").write_text(f'"""{docstring}"""\n', "utf-8")
    syllabus = syllabus_of(repo)
    assert views.tasks(repo, syllabus.day("1.1")).splitlines()[-1] == "lab:     pdm run lab sums"
    write(repo, "adding", ADDING)
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 0
    shown = capfd.readouterr().out
    assert "  pdm run lab sums       an experiment: predict a number, then measure it\n" in shown


def test_reset_and_restore_are_commands(tmp_path: Path) -> None:
    assert "wrote" in run(["start", "1.1.2"], tmp_path).stdout
    before = (tmp_path / "attention.py").read_text("utf-8")
    assert run(["reset", "attention.py"], tmp_path).returncode == 0
    restored = run(["restore", "1.1"], tmp_path)
    assert restored.stdout == f"restored: {tmp_path}/attention.py\n", restored.stderr
    assert (tmp_path / "attention.py").read_text("utf-8") == before


@pytest.mark.parametrize("arguments", [["reset"], ["restore"], ["start", "--again"]])
def test_a_command_that_moves_whole_files_refuses_a_single_exercise(
    tmp_path: Path, arguments: list[str]
) -> None:
    run(["start", "1.1"], tmp_path)
    before = (tmp_path / "attention.py").read_text("utf-8")
    done = run([*arguments, "1.1.2"], tmp_path)
    assert done.stderr == "error: 1.1.2 is one exercise; this command takes a day or a part, such as 1.1\n"
    assert (done.returncode, (tmp_path / "attention.py").read_text("utf-8")) == (1, before)


@pytest.mark.parametrize("command", [["progress"], ["test", "1.1"], ["skip", "1.1"]])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "attention.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    done = run(command, tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"error: {tmp_path / 'attention.py'} is not UTF-8 text" in done.stderr


def test_a_function_that_a_demonstration_misses_is_named(tmp_path: Path) -> None:
    run(["start", "1.1"], tmp_path)
    run(["skip", "1.1"], tmp_path)
    file = tmp_path / "attention.py"
    file.write_text(file.read_text("utf-8").replace("def softmax(", "def my_softmax("), "utf-8")
    done = run(["try", "1.1"], tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"{file}, line" in done.stderr
    assert "softmax" in done.stderr


def test_an_exit_in_a_learners_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "attention.py").write_text("raise SystemExit\n")
    done = run(["try", "1.1"], tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path / 'attention.py'}, line 1: SystemExit" in done.stderr


def test_git_ignores_the_learners_files() -> None:
    """Modules, backups, stubs, kernels and libraries are ignored; the package itself is not."""
    names = [
        "attention.py",
        ".backups/attention.py.1.bak",
        "my_tools.py",
        "norm.pyi",
        "quantized_matmul.cpp",
        "_kernels.so",
    ]
    paths = [f"src/tiny_llm/{name}" for name in [*names, "__init__.py", "py.typed"]]
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, text=True, capture_output=True, check=False
    )
    if found.returncode == 128:
        pytest.skip("no git checkout")
    assert found.stdout.split() == paths[: len(names)]


def test_the_doctor_accepts_a_starter_without_removed_helpers(repo: Repo) -> None:
    from tiny_llm_course.doctor import examine

    replace(repo.syllabus, "Counter._next", "Counter.next")
    replace(repo.reference / "counting.py", "_next", "next")
    start(repo, syllabus_of(repo).day("1.2"))
    assert all(finding.ok for finding in examine(repo, syllabus_of(repo)) if finding.what == "counting.py")


# ---- links for editors ----


def test_start_links_every_module_that_the_learner_has_not_written(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    done = start(repo, syllabus.day("1.2"))
    assert views.start_report(repo, syllabus.day("1.2"), done)[-1] == views.LINKS
    links = {file.name: file.resolve() for file in repo.overlay.glob("*.pyi")}
    assert links == {f"{name}.pyi": repo.reference / f"{name}.py" for name in ("adding", "api")}
    done = start(repo, syllabus.day("1.1"))
    assert views.LINKS not in views.start_report(repo, syllabus.day("1.1"), done), "only new links are named"
    assert [file.name for file in repo.overlay.glob("*.pyi")] == ["api.pyi"]
    set_aside(repo, syllabus.day("1.2"))
    assert len(list(repo.overlay.glob("*.pyi"))) == 3, "the modules are the reference's again"
    restore(repo, syllabus.day("1.2"))
    assert [file.name for file in repo.overlay.glob("*.pyi")] == ["api.pyi"]


def test_a_type_checker_resolves_the_references_modules_without_duplicate_classes(repo: Repo) -> None:
    """Without the links, mypy says "Cannot find implementation or library stub for module ...adding"."""
    start(repo, syllabus_of(repo).day("1.2"))
    write(repo, "counting", COUNTING.replace("add(self.value, 1)", 'add(self.value, "1")'))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "-p", "tiny_llm.counting"],
        cwd=repo.root / "src",
        env={**os.environ, "MYPYPATH": str(repo.root / "src")},
        text=True,
        capture_output=True,
        check=False,
    )
    found = [line for line in checked.stdout.splitlines() if "counting.py" in line]
    assert len(found) == 1, checked.stdout
    assert 'Argument 2 to "add" has incompatible type "str"; expected "int"' in found[0]


def test_an_editor_resolves_the_references_modules(repo: Repo) -> None:
    """Editors run pyright, which reads the links as mypy does."""
    if (pyright := shutil.which("basedpyright") or shutil.which("pyright")) is None:
        pytest.skip("neither basedpyright nor pyright is installed")
    start(repo, syllabus_of(repo).day("1.2"))
    write(repo, "counting", COUNTING.replace("add(self.value, 1)", 'add(self.value, "1")'))
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, "tiny_llm/counting.py"]
    checked = subprocess.run(
        command, cwd=repo.root / "src", text=True, capture_output=True, check=False, timeout=300
    )
    unresolved = {"reportMissingImports", "reportAttributeAccessIssue"}  # a missing source is a warning
    rules = {found.get("rule") for found in json.loads(checked.stdout)["generalDiagnostics"]}
    assert rules & {*unresolved, "reportArgumentType"} == {"reportArgumentType"}, checked.stdout
