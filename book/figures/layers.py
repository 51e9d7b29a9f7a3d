"""The figure of the packages: what each one does, and what it imports.

`IMPORTS` is the import table in ARCHITECTURE.md; a test checks that the two are equal.
"""

from typing import NamedTuple

from .drawing import Drawing, Point

IMPORTS = {
    "tiny_llm_kernels": (),
    "tiny_llm_checkpoints": ("tiny_llm_kernels",),
    "tiny_llm_ref": ("tiny_llm_kernels", "tiny_llm_checkpoints"),
    "tiny_llm": ("tiny_llm_ref",),
    "tiny_llm_server": ("tiny_llm", "tiny_llm_checkpoints"),
    "tiny_llm_routing": ("tiny_llm",),
    "tiny_llm_cluster": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_server", "tiny_llm_routing"),
    "tiny_llm_course": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_kernels"),
    "tiny_llm_cli": (
        "tiny_llm",
        "tiny_llm_checkpoints",
        "tiny_llm_server",
        "tiny_llm_cluster",
        "tiny_llm_course",
    ),
    "benches": (
        "tiny_llm",
        "tiny_llm_checkpoints",
        "tiny_llm_kernels",
        "tiny_llm_routing",
        "tiny_llm_cluster",
        "tiny_llm_course",
        "tiny_llm_cli",
    ),
    "labs": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_course", "tiny_llm_cli"),
    "book": ("tiny_llm_ref", "tiny_llm_checkpoints", "tiny_llm_course", "tiny_llm_cli"),
}

# Imports drawn as a straight arrow down, by the x coordinate of the arrow. All others are drawn as arrows
# sideways, as arrows around the stack to the overlay, or as small labels.
DOWN = {
    ("benches", "tiny_llm_cli"): 175,
    ("labs", "tiny_llm_cli"): 430,
    ("book", "tiny_llm_course"): 685,
    ("tiny_llm_cli", "tiny_llm_server"): 240,
    ("tiny_llm_cli", "tiny_llm_cluster"): 430,
    ("tiny_llm_server", "tiny_llm"): 175,
    ("tiny_llm_cluster", "tiny_llm_routing"): 430,
    ("tiny_llm_routing", "tiny_llm"): 430,
    ("tiny_llm_course", "tiny_llm"): 685,
    ("tiny_llm", "tiny_llm_ref"): 430,
    ("tiny_llm_ref", "tiny_llm_kernels"): 240,
    ("tiny_llm_ref", "tiny_llm_checkpoints"): 622,
}
LEFT, RIGHT, OUTSIDE = 60, 800, 32  # edges of the stack, and the distance of the outer arrows from it
SIDEWAYS = [("tiny_llm_checkpoints", "tiny_llm_kernels"), ("tiny_llm_cluster", "tiny_llm_server")]
AROUND = {"benches": LEFT, "tiny_llm_cli": LEFT}


class Package(NamedTuple):
    """A package: its position in the figure, and one line about it."""

    name: str
    summary: str
    x: float
    y: float
    width: float
    style: str = "panel"
    height: float = 76

    @property
    def middle(self) -> float:
        """The y coordinate of its middle."""
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        """The y coordinate of its lower edge."""
        return self.y + self.height


PACKAGES = {
    package.name: package
    for package in (
        Package("benches", "one question each", LEFT, 8, 230, height=100),
        Package("labs", "experiments of the course", 315, 8, 230, height=100),
        Package("book", "chapters, and their builder", 570, 8, 230, height=100),
        Package("tiny_llm_cli", "the tiny-llm command", LEFT, 132, 475),
        Package("tiny_llm_server", "OpenAI's API over HTTP", LEFT, 244, 230),
        Package("tiny_llm_cluster", "replicas on Ray Serve", 315, 244, 230),
        Package("tiny_llm_course", "syllabus, starters, tests, hints", 570, 244, 230),
        Package("tiny_llm_routing", "which replica runs a request", 315, 356, 230, height=58),
        Package(
            "tiny_llm", "overlay: the learner's modules, else the reference's", LEFT, 450, 740, "green", 58
        ),
        Package("tiny_llm_ref", "reference: the complete engine, flat", LEFT, 544, 740, "blue", 58),
        Package("tiny_llm_kernels", "MLX operators in C++ for the CPU", LEFT, 638, 355, "orange", 58),
        Package("tiny_llm_checkpoints", "readers of model files", 445, 638, 355, "teal", 58),
    )
}


def draw() -> str:
    """Return the figure as SVG."""
    figure = Drawing(
        860,
        734,
        "The packages of tiny-llm and their imports",
        "An arrow points from a package to one that it imports. "
        + " ".join(f"{name} imports {', '.join(uses) or 'none of them'}." for name, uses in IMPORTS.items()),
    )
    for points in _arrows():
        figure.arrow(points)
    for package in PACKAGES.values():
        _draw_package(figure, package)
    figure.label(LEFT, 722, "Arrows and small labels: imports.", "small")
    return figure.svg()


def _draw_package(figure: Drawing, package: Package) -> None:
    figure.box(*package[2:5], package.height, package.style, [package.name, package.summary])
    rows = _rows(_labels(package.name), package.width - 28)
    for row, names in enumerate(rows):
        x, y = package.x + 14, package.bottom - 27 - 24 * (len(rows) - 1 - row)
        for name in names:
            style = PACKAGES[name].style
            figure.chip(x, y, _width(name), "zone" if style == "panel" else style, _short(name))
            x += _width(name) + 8


def _rows(names: list[str], width: float) -> list[list[str]]:
    """The labels in rows that fit into a width."""
    rows: list[list[str]] = [[]]
    for name in names:
        if rows[-1] and sum(_width(one) + 8 for one in (*rows[-1], name)) > width + 8:
            rows.append([])
        rows[-1].append(name)
    return rows


def _short(name: str) -> str:
    return name.removeprefix("tiny_llm_")


def _width(name: str) -> int:
    return 8 * len(_short(name)) + 16


def _labels(name: str) -> list[str]:
    """The imports of a package that are drawn as labels."""
    drawn = {lower for upper, lower in [*DOWN, *SIDEWAYS] if upper == name}
    around = {"tiny_llm"} if name in AROUND else set()
    return [imported for imported in IMPORTS[name] if imported not in drawn | around]


def _arrows() -> list[list[Point]]:
    """Every import that is drawn as an arrow, as its points."""
    down = [_down(upper, lower, x) for (upper, lower), x in DOWN.items()]
    sideways = [_sideways(right, left) for right, left in SIDEWAYS]
    return [*down, *sideways, *(_around(name, edge) for name, edge in AROUND.items())]


def _down(upper: str, lower: str, x: float) -> list[Point]:
    return [(x, PACKAGES[upper].bottom), (x, PACKAGES[lower].y - 2)]


def _sideways(right: str, left: str) -> list[Point]:
    y = PACKAGES[left].middle
    return [(PACKAGES[right].x, y), (PACKAGES[left].x + PACKAGES[left].width + 2, y)]


def _around(name: str, edge: float) -> list[Point]:
    """The points of an arrow from a package around the stack's edge to the overlay."""
    away = -1 if edge == LEFT else 1
    start, end = PACKAGES[name].middle, PACKAGES["tiny_llm"].middle
    outside = edge + away * OUTSIDE
    return [(edge, start), (outside, start), (outside, end), (edge + away * 2, end)]
