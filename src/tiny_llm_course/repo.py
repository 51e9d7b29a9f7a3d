"""The folders of a checkout: the reference, the learner's overlay, the suites, the course's records."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CourseError


@dataclass(frozen=True)
class Repo:
    """The folders of one checkout. overlay: the learner's files, in `TINY_LLM_OVERLAY` or src/tiny_llm."""

    root: Path
    overlay: Path

    @classmethod
    def here(cls) -> "Repo":
        """The checkout that contains this file. Raises `CourseError` if it is an installed copy."""
        root = Path(__file__).resolve().parents[2]
        if not (root / "tests_refsol").is_dir():
            raise CourseError(
                "the course needs a checkout of the repository: clone it, then run `pdm install`"
            )
        named = os.environ.get("TINY_LLM_OVERLAY")
        return cls(root, Path(named).resolve() if named else root / "src" / "tiny_llm")

    @property
    def reference(self) -> Path:
        """The folder of the complete engine."""
        return self.root / "src" / "tiny_llm_ref"

    @property
    def suites(self) -> Path:
        """The folder of the test files, one for each day."""
        return self.root / "tests_refsol"

    @property
    def syllabus(self) -> Path:
        """The file that lists the days."""
        return self.root / "src" / "tiny_llm_course" / "syllabus.toml"

    @property
    def chapters(self) -> Path:
        """The folder of the book's chapters."""
        return self.root / "book" / "src"

    @property
    def labs(self) -> Path:
        """The folder of the experiments that `pdm run lab` runs."""
        return self.root / "labs"

    @property
    def records(self) -> Path:
        """The folder for results of this overlay's test runs and builds. It can be deleted at any time."""
        is_usual = self.overlay == self.root / "src" / "tiny_llm"
        return (self.root if is_usual else self.overlay) / ".course"

    def with_overlay(self, overlay: Path) -> "Repo":
        """The same checkout with another overlay."""
        return replace(self, overlay=overlay)

    def shown(self, path: Path) -> str:
        """A path relative to the root of the checkout if it is inside, otherwise as it is."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
