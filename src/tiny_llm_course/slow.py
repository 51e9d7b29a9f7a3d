"""The learner's modules that are correct but slow: only their own day's demonstration runs them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

from .progress import own_modules
from .repo import Repo
from .syllabus import Syllabus
from .units import Unit

SLOW = {"quantize": "it unpacks every matrix in each forward pass"}


def slow_modules(repo: Repo, syllabus: Syllabus, unit: Unit) -> tuple[list[str], list[str]]:
    """The slow modules that this unit's demonstration leaves out, and a line on each slow module."""
    own = [module for module in own_modules(repo) if module in SLOW]
    left_out = [module for module in own if module not in unit.day.modules]
    lines = [
        f"your {module}.py is not used here, because {SLOW[module]}; day {syllabus.day(module).id} uses it"
        if module in left_out
        else f"this takes some seconds with your {module}.py, because {SLOW[module]}"
        for module in own
    ]
    return left_out, lines


def leave_out(repo: Repo, module: str) -> None:
    """Use the reference's module instead of the learner's in this process.

    Must be called before either is imported.
    """
    name = f"tiny_llm.{module}"
    spec = spec_from_file_location(name, repo.reference / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
