"""ARCHITECTURE.md, its figures and the pages of decisions: everything they name exists, and they agree.

Oracles: the folders and modules of the repository, and the scripts that draw the figures.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from figures import layers
from figures.files import drawn

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
DECISIONS = ROOT / "docs" / "decisions"
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PAGES = [ROOT / "ARCHITECTURE.md", *sorted(DECISIONS.glob("*.md"))]
NUMBERED = sorted(DECISIONS.glob("[0-9]*.md"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def rows(heading: str) -> Iterator[list[str]]:
    """The rows of the first table under a heading, as lists of cell texts, without the header row."""
    section = re.split(r"^#+ ", PAGE.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---- the page ----


def test_the_page_takes_at_most_fifteen_minutes_to_read() -> None:
    """Not counted: the definitions of links at the end, which are not shown."""
    shown = re.sub(r"^\[\d{4}\]: .*$", "", PAGE, flags=re.MULTILINE)
    assert len(shown.split()) <= 2500


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_points_to_a_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    definition = re.compile(r"^\[(\d{4})\]: (\S+)$", re.MULTILINE)
    defined = dict(definition.findall(text))
    used = re.findall(r"\[(\d{4})\](?!\()", definition.sub("", text))
    assert set(used) == set(defined)
    targets = [target for target in [*inline, *defined.values()] if "://" not in target]
    assert [target for target in targets if not (page.parent / target.partition("#")[0]).exists()] == []


def documented_interfaces() -> list[tuple[str, str]]:
    """The module and dotted name of each entry of "Interfaces"; `.name` belongs to the class before it."""
    entries = []
    for modules, interfaces, _ in rows("Interfaces"):
        owner = ""
        for code in in_code(interfaces):
            name = code.partition("(")[0]
            if not name.startswith("."):
                owner = name.partition(".")[0]
            full_name = owner + name if name.startswith(".") else name
            entries.append((" ".join(in_code(modules)), full_name))
    return entries


def defined_in(module: str) -> set[str]:
    """Functions, classes and methods, by dotted name, of the modules with this name in any package."""
    names = set()
    for file in (ROOT / "src").glob(f"*/{module}.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
                inner = node.body if isinstance(node, ast.ClassDef) else []
                functions = [one for one in inner if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
                names |= {f"{node.name}.{function.name}" for function in functions}
    return names


@pytest.mark.parametrize(("modules", "name"), documented_interfaces())
def test_every_interface_on_the_page_exists(modules: str, name: str) -> None:
    assert name in set[str]().union(*(defined_in(module) for module in modules.split()))


# ---- the figures ----


def test_the_table_of_imports_matches_the_figure() -> None:
    table = {in_code(name)[0]: set(in_code(imports)) for name, _, imports in rows("Packages")}
    assert table == {name: set(imports) for name, imports in layers.IMPORTS.items()}


def test_the_figure_shows_exactly_the_existing_packages() -> None:
    """Packages are the folders of `src` that hold Python, benches, labs and the book."""
    packages = {file.parent.name for file in (ROOT / "src").glob("*/__init__.py")}
    folders = {"benches", "labs", "book"}
    assert set(layers.PACKAGES) == set(layers.IMPORTS) == packages | folders
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_a_package_is_drawn_above_everything_that_it_imports() -> None:
    """So there is no cycle: the table lists packages from the bottom up."""
    order = list(layers.IMPORTS)
    for name, imports in layers.IMPORTS.items():
        assert all(order.index(imported) < order.index(name) for imported in imports)


@pytest.mark.parametrize("name", sorted(drawn()))
def test_the_committed_figures_equal_those_that_the_scripts_draw(name: str) -> None:
    """`pdm run figures` redraws them."""
    assert (ROOT / name).read_text(encoding="utf-8") == drawn()[name]


def test_no_figure_is_committed_that_no_script_draws() -> None:
    assert {name_of(file) for file in FIGURES.iterdir()} <= set(drawn())


@pytest.mark.parametrize("name", [name for name in drawn() if name.endswith(".svg")])
def test_figures_have_colours_for_light_and_dark_backgrounds(name: str) -> None:
    """Every CSS class with a colour in one scheme has a colour in the other."""
    style = drawn()[name].partition("<style>")[2].partition("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    coloured = re.compile(r"^(\S.*?) \{ (?:fill|stroke): #", re.MULTILINE)
    assert set(coloured.findall(light)) == set(coloured.findall(dark)) != set()


# ---- decisions ----


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    assert [int(file.name[:4]) for file in NUMBERED] == list(range(1, len(NUMBERED) + 1))
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    titles = [file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for file in NUMBERED]
    listed = re.findall(r"^\| (\d{4}) \| \[(.*)\]\((.*)\) \|$", index, re.MULTILINE)
    assert listed == [(file.name[:4], title, file.name) for file, title in zip(NUMBERED, titles, strict=True)]


@pytest.mark.parametrize("file", NUMBERED, ids=name_of)
def test_a_decision_has_context_choice_and_consequences(file: Path) -> None:
    parts = re.split(r"^## (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert parts[1::2] == ["Context", "Choice", "Consequence"]
    assert all(len(part.split()) > 5 for part in parts[2::2])


@pytest.mark.parametrize("file", NUMBERED, ids=name_of)
def test_every_decision_is_cited_on_the_page(file: Path) -> None:
    assert f"[{file.name[:4]}]" in PAGE
