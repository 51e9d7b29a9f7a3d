"""The rules of `course-check` for chapters: a complete one has no problems, each violation is reported."""

import pytest

from tiny_llm_course.chapters import chapter_problems
from tiny_llm_course.problem import Problem
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import start
from tiny_llm_course.views import tasks
from toy_course import replace, repo, syllabus_of

__all__ = ["repo"]

CHAPTER = """# 1.2 Counting

## Where we are
## The problem
## The idea
## Invariants
## Tasks

`pdm run start 1.2`

{{may_use 1.2}}

{{task 1.2.1}}

{{task 1.2.2}}

`pdm run test 1.2`

## The tempting wrong version

```python
count = count + 1
```

## Run it

`pdm run try 1.2`

## How others do it
## Questions
## Readings
## Solutions

{{solutions 1.2}}
"""


@pytest.fixture
def book(repo: Repo) -> Repo:
    """The toy course with a chapter for day 1.2."""
    repo.chapters.mkdir(parents=True)
    (repo.chapters / "counting.md").write_text(CHAPTER)
    (repo.chapters / "SUMMARY.md").write_text("- [1.2](counting.md)\n")
    replace(repo.syllabus, 'title = "Counting"', 'title = "Counting"\nchapter = "counting.md"')
    return repo


def problems(book: Repo, day: str = "1.2") -> list[Problem]:
    return list(chapter_problems(book, syllabus_of(book).day(day)))


def change(book: Repo, old: str, new: str) -> None:
    replace(book.chapters / "counting.md", old, new)


def test_a_complete_chapter_has_no_problems(book: Repo) -> None:
    assert problems(book) == []


def test_a_day_without_a_chapter_has_no_problems(book: Repo) -> None:
    assert problems(book, "1.1") == []


def test_a_chapter_that_does_not_exist_is_reported(book: Repo) -> None:
    (book.chapters / "counting.md").unlink()
    (found,) = problems(book)
    assert found.what == "book/src/counting.md does not exist"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("# 1.2 Counting", "# 1.2 Counts", "starts with '# 1.2 Counts', expected '# 1.2 Counting'"),
        ("## Invariants\n", "", "has no section 'Invariants'"),
        ("## Readings\n", "## Readings\n## Invariants\n", "has the sections"),
        ("{{task 1.2.2}}", "", "shows the tasks 1.2.1, expected 1.2.1, 1.2.2"),
        (
            "{{task 1.2.1}}\n\n{{task 1.2.2}}",
            "{{task 1.2.2}}\n\n{{task 1.2.1}}",
            "shows the tasks 1.2.2, 1.2.1",
        ),
        ("{{solutions 1.2}}", "", "must be in the section 'Solutions'"),
        (
            "## Readings",
            "{{solutions 1.2}}\n## Readings",
            "must be in the section 'Solutions', and nowhere else",
        ),
        ("{{may_use 1.2}}", "", "the section of day 1.2 has no {{may_use 1.2}}"),
        ("pdm run start 1.2", "pdm run start", "the section of day 1.2 has no pdm run start 1.2"),
        ("pdm run test 1.2", "pdm run test", "the section of day 1.2 has no pdm run test 1.2"),
        ("pdm run try 1.2", "pdm run try", "does not name `pdm run try 1.2`"),
        (
            "count = count + 1",
            "return add(x, x)",
            "shows code of double before the solutions: return add(x, x)",
        ),
    ],
)
def test_a_violation_is_reported(book: Repo, old: str, new: str, what: str) -> None:
    change(book, old, new)
    assert any(what in problem.what for problem in problems(book)), problems(book)
    assert all(problem.where == "book/src/counting.md" for problem in problems(book))


def test_a_chapter_must_be_in_the_summary(book: Repo) -> None:
    (book.chapters / "SUMMARY.md").write_text("# Summary\n")
    (found,) = problems(book)
    assert found.what == "SUMMARY.md does not list it"


def test_a_chapter_must_name_the_labs_of_its_day(book: Repo) -> None:
    book.labs.mkdir(exist_ok=True)
    (book.labs / "lab_sheep.py").write_text('"""1.2: How many sheep fall asleep."""\n')
    (found,) = problems(book)
    assert found.what == "does not name `pdm run lab sheep`"


def test_a_solution_of_several_lines_is_given_away_by_two_of_them_in_a_row(book: Repo) -> None:
    change(book, "count = count + 1", "count = count + 1\nself.value = self._next()")
    assert problems(book) == []
    change(book, "\nself.value", "\n    self.value")
    change(book, "self._next()", "self._next()\n    return self.value")
    (found,) = problems(book)
    assert "shows code of Counter.count before the solutions: self.value = self._next()" in found.what


def test_blanks_and_the_list_of_tasks_name_the_chapter(book: Repo) -> None:
    start(book, syllabus_of(book).day("1.2"))
    blank = (book.overlay / "doubling.py").read_text()
    assert 'NotImplementedError("1.2.2 double: book/src/counting.md#task-2")' in blank
    listed = tasks(book, syllabus_of(book).unit("1.2"))
    assert "chapter: book/src/counting.md, in a browser: pdm run book serve 1.2" in listed


def test_without_a_chapter_a_blank_names_the_hint(book: Repo) -> None:
    start(book, syllabus_of(book).day("1.1"))
    assert "pdm run hint 1.1.1" in (book.overlay / "adding.py").read_text()
    assert "not written yet" in tasks(book, syllabus_of(book).unit("1.1"))
