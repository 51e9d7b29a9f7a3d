"""Shows what the syllabus knows: a day's tasks, what they may use, and at the end their solutions."""

from collections.abc import Callable
from html import escape

from tiny_llm_course.errors import CourseError
from tiny_llm_course.interfaces import Interface
from tiny_llm_course.may_use import unit_may_use
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import helpers_of, imports_of
from tiny_llm_course.syllabus import Syllabus
from tiny_llm_course.units import Day, Exercise, Unit

from .code import block, docstring_of, signature_of, solution_of, source_of
from .errors import BookError


class Exercises:
    """The directives `tasks`, `task`, `may_use` and `solutions`."""

    def __init__(self, repo: Repo, syllabus: Syllabus) -> None:
        self._repo, self._syllabus = repo, syllabus

    @property
    def directives(self) -> dict[str, Callable[[str], str]]:
        """The directives by name."""
        return {
            "tasks": self.tasks,
            "task": self.task,
            "may_use": self.may_use,
            "solutions": self.solutions,
        }

    @property
    def names(self) -> frozenset[str]:
        """Every exercise as `module.function`."""
        return frozenset(f"{one.module}.{one.name}" for day in self._syllabus.days for one in day.exercises)

    def tasks(self, unit_id: str) -> str:
        """A table of the exercises and the optional kernels of a day or a part, with their files."""
        unit = self._unit(unit_id)
        rows = [
            f"| [{one.id}](#task-{one.task}) | `{one.name}` | `src/tiny_llm/{one.module}.py` |"
            for one in unit.exercises
        ]
        rows += [
            f"| [{one.id}](#task-{one.id.rpartition('.')[2]}), optional | `{one.name}`, in C++ "
            f"| `src/tiny_llm/{one.file}` |"
            for one in unit.kernels
        ]
        return "\n".join(["| task | write | in |", "|---|---|---|", *rows])

    def task(self, exercise_id: str) -> str:
        """The heading of a task, its signature and its docstring, which is folded on a day with parts."""
        exercise = self._exercise(exercise_id)
        name = f"{exercise.module}.{exercise.name}"
        heading = f"### Task {exercise.task}: `{exercise.name}` {{#task-{exercise.task}}}"
        is_open = "" if self._syllabus.day(exercise.day_id).parts else " open"
        opening = f'<details class="contract"{is_open}>\n<summary>The docstring</summary>'
        contract = f"{opening}\n\n{docstring_of(name)}\n\n</details>"
        return f"{heading}\n\n{block(signature_of(name))}\n\n{contract}"

    def may_use(self, unit_id: str) -> str:
        """A table of the interfaces of other files that a unit's exercises may use."""
        found = unit_may_use(self._repo, self._unit(unit_id))
        if not found:
            return "These tasks need nothing from other files."
        return "\n".join(["| from | you may use | what it does |", "|---|---|---|", *map(_interface, found)])

    def solutions(self, unit_id: str) -> str:
        """The reference's code of every exercise, each folded, with what the starter lacks for it.

        A helper is shown with the first exercise that calls it.
        """
        unit = self._unit(unit_id)
        shown: dict[str, str] = {}
        return "\n\n".join(self._folded(unit.day, one, shown) for one in unit.exercises)

    def _folded(self, day: Day, exercise: Exercise, shown: dict[str, str]) -> str:
        """One exercise's fold. shown: by helper, the exercise with its code; this adds to it."""
        parts = [block(solution_of(f"{exercise.module}.{exercise.name}"))]
        if imports := imports_of(self._repo, day, exercise).splitlines():
            parts.append(f"It needs {' and '.join(f'`{line}`' for line in imports)}.")
        reference = (self._repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
        for helper in helpers_of(reference, day.removed_from(exercise.module), exercise.name):
            name = f"{exercise.module}.{helper}"
            if shown.setdefault(name, exercise.id) == exercise.id:
                parts += [f"The starter does not have `{helper}`:", block(source_of(name))]
            else:
                parts.append(f"`{helper}` is shown in {shown[name]}.")
        summary = f"<summary>{exercise.id} <code>{escape(exercise.name)}</code></summary>"
        return "\n\n".join([f'<details class="solution">\n{summary}', *parts, "</details>"])

    def _unit(self, unit_id: str) -> Unit:
        try:
            return self._syllabus.to_start(unit_id)
        except CourseError as error:
            raise BookError(str(error)) from error

    def _exercise(self, exercise_id: str) -> Exercise:
        try:
            found = self._syllabus.exercise(exercise_id)
        except CourseError as error:
            raise BookError(str(error)) from error
        if not isinstance(found, Exercise):
            raise BookError(f"{exercise_id} is a kernel in C++, not an exercise in Python")
        return found


def _interface(one: Interface) -> str:
    """A row of the table of interfaces."""
    signature, summary = (text.replace("|", "\\|") for text in (one.signature, one.summary))
    return f"| `{one.module}` | `{signature}` | {summary} |"
