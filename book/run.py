"""`pdm run book`: shows, builds and checks the book, and measures its results again.

Exit codes: 0 success, 1 the book has a mistake or a run failed, 2 wrong arguments.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiny_llm_cli.command import Command
from tiny_llm_course.errors import CourseError
from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import read_syllabus

ROOT = Path(__file__).parent
HTML = ROOT / "html"
PORT = 3000

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def on_book(context: typer.Context) -> None:
    """The book: read it in a browser, build it, or measure its results again.

    \b
    pdm run book                  # show it at http://127.0.0.1:3000, rebuilt when a file changes
    pdm run book serve 3.2        # the same, and print the address of a day's chapter
    pdm run book build            # write book/html, which opens from disk, and check it
    pdm run book results          # measure again: takes minutes
    """
    if context.invoked_subcommand is None:
        on_serve(None, PORT)


@app.command("serve", cls=Command)
def on_serve(
    day: Annotated[str | None, typer.Argument(metavar="[DAY]", help="A day (3.2) or a part (3.2b).")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = PORT,
) -> None:
    """Show the book in a browser and rebuild it when a file changes."""
    address = f"http://127.0.0.1:{port}/{_page(day) if day else ''}"
    print(f"the book: {address} (Ctrl-C stops)", flush=True)
    raise typer.Exit(_mdbook("serve", "--hostname", "127.0.0.1", "--port", str(port)))


def _page(day: str) -> str:
    """The page of a day or a part. Raises `typer.BadParameter` if there is no such chapter."""
    try:
        address = read_syllabus(Repo.here().syllabus).unit(day).chapter_address
    except CourseError as error:
        raise typer.BadParameter(str(error)) from error
    if address is None:
        raise typer.BadParameter(f"the chapter of day {day} is not written yet")
    return address.replace(".md", ".html")


@app.command("build", cls=Command)
def on_build() -> None:
    """Write the book to book/html and check links, anchors, commands and numbers."""
    from checks.commands import command_problems
    from checks.links import link_problems
    from checks.numbers import number_problems

    code = _mdbook("build")
    if code:
        raise typer.Exit(1)
    problems = [
        *(f"book/html/{one}" for one in link_problems(HTML)),
        *(f"book/src/{one}" for one in command_problems(ROOT / "src")),
        *(f"book/src/{one}" for one in number_problems(ROOT / "src")),
    ]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    print(f"wrote {HTML / 'index.html'}")


@app.command("results", cls=Command)
def on_results(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these results.")
    ] = None,
    only_missing: Annotated[bool, typer.Option("--missing", help="Only results without a file.")] = False,
) -> None:
    """Run the commands of results/runs.toml again and save what they print."""
    from preprocessor.errors import BookError
    from preprocessor.measure import measure_all

    try:
        measure_all(names or [], only_missing=only_missing)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command("figures", cls=Command)
def on_figures() -> None:
    """Draw the figures of ARCHITECTURE.md, and write the style sheet with the book's colours."""
    from figures.files import drawn

    for name, text in drawn().items():
        (ROOT.parent / name).write_text(text, encoding="utf-8")
        print(f"wrote {name}")


def _mdbook(action: str, *options: str) -> int:
    """Run mdBook, with this Python first on the PATH for the preprocessor; return the exit code."""
    import os

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.call(["mdbook", action, str(ROOT), *options], env={**os.environ, "PATH": path})


if __name__ == "__main__":
    app(prog_name="pdm run book")
