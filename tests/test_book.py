"""The book as it is committed: it builds, its links, commands and numbers are sound, its examples run."""

import doctest
import re
from pathlib import Path

import pytest

import tiny_llm_kernels
from book_pages import ROOT, mdbook_build
from checks.commands import Checker, command_problems
from checks.links import link_problems
from checks.numbers import claims, number_problems
from preprocessor.results import FOLDER, read, runs

SOURCES = ROOT / "book" / "src"
CHAPTERS = sorted(str(file.relative_to(SOURCES)) for file in SOURCES.rglob("*.md"))
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built book."""
    target = tmp_path_factory.mktemp("html")
    ended = mdbook_build(ROOT / "book", target)
    assert ended.returncode == 0, ended.stderr
    return target


def test_every_link_anchor_and_picture_of_the_book_exists(html: Path) -> None:
    assert link_problems(html) == []


def test_every_command_of_the_book_exists() -> None:
    assert command_problems(SOURCES) == []


def test_every_number_of_the_book_has_a_source() -> None:
    assert number_problems(SOURCES) == []


def test_the_summary_lists_every_chapter() -> None:
    listed = re.findall(r"\]\((.+?)\)", (SOURCES / "SUMMARY.md").read_text(encoding="utf-8"))
    assert sorted([*listed, "SUMMARY.md"]) == CHAPTERS


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_examples_of_a_chapter_print_what_it_says(chapter: str) -> None:
    """Its Python blocks with `>>>`, as one session from top to bottom."""
    text = (SOURCES / chapter).read_text(encoding="utf-8")
    blocks = [block for block in _PYTHON.findall(text) if ">>>" in block]
    if not tiny_llm_kernels.available():
        blocks = [block for block in blocks if "tiny_llm_kernels" not in block]
    session = "\n".join(blocks)
    test = doctest.DocTestParser().get_doctest(session, {}, chapter, chapter, 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert "".join(report) == ""


@pytest.mark.parametrize("name", runs())
def test_every_run_has_a_saved_result_of_the_same_command(name: str) -> None:
    saved = read(name)
    assert saved.command == runs()[name].command
    assert (saved.json is None) != (saved.output is None)
    assert saved.machine["processor"]


def test_the_first_try_that_the_setup_page_shows_is_the_code_that_its_run_tests() -> None:
    page = (SOURCES / "setup.md").read_text(encoding="utf-8")
    assert runs()["test_1_1_1"].writes["attention.py"] in _PYTHON.findall(page)


def test_no_result_is_left_without_a_run() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(runs())


def test_saved_results_name_no_temporary_folder_of_the_machine_that_made_them() -> None:
    for file in FOLDER.glob("*.json"):
        assert "/tmp" not in file.read_text(encoding="utf-8"), file.name


def test_a_mistake_in_a_chapter_stops_the_build_with_its_line(tmp_path: Path) -> None:
    for name in ("book.toml", "preprocessor", "figures", "interactive", "results", "theme"):
        (tmp_path / name).symlink_to(ROOT / "book" / name)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "SUMMARY.md").write_text("- [A](a.md)\n")
    (tmp_path / "src" / "a.md").write_text("# A\n\n{{code cheese.f}}\n")
    ended = mdbook_build(tmp_path, tmp_path / "html")
    assert ended.returncode != 0
    assert "error: book/src/a.md:3: {{code cheese.f}}: 'cheese.f' is not MODULE.NAME" in ended.stderr


# ---- the checks find what they are for ----


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="b.html">x</a>', "a.html: b.html does not exist"),
        ('<a href="#x">x</a>', "a.html: #x: a.html has no such anchor"),
        ('<a href="../../x">x</a>', "a.html: ../../x does not exist"),
        ('<a href="http://example.org/">x</a>', "a.html: http://example.org/ is not https"),
        (
            '<img src="https://example.org/x.png">',
            "a.html: https://example.org/x.png is loaded from the network",
        ),
        ('<p id="x"></p><p id="x"></p>', "a.html: the id 'x' is used twice"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, page: str, problem: str) -> None:
    (tmp_path / "a.html").write_text(page)
    assert link_problems(tmp_path) == [problem]


def test_links_to_pages_anchors_and_other_sites_are_sound(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "a.html").write_text('<a href="w/b.html#x">x</a><a href="https://example.org">y</a>')
    (tmp_path / "w" / "b.html").write_text('<h2 id="x"></h2><a href="../a.html">z</a><a href="#x">z</a>')
    assert link_problems(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        "pdm run start 3.2b",
        "pdm run start 3.1 --again",
        "pdm run test 3.1 -k fork",
        "pdm run hint 3.1.4",
        "pdm run hint 3.2b",
        "pdm run lab paged --json",
        "pdm run bench roofline",
        "pdm run book build",
        "tiny-llm generate --max-tokens 8 hello",
        "TINY_LLM_KERNELS=off pdm run try 3.1",
        "pdm run lab NAME",
    ],
)
def test_existing_commands_are_accepted(command: str) -> None:
    assert Checker.of_the_project().problems(command) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("pdm run cheese", "has no 'cheese'"),
        ("pdm run start 9.9", "there is no day 9.9"),
        ("pdm run start 3.2x", "has no part 'x'"),
        ("pdm run start 3.1 --cheese", "unknown option --cheese"),
        ("pdm run hint 3.1.99", "there is no exercise '3.1.99'"),
        ("pdm run lab cheese", "there is no lab 'cheese'"),
        ("pdm run bench cheese", "there is no bench 'cheese'"),
        ("tiny-llm cheese", "has no 'cheese'"),
        ("tiny-llm generate --cheese", "unknown option --cheese"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, problem: str) -> None:
    (found,) = Checker.of_the_project().problems(command)
    assert problem in found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 12 ms.", ["12 ms"]),
        ("a\n\nIt is 3.5x faster and saves 40%.", ["3.5x", "40%"]),
        ("17,978 rows and 64 MiB", ["17,978", "64 MiB"]),
    ],
)
def test_numbers_without_a_source_are_found(text: str, found: list[str]) -> None:
    assert [claim for _, claim in claims(text)] == found


@pytest.mark.parametrize(
    "text",
    [
        "Four requests of 10, 100 and 50 tokens hold 7 blocks of 16.",
        "{{calc 2 * 3}} ms, {{value a b}}%",
        "`12 ms`, $`40 \\%`$",
        "```console\n12 ms\n```",
        "<!-- given: 2,048 (the example) -->\n2,048 tokens",
        "[vLLM](https://example.org/40%25) on day 3.2",
    ],
)
def test_numbers_with_a_source_and_those_of_examples_are_accepted(text: str) -> None:
    assert claims(text) == []
