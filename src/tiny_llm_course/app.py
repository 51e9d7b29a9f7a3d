"""All commands of the course as one typer application."""

from collections.abc import Callable

import typer
from typer.core import TyperGroup
from typer.main import get_group

from .run_commands import on_course_check, on_test, on_test_refsol
from .show_commands import on_compare, on_diff, on_doctor, on_hint, on_map, on_progress, on_try
from .write_commands import on_build_kernels, on_reset, on_restore, on_skip, on_start

COMMANDS: dict[str, Callable[..., int | None]] = {
    "start": on_start,
    "test": on_test,
    "try": on_try,
    "hint": on_hint,
    "diff": on_diff,
    "compare": on_compare,
    "progress": on_progress,
    "map": on_map,
    "skip": on_skip,
    "reset": on_reset,
    "restore": on_restore,
    "build-kernels": on_build_kernels,
    "doctor": on_doctor,
    "test-refsol": on_test_refsol,
    "course-check": on_course_check,
}
PASSES_TO_PYTEST = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}


def command() -> TyperGroup:
    """Build the application. `test` and `test-refsol` pass unknown options on to pytest."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="The course: start a day, write its exercises, test them, and see them run on a real model.",
    )
    for name, function in COMMANDS.items():
        app.command(name, context_settings=PASSES_TO_PYTEST if name.startswith("test") else None)(function)
    return get_group(app)
