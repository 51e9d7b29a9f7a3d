"""Where everything stands: the reference, the learner's overlay, the suites, the course's own records."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CourseError


@dataclass(frozen=True)
class Repo:
    """The folders of one checkout. `overlay` is the learner's: `TINY_LLM_OVERLAY`, or else src/tiny_llm."""

    root: Path
    overlay: Path

    @classmethod
    def here(cls) -> "Repo":
        """The checkout that this file is in. Raises `CourseError` where that is an installed copy."""
        root = Path(__file__).resolve().parents[2]
        if not (root / "tests_refsol").is_dir():
            raise CourseError("the course needs a checkout of the repository: clone it, then `pdm install`")
        named = os.environ.get("TINY_LLM_OVERLAY")
        return cls(root, Path(named).resolve() if named else root / "src" / "tiny_llm")

    @property
    def reference(self) -> Path:
        """The complete engine."""
        return self.root / "src" / "tiny_llm_ref"

    @property
    def suites(self) -> Path:
        """One test file a day."""
        return self.root / "tests_refsol"

    @property
    def syllabus(self) -> Path:
        """The list of days."""
        return self.root / "src" / "tiny_llm_course" / "syllabus.toml"

    @property
    def records(self) -> Path:
        """What the course remembers of this overlay's test runs and builds; never needed, always checked."""
        is_usual = self.overlay == self.root / "src" / "tiny_llm"
        return (self.root if is_usual else self.overlay) / ".course"

    def with_overlay(self, overlay: Path) -> "Repo":
        """The same repo seen through another overlay."""
        return replace(self, overlay=overlay)

    def shown(self, path: Path) -> str:
        """A path as a learner would type it, from the root of the checkout."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
