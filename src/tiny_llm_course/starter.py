"""Starter files: the reference's modules with the exercises blank.

The commands start, skip, reset and restore are implemented here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .backups import back_up, backups
from .cpp import libraries
from .errors import CourseError
from .imports import missing_imports, with_imports, without_unused_imports
from .progress import State, missing_modules, own_modules, refuse_missing, state
from .repo import Repo
from .source import (
    blanked,
    body_lines,
    functions,
    is_reference_code,
    names_in,
    signature,
    with_blank,
    with_body_of,
    with_function,
    without,
)
from .stubs import link_stubs
from .units import Day, Exercise, Kernel, Part, Unit

RENAMED_SUFFIX = "_of_reference"  # for a helper whose name the learner has used for another function


@dataclass(frozen=True)
class StartResult:
    """The result of a start.

    files: the new files. blanked: exercises in existing files that had the reference's code and are blank
    now. links: the number of new links for editors.
    """

    files: list[Path]
    blanked: list[Exercise]
    links: int = 0

    @property
    def changed_nothing(self) -> bool:
        """True if everything was started already."""
        return not self.files and not self.blanked


def starter(repo: Repo, module: str, *units: Unit) -> str:
    """The source of one module, with the exercises of these days and parts blank.

    Exercises of a day's earlier parts contain the reference's code, with the helpers that they call, as after
    `skip`. Exercises of later parts are blank too, so that the learner does not see their solutions early.
    """
    source = (repo.reference / f"{module}.py").read_text(encoding="utf-8")
    days = list(dict.fromkeys(unit.day for unit in units))
    exercises = [exercise for day in days for exercise in day.of_module(module)]
    removed = [name for day in days for name in day.removed_from(module)]
    source = blanked(source, {one.name: one.message for one in exercises}, removed)
    to_blank = [one for unit in units for one in (unit, *(unit.later if isinstance(unit, Part) else ()))]
    blank = {exercise.id for unit in to_blank for exercise in unit.of_module(module)}
    for day in days:
        for exercise in day.of_module(module):
            source = source if exercise.id in blank else _filled(repo, day, exercise, source)
    return source


def start(repo: Repo, unit: Unit) -> StartResult:
    """Write the modules of a day or a part into the overlay.

    Existing modules stay as they are, with one exception: if the day has parts, exercises of the unit that
    contain the reference's code become blank. The learner's code always stays. Raises `CourseError` for a day
    that is started already; for a part that is started already, nothing is changed.
    """
    own_modules(repo)
    new = [repo.overlay / f"{module}.py" for module in missing_modules(repo, unit)]
    given = [exercise for exercise in unit.exercises if unit.day.parts and _is_reference_code(repo, exercise)]
    if not new and not given and not isinstance(unit, Part):
        raise CourseError(
            f"{unit.named} has already been started "
            f"({', '.join(f'{module}.py' for module in unit.modules)}): "
            f"`pdm run start {unit.id} --again` moves your files aside and starts over"
        )
    for file in new:
        file.write_text(starter(repo, file.stem, unit), encoding="utf-8")
    for exercise in given:
        _blank_again(repo, unit.day, exercise)
    return StartResult(new, given, link_stubs(repo))


def _is_reference_code(repo: Repo, exercise: Exercise) -> bool:
    """Whether an exercise in the learner's file contains the reference's code, unchanged."""
    if state(repo, exercise) is not State.SKIPPED:
        return False
    own, reference = _sources(repo, exercise)
    return is_reference_code(own, reference, exercise.name)


def _sources(repo: Repo, exercise: Exercise) -> list[str]:
    """The learner's and the reference's source of an exercise's module."""
    folders = (repo.overlay, repo.reference)
    return [(folder / f"{exercise.module}.py").read_text(encoding="utf-8") for folder in folders]


def _blank_again(repo: Repo, day: Day, exercise: Exercise) -> None:
    """Make an exercise with the reference's code blank, and remove the helpers that only it calls."""
    own, reference = _sources(repo, exercise)
    blank = with_blank(own, exercise.name, exercise.message)
    blank = _without_helpers(blank, reference, day.removed_from(exercise.module))
    blank = without_unused_imports(blank, own)
    (repo.overlay / f"{exercise.module}.py").write_text(blank, encoding="utf-8")


def _without_helpers(own: str, reference: str, removed: tuple[str, ...]) -> str:
    """The learner's source without the reference's helpers that nothing calls."""
    for helper in removed:
        others = functions(own).keys() - {helper}
        called = any(helper.rpartition(".")[2] in names_in(own, name) for name in others)
        if is_reference_code(own, reference, helper) and not called:
            return _without_helpers(without(own, helper), reference, removed)
    return own


def set_aside(repo: Repo, unit: Unit) -> list[Path]:
    """Move the unit's files in the overlay to the folder of backups; returns the new paths.

    A file with work of other parts is copied instead, and the unit's exercises in it get the reference's
    code. If a kernel is moved, the learner's library is deleted; it can be built again.
    """
    files = [repo.overlay / f"{module}.py" for module in unit.modules]
    moved = [aside for file in files if file.exists() and (aside := _set_aside(repo, unit, file))]
    link_stubs(repo)
    return moved + [file for kernel in unit.kernels for file in set_aside_kernel(repo, kernel)]


def _set_aside(repo: Repo, unit: Unit, file: Path) -> Path | None:
    """The path of the moved or copied file; None if its exercises contain the reference's code already."""
    of_others = [one for one in unit.day.of_module(file.stem) if one not in unit.exercises]
    if all(_is_reference_code(repo, one) or state(repo, one) is State.BLANK for one in of_others):
        return back_up(file)  # the learner has written nothing else in it
    of_unit = [one for one in unit.of_module(file.stem) if not _is_reference_code(repo, one)]
    if not of_unit:
        return None
    refuse_missing(repo, of_unit)
    sources = filled(repo, unit.day, of_unit)
    aside = back_up(file)
    file.write_text(sources[file.stem], encoding="utf-8")
    return aside


def set_aside_kernel(repo: Repo, kernel: Kernel) -> list[Path]:
    """Move a kernel's file to the backups and delete the library.

    Returns a list of the new path, empty if the kernel is not started.
    """
    file = repo.overlay / kernel.file
    if not file.exists():
        return []
    for library in libraries(repo):
        library.unlink()
    return [back_up(file)]


def restore(repo: Repo, unit: Unit) -> list[Path]:
    """Bring back the newest backup of each of the unit's files, and return the restored paths.

    An existing file swaps places with its backup, so that a second `restore` undoes the first.
    """
    names = [f"{module}.py" for module in unit.modules] + [kernel.file for kernel in unit.kernels]
    restored = []
    for name in names:
        current = repo.overlay / name
        found = backups(current)
        if not found:
            continue
        aside = found[-1].rename(current.with_name(f"{name}.restoring"))
        if current.exists():
            back_up(current)
        restored.append(aside.rename(current))
    link_stubs(repo)
    return restored


def skip(repo: Repo, day: Day, exercises: tuple[Exercise, ...]) -> list[Exercise]:
    """Put the reference's code into the blank ones of these exercises, and return those.

    The helpers and imports that the code needs are added too.
    """
    blank = [exercise for exercise in exercises if state(repo, exercise) is State.BLANK]
    for module, source in filled(repo, day, blank).items():
        (repo.overlay / f"{module}.py").write_text(source, encoding="utf-8")
    return blank


def filled(repo: Repo, day: Day, exercises: Iterable[Exercise]) -> dict[str, str]:
    """The learner's modules with the reference's code in these exercises, with its helpers and imports."""
    sources: dict[str, str] = {}
    for exercise in exercises:
        file = repo.overlay / f"{exercise.module}.py"
        own = sources.get(exercise.module) or file.read_text(encoding="utf-8")
        sources[exercise.module] = _filled(repo, day, exercise, own)
    return sources


def _filled(repo: Repo, day: Day, exercise: Exercise, own: str) -> str:
    reference = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
    reference, helpers = _with_renamed_helpers(own, reference, day.removed_from(exercise.module))
    with_body = with_body_of(own, reference, exercise.name)
    return with_imports(_with_helpers(with_body, reference, helpers, exercise.name), reference)


def _with_renamed_helpers(own: str, reference: str, helpers: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The reference's source and the names of its helpers.

    A helper is renamed if the learner has another function of the same name. Otherwise the reference's code
    would call the learner's, which may have another signature.
    """
    taken = {helper.rpartition(".")[2] for helper in helpers if _has_another(own, reference, helper)}
    for name in taken:
        reference = re.sub(rf"\b{name}\b", f"{name}{RENAMED_SUFFIX}", reference)
    names = (f"{one}{RENAMED_SUFFIX}" if one.rpartition(".")[2] in taken else one for one in helpers)
    return reference, tuple(names)


def _has_another(own: str, reference: str, helper: str) -> bool:
    """Whether a source defines another function under a helper's name."""
    if helper not in functions(own):
        return False
    first, second = ((signature(one, helper), body_lines(one, helper)) for one in (own, reference))
    return first != second


def _with_helpers(own: str, reference: str, removed: tuple[str, ...], name: str) -> str:
    """The learner's source with the removed helpers that a function of the reference calls."""
    for helper in helpers_of(reference, removed, name):
        if helper not in functions(own):
            own = with_function(own, reference, helper)
    return own


def helpers_of(reference: str, removed: tuple[str, ...], name: str) -> list[str]:
    """The removed helpers that a function of the reference calls, directly or in other helpers."""
    found: list[str] = []
    for helper in removed:
        if helper.rpartition(".")[2] in names_in(reference, name) and helper != name:
            found += [helper, *helpers_of(reference, removed, helper)]
    return list(dict.fromkeys(found))


def imports_of(repo: Repo, day: Day, exercise: Exercise) -> str:
    """The imports of the standard library that the reference's code of an exercise adds to the starter."""
    reference = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
    own = with_body_of(starter(repo, exercise.module, day), reference, exercise.name)
    helpers = day.removed_from(exercise.module)
    return missing_imports(_with_helpers(own, reference, helpers, exercise.name), reference)
