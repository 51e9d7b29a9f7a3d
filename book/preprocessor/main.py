"""The preprocessor that mdBook runs: replaces directives and formulas in every chapter.

mdBook runs it as `main.py supports RENDERER`, which must succeed, and with `[context, book]` as JSON on
stdin; it prints the book as JSON. Errors go to stderr, and the exit code 1 stops the build.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # the folder `book`, whose packages are imported by name

from preprocessor.chapter import Chapters  # noqa: E402
from preprocessor.errors import BookError  # noqa: E402


def main() -> int:
    """Run as a preprocessor; return the exit code."""
    if sys.argv[1:2] == ["supports"]:
        return 0
    _, book = json.load(sys.stdin)
    chapters, problems = Chapters.of_the_project(), []
    for chapter in _chapters(book["items"]):
        try:
            chapter["content"] = chapters.expanded(chapter["content"], chapter["source_path"])
        except BookError as error:
            problems.append(f"error: book/src/{error}")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    json.dump(book, sys.stdout)
    return 0


def _chapters(items: list[Any]) -> list[dict[str, Any]]:
    """Every chapter with a file, at any depth."""
    found = []
    for item in items:
        if isinstance(item, dict) and "Chapter" in item:
            chapter = item["Chapter"]
            found += [chapter] if chapter["source_path"] else []
            found += _chapters(chapter["sub_items"])
    return found


if __name__ == "__main__":
    sys.exit(main())
