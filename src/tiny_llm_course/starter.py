"""A day's modules as a learner begins with them: the reference's, with the exercises blank."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .cpp import libraries
from .errors import CourseError
from .imports import with_imports, without_unused_imports
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

RENAMED_SUFFIX = "_of_reference"  # behind the name of a helper where the learner has another one of that name


@dataclass(frozen=True)
class StartResult:
    """What a start has done. files: written anew. blanked: exercises that were the reference's in a file of
    the learner's, and are blank now. links: links for editors that were not there before."""

    files: list[Path]
    blanked: list[Exercise]
    links: int = 0

    @property
    def changed_nothing(self) -> bool:
        """True where all was started already."""
        return not self.files and not self.blanked


def starter(repo: Repo, module: str, *units: Unit) -> str:
    """The source of one module, its exercises of these days and parts blank.

    Those of a day's earlier parts are there as `skip` puts them, with the helpers that they call; those of
    later parts are blank too, because their solutions would be read before they are looked for.
    """
    source = (repo.reference / f"{module}.py").read_text(encoding="utf-8")
    days = list(dict.fromkeys(unit.day for unit in units))
    exercises = [exercise for day in days for exercise in day.of_module(module)]
    removed = [name for day in days for name in day.removed_from(module)]
    source = blanked(source, {one.name: one.message for one in exercises}, removed)
    begun = [one for unit in units for one in (unit, *(unit.later if isinstance(unit, Part) else ()))]
    blank = {exercise.id for unit in begun for exercise in unit.of_module(module)}
    for day in days:
        for exercise in day.of_module(module):
            source = source if exercise.id in blank else _filled(repo, day, exercise, source)
    return source


def start(repo: Repo, unit: Unit) -> StartResult:
    """Write the modules of a day or a part into the overlay.

    A module that is there stays as it is, apart from exercises of the unit that are the reference's, where
    the day has parts: these become blank. What the learner has written always stays. Raises `CourseError`
    for a day that is started already; a part may be, and nothing is done then.
    """
    own_modules(repo)
    new = [repo.overlay / f"{module}.py" for module in missing_modules(repo, unit)]
    given = [exercise for exercise in unit.exercises if unit.day.parts and _is_reference_code(repo, exercise)]
    if not new and not given and not isinstance(unit, Part):
        raise CourseError(
            f"{unit.named} is started already ({', '.join(f'{module}.py' for module in unit.modules)}): "
            f"`pdm run start {unit.id} --again` moves your files aside and begins anew"
        )
    for file in new:
        file.write_text(starter(repo, file.stem, unit), encoding="utf-8")
    for exercise in given:
        _blank_again(repo, unit.day, exercise)
    return StartResult(new, given, link_stubs(repo))


def _is_reference_code(repo: Repo, exercise: Exercise) -> bool:
    """Whether an exercise is the reference's in the learner's file, unchanged."""
    if state(repo, exercise) is not State.SKIPPED:
        return False
    own, reference = _sources(repo, exercise)
    return is_reference_code(own, reference, exercise.name)


def _sources(repo: Repo, exercise: Exercise) -> list[str]:
    """The learner's and the reference's source of an exercise's module."""
    folders = (repo.overlay, repo.reference)
    return [(folder / f"{exercise.module}.py").read_text(encoding="utf-8") for folder in folders]


def _blank_again(repo: Repo, day: Day, exercise: Exercise) -> None:
    """Make an exercise blank that is the reference's, and take out the helpers that only it has called."""
    own, reference = _sources(repo, exercise)
    blank = with_blank(own, exercise.name, exercise.message)
    blank = _without_helpers(blank, reference, day.removed_from(exercise.module))
    blank = without_unused_imports(blank, own)
    (repo.overlay / f"{exercise.module}.py").write_text(blank, encoding="utf-8")


def _without_helpers(own: str, reference: str, removed: tuple[str, ...]) -> str:
    """The learner's source without those helpers of the reference that nothing calls."""
    for helper in removed:
        others = functions(own).keys() - {helper}
        called = any(helper.rpartition(".")[2] in names_in(own, name) for name in others)
        if is_reference_code(own, reference, helper) and not called:
            return _without_helpers(without(own, helper), reference, removed)
    return own


def set_aside(repo: Repo, unit: Unit) -> list[Path]:
    """Rename the unit's files in the overlay to `NAME.py.1.bak`, `.2.bak` and so on; the new names.

    A file with work of other parts is copied instead, and the part's exercises in it become the reference's.
    A library that holds a kernel of the day's is deleted: it can be built again.
    """
    files = [repo.overlay / f"{module}.py" for module in unit.modules]
    moved = [aside for file in files if file.exists() and (aside := _set_aside(repo, unit, file))]
    link_stubs(repo)
    return moved + [file for kernel in unit.kernels for file in set_aside_kernel(repo, kernel)]


def _set_aside(repo: Repo, unit: Unit, file: Path) -> Path | None:
    """Where the file was moved or copied to; None where the part's exercises are the reference's already."""
    of_others = [one for one in unit.day.of_module(file.stem) if one not in unit.exercises]
    if all(_is_reference_code(repo, one) or state(repo, one) is State.BLANK for one in of_others):
        return _rename(file)  # nothing of the learner's is in it beside the unit's
    of_unit = [one for one in unit.of_module(file.stem) if not _is_reference_code(repo, one)]
    if not of_unit:
        return None
    refuse_missing(repo, of_unit)
    sources = filled(repo, unit.day, of_unit)
    aside = _rename(file)
    file.write_text(sources[file.stem], encoding="utf-8")
    return aside


def set_aside_kernel(repo: Repo, kernel: Kernel) -> list[Path]:
    """Rename the file of one kernel, and delete the library; the new name, none where it is not started."""
    file = repo.overlay / kernel.file
    if not file.exists():
        return []
    for library in libraries(repo):
        library.unlink()
    return [_rename(file)]


def restore(repo: Repo, unit: Unit) -> list[Path]:
    """Bring back the newest of the files that were moved aside for each of the unit's files; what is there
    again.

    A file that is there changes places with it, so that a second `restore` undoes the first.
    """
    names = [f"{module}.py" for module in unit.modules] + [kernel.file for kernel in unit.kernels]
    restored = []
    for name in names:
        newest = _newest_aside(repo.overlay / name)
        if newest is None:
            continue
        current = repo.overlay / name
        aside = current.with_name(f"{name}.restoring")
        newest.rename(aside)
        if current.exists():
            _rename(current)
        restored.append(aside.rename(current))
    link_stubs(repo)
    return restored


def _newest_aside(file: Path) -> Path | None:
    """The copy of a file with the highest number."""
    number = 1
    while file.with_name(f"{file.name}.{number}.bak").exists():
        number += 1
    return file.with_name(f"{file.name}.{number - 1}.bak") if number > 1 else None


def _rename(file: Path) -> Path:
    number = 1
    while (target := file.with_name(f"{file.name}.{number}.bak")).exists():
        number += 1
    return file.rename(target)


def skip(repo: Repo, day: Day, exercises: tuple[Exercise, ...]) -> list[Exercise]:
    """Put the reference's code where an exercise is blank, with the helpers and imports that it needs; those
    that were blank."""
    blank = [exercise for exercise in exercises if state(repo, exercise) is State.BLANK]
    for module, source in filled(repo, day, blank).items():
        (repo.overlay / f"{module}.py").write_text(source, encoding="utf-8")
    return blank


def filled(repo: Repo, day: Day, exercises: Iterable[Exercise]) -> dict[str, str]:
    """The learner's modules with the reference's code in these exercises, helpers and imports included."""
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
    """The reference and its helpers, renamed where the learner has a function of the same name.

    Otherwise the reference's code would call the learner's helper, which may take or return something else.
    """
    taken = {helper.rpartition(".")[2] for helper in helpers if _has_another(own, reference, helper)}
    for name in taken:
        reference = re.sub(rf"\b{name}\b", f"{name}{RENAMED_SUFFIX}", reference)
    names = (f"{one}{RENAMED_SUFFIX}" if one.rpartition(".")[2] in taken else one for one in helpers)
    return reference, tuple(names)


def _has_another(own: str, reference: str, helper: str) -> bool:
    """Whether a source has a function of a helper's name that is not the helper."""
    if helper not in functions(own):
        return False
    first, second = ((signature(one, helper), body_lines(one, helper)) for one in (own, reference))
    return first != second


def _with_helpers(own: str, reference: str, removed: tuple[str, ...], name: str) -> str:
    """The learner's source with those helpers put back that a function of the reference calls."""
    for helper in removed:
        if helper.rpartition(".")[2] in names_in(reference, name) and helper not in functions(own):
            own = _with_helpers(with_function(own, reference, helper), reference, removed, helper)
    return own
