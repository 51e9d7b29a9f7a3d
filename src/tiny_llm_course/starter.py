"""A day's modules as a learner begins with them: the reference's, with the exercises blank."""

from pathlib import Path

from .cpp import libraries
from .errors import CourseError
from .house import House
from .progress import State, own_modules, state
from .source import blanked, with_body_of
from .syllabus import Day, Exercise


def starter(house: House, day: Day, module: str) -> str:
    """The source of one module, its exercises blank."""
    source = (house.reference / f"{module}.py").read_text(encoding="utf-8")
    messages = {exercise.name: exercise.message for exercise in day.of_module(module)}
    return blanked(source, messages, day.removed_from(module))


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
        file.write_text(starter(house, day, file.stem), encoding="utf-8")
    return new


def set_aside(house: House, day: Day) -> list[Path]:
    """Rename the day's files in the overlay to `NAME.py.1.bak`, `.2.bak` and so on; the new names.

    A library that holds a kernel of the day's is deleted: it can be built again.
    """
    moved = []
    for name in [*(f"{module}.py" for module in day.modules), *(kernel.file for kernel in day.kernels)]:
        file = house.overlay / name
        if file.exists():
            if file.suffix == ".cpp":
                for library in libraries(house):
                    library.unlink()
            number = 1
            while (target := file.with_name(f"{file.name}.{number}.bak")).exists():
                number += 1
            moved.append(file.rename(target))
    return moved


def skip(house: House, exercises: tuple[Exercise, ...]) -> list[Exercise]:
    """Put the reference's code where an exercise is blank; those that were."""
    blank = [exercise for exercise in exercises if state(house, exercise) is State.BLANK]
    for exercise in blank:
        file = house.overlay / f"{exercise.module}.py"
        reference = (house.reference / file.name).read_text(encoding="utf-8")
        own = file.read_text(encoding="utf-8")
        file.write_text(with_body_of(own, reference, exercise.name), encoding="utf-8")
    return blank
