"""Turns the source of a chapter into what mdBook renders, with all directives of the book."""

from collections.abc import Mapping

from figures import chart, interactive
from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import read_syllabus

from . import pictures
from .code import Code
from .cpp import cpp
from .directives import Directive, expand
from .exercises import Exercises
from .interactive import Interactive, with_one_import_map
from .mathml import with_mathml
from .results import Results


class Chapters:
    """All directives of the book, ready to expand chapters."""

    def __init__(self, directives: Mapping[str, Directive]) -> None:
        self._directives = directives

    @classmethod
    def of_the_project(cls) -> "Chapters":
        """The directives for this checkout's reference, syllabus, results and figures."""
        repo = Repo.here()
        exercises = Exercises(repo, read_syllabus(repo.syllabus))
        code = Code(exercises.names)
        embedded = Interactive(interactive.fallback, interactive.DATA)
        return cls(
            {
                "code": code.code,
                "signature": code.signature,
                "docstring": code.docstring,
                "cpp": cpp,
                "figure": pictures.figure,
                "interactive": embedded.interactive,
                **exercises.directives,
                **Results(chart.svg).directives,
            }
        )

    def expanded(self, text: str, chapter: str) -> str:
        """A chapter's Markdown with everything replaced. Raises `BookError`."""
        return with_one_import_map(expand(with_mathml(text, chapter), self._directives, chapter))
