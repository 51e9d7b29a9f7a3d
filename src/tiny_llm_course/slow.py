"""Modules of the learner's that are right and slow: on the real model only their own day runs them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

from .progress import own_modules
from .repo import Repo
from .syllabus import Syllabus
from .units import Unit

SLOW = {"quantize": "it unpacks every matrix in each pass"}


def slow_modules(repo: Repo, syllabus: Syllabus, unit: Unit) -> tuple[list[str], list[str]]:
    """Of the learner's slow modules those that this unit's demonstration leaves out; a line on each."""
    own = [module for module in own_modules(repo) if module in SLOW]
    left_out = [module for module in own if module not in unit.day.modules]
    lines = [
        f"your {module}.py is left out here: {SLOW[module]}; day {syllabus.day(module).id} shows it"
        if module in left_out
        else f"this takes some seconds with your {module}.py: {SLOW[module]}"
        for module in own
    ]
    return left_out, lines


def leave_out(repo: Repo, module: str) -> None:
    """Run the reference's module in place of the learner's in this process, which has imported neither."""
    name = f"tiny_llm.{module}"
    spec = spec_from_file_location(name, repo.reference / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
