"""Helpers for tests of the book: pages with interactive figures, and builds by mdBook."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import interactive
from preprocessor.interactive import Interactive, scripts

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
MDBOOK = shutil.which("mdbook", path=str(Path(sys.executable).parent)) or shutil.which("mdbook")
FIGURES = list(interactive.FALLBACKS)
PAGE = """<!doctype html><html lang="en" class="light"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style><body class="content">{body}</body></html>"""


def write_page(folder: Path, name: str, *figures: str) -> str:
    """Write a page with these figures; return its address."""
    embedded = Interactive(interactive.fallback, interactive.DATA)
    return _write(
        folder / f"{name}.html", "\n".join(embedded.interactive(f"{one} A caption.") for one in figures)
    )


def write_empty_page(folder: Path) -> str:
    """Write a page from which the modules can be imported; return its address."""
    return _write(folder / "modules.html", scripts("pool"))


def _write(file: Path, body: str) -> str:
    style = "".join((BOOK / "theme" / name).read_text("utf-8") for name in ("colours.css", "book.css"))
    file.write_text(PAGE.format(title=file.stem, style=style, body=body), "utf-8")
    return file.as_uri()


def build_book(folder: Path, figures: Sequence[str]) -> Path:
    """Build a book with a chapter for each figure by mdBook; return the folder with its pages."""
    (folder / "src").mkdir()
    command = f"{sys.executable} {BOOK / 'preprocessor' / 'main.py'}"
    settings = (BOOK / "book.toml").read_text("utf-8").replace("python preprocessor/main.py", command)
    (folder / "book.toml").write_text(settings, "utf-8")
    (folder / "theme").symlink_to(BOOK / "theme")
    chapters = "".join(f"- [{name}]({name}.md)\n" for name in figures)
    (folder / "src" / "SUMMARY.md").write_text(f"# Summary\n\n{chapters}", "utf-8")
    for name in figures:
        (folder / "src" / f"{name}.md").write_text(
            f"# {name}\n\n{{{{interactive {name} A caption.}}}}\n", "utf-8"
        )
    ended = mdbook_build(folder, folder / "html")
    assert ended.returncode == 0, ended.stderr
    return folder / "html"


def mdbook_build(book: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build a book into a folder, with this Python first on the PATH, which the preprocessor needs."""
    assert MDBOOK
    command = [MDBOOK, "build", str(book), "--dest-dir", str(target)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
