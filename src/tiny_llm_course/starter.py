"""A day's modules as a learner begins with them: the reference's, with the exercises blank."""

from collections.abc import Iterable
from pathlib import Path

from .cpp import libraries
from .errors import CourseError
from .house import House
from .progress import State, own_modules, state
from .source import blanked, functions, names_in, with_body_of, with_function
from .stubs import link_stubs
from .syllabus import Day, Exercise, Kernel


def starter(house: House, module: str, *days: Day) -> str:
    """The source of one module, its exercises of these days blank."""
    source = (house.reference / f"{module}.py").read_text(encoding="utf-8")
    messages = {exercise.name: exercise.message for day in days for exercise in day.of_module(module)}
    removed = dict.fromkeys(name for day in days for name in day.removed_from(module))
    return blanked(source, messages, removed)


def start(house: House, day: Day) -> list[Path]:
    """Write the day's modules into the overlay; the files that were written.

    Never overwrites: a module that is there stays, and if all of them are, `CourseError` says so.
    """
    own_modules(house)
    new = [house.overlay / f"{module}.py" for module in day.modules]
    new = [file for file in new if not file.exists()]
    if not new:
        raise CourseError(
            f"day {day.id} is started already ({', '.join(f'{module}.py' for module in day.modules)}): "
            f"`pdm run start {day.id} --again` moves your files aside and begins anew"
        )
    for file in new:
        file.write_text(starter(house, file.stem, day), encoding="utf-8")
    link_stubs(house)
    return new


def set_aside(house: House, day: Day) -> list[Path]:
    """Rename the day's files in the overlay to `NAME.py.1.bak`, `.2.bak` and so on; the new names.

    A library that holds a kernel of the day's is deleted: it can be built again.
    """
    files = [house.overlay / f"{module}.py" for module in day.modules]
    moved = [_rename(file) for file in files if file.exists()]
    link_stubs(house)
    return moved + [file for kernel in day.kernels for file in set_aside_kernel(house, kernel)]


def set_aside_kernel(house: House, kernel: Kernel) -> list[Path]:
    """Rename the file of one kernel, and delete the library; the new name, none where it is not started."""
    file = house.overlay / kernel.file
    if not file.exists():
        return []
    for library in libraries(house):
        library.unlink()
    return [_rename(file)]


def restore(house: House, day: Day) -> list[Path]:
    """Bring back the newest of the files that were moved aside for each of the day's files; what is there
    again.

    A file that is there changes places with it, so that a second `restore` undoes the first.
    """
    names = [f"{module}.py" for module in day.modules] + [kernel.file for kernel in day.kernels]
    restored = []
    for name in names:
        newest = _newest_aside(house.overlay / name)
        if newest is None:
            continue
        current = house.overlay / name
        aside = current.with_name(f"{name}.restoring")
        newest.rename(aside)
        if current.exists():
            _rename(current)
        restored.append(aside.rename(current))
    link_stubs(house)
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


def skip(house: House, day: Day, exercises: tuple[Exercise, ...]) -> list[Exercise]:
    """Put the reference's code where an exercise is blank, and the helpers that it calls; those that were."""
    blank = [exercise for exercise in exercises if state(house, exercise) is State.BLANK]
    for module, source in filled(house, day, blank).items():
        (house.overlay / f"{module}.py").write_text(source, encoding="utf-8")
    return blank


def filled(house: House, day: Day, exercises: Iterable[Exercise]) -> dict[str, str]:
    """The learner's modules with the reference's code in these exercises, and the helpers that it calls."""
    sources: dict[str, str] = {}
    for exercise in exercises:
        file = house.overlay / f"{exercise.module}.py"
        own = sources.get(exercise.module) or file.read_text(encoding="utf-8")
        sources[exercise.module] = _filled(house, day, exercise, own)
    return sources


def _filled(house: House, day: Day, exercise: Exercise, own: str) -> str:
    reference = (house.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
    with_body, removed = with_body_of(own, reference, exercise.name), day.removed_from(exercise.module)
    return _with_helpers(with_body, reference, removed, exercise.name)


def _with_helpers(own: str, reference: str, removed: tuple[str, ...], name: str) -> str:
    """The learner's source with those helpers put back that a function of the reference calls."""
    for helper in removed:
        if helper.rpartition(".")[2] in names_in(reference, name) and helper not in functions(own):
            own = _with_helpers(with_function(own, reference, helper), reference, removed, helper)
    return own
