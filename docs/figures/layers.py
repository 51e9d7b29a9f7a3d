"""The figure of the packages: what each is, and what it imports.

`IMPORTS` is the table that ARCHITECTURE.md prints; a test holds the two equal.
"""

from typing import NamedTuple

from drawing import Drawing, Point

IMPORTS = {
    "tiny_llm_kernels": (),
    "tiny_llm_checkpoints": (),
    "tiny_llm_ref": ("tiny_llm_kernels", "tiny_llm_checkpoints"),
    "tiny_llm": ("tiny_llm_ref",),
    "tiny_llm_server": ("tiny_llm", "tiny_llm_checkpoints"),
    "tiny_llm_course": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_kernels"),
    "tiny_llm_cli": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_server"),
    "benches": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_kernels", "tiny_llm_cli"),
    "labs": ("tiny_llm", "tiny_llm_checkpoints", "tiny_llm_course", "tiny_llm_cli"),
}

GROUND = {"tiny_llm_kernels": "orange", "tiny_llm_checkpoints": "teal"}
LEFT, RIGHT, BUS = 60, 800, 32  # edges of the stack, and how far outside of it the outer arrows run


class Package(NamedTuple):
    """A package's place in the figure, and one line of what it does."""

    name: str
    does: str
    x: float
    y: float
    width: float
    style: str = "panel"
    height: float = 76

    @property
    def middle(self) -> float:
        """The height of its middle."""
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height


PACKAGES = {
    package.name: package
    for package in (
        Package("benches", "one question each, figures as JSON", LEFT, 20, 355),
        Package("labs", "the book's experiments", 445, 20, 355),
        Package("tiny_llm_cli", "the tiny-llm command", LEFT, 132, 475),
        Package("tiny_llm_server", "OpenAI's API over HTTP", LEFT, 244, 355),
        Package("tiny_llm_course", "syllabus, starters, tests, hints", 445, 244, 355),
        Package(
            "tiny_llm", "overlay: the learner's modules, else the reference's", LEFT, 356, 740, "green", 58
        ),
        Package("tiny_llm_ref", "reference: the complete engine, flat", LEFT, 450, 740, "blue", 58),
        Package("tiny_llm_kernels", "MLX operators in C++ for the CPU", LEFT, 544, 355, "orange", 58),
        Package("tiny_llm_checkpoints", "what a model file says", 445, 544, 355, "teal", 58),
    )
}


def draw() -> str:
    """The figure as SVG."""
    figure = Drawing(
        860,
        640,
        "The packages of tiny-llm and their imports",
        "An arrow leads from a package to one that it imports. "
        + " ".join(f"{name} imports {', '.join(uses) or 'none of them'}." for name, uses in IMPORTS.items()),
    )
    for points in _arrows():
        figure.arrow(points)
    for package in PACKAGES.values():
        _draw_package(figure, package)
    figure.label(
        LEFT, 628, "Arrow: imports. Small labels: also imports this package of the ground level.", "small"
    )
    return figure.svg()


def _draw_package(figure: Drawing, package: Package) -> None:
    figure.box(*package[2:5], package.height, package.style, [package.name, package.does])
    x = package.x + 14
    if package.y > PACKAGES["tiny_llm_server"].y:
        return
    for name, style in GROUND.items():
        if name in IMPORTS[package.name]:
            short = name.removeprefix("tiny_llm_")
            width = 8 * len(short) + 16
            figure.chip(x, package.bottom - 27, width, style, short)
            x += width + 8


def _arrows() -> list[list[Point]]:
    """Every import that is drawn as an arrow."""
    down = [
        ("benches", "tiny_llm_cli", 240),
        ("labs", "tiny_llm_cli", 490),
        ("labs", "tiny_llm_course", 670),
        ("tiny_llm_cli", "tiny_llm_server", 240),
        ("tiny_llm_server", "tiny_llm", 240),
        ("tiny_llm_course", "tiny_llm", 622),
        ("tiny_llm", "tiny_llm_ref", 430),
        ("tiny_llm_ref", "tiny_llm_kernels", 240),
        ("tiny_llm_ref", "tiny_llm_checkpoints", 622),
    ]
    arrows = [_down(upper, lower, x) for upper, lower, x in down]
    return [*arrows, _around("benches", LEFT), _around("tiny_llm_cli", LEFT), _around("labs", RIGHT)]


def _down(upper: str, lower: str, x: float) -> list[Point]:
    return [(x, PACKAGES[upper].bottom), (x, PACKAGES[lower].y - 2)]


def _around(name: str, edge: float) -> list[Point]:
    """From a package around the stack's edge to the overlay."""
    outside = edge - BUS if edge == LEFT else edge + BUS
    overlay = PACKAGES["tiny_llm"]
    end = edge - 2 if edge == LEFT else edge + 2
    return [
        (edge, PACKAGES[name].middle),
        (outside, PACKAGES[name].middle),
        (outside, overlay.middle),
        (end, overlay.middle),
    ]
