"""The commands put together. Importing this imports every command's module, so those stay light."""

from typing import Annotated

import typer
from typer.core import TyperCommand

from .bench import bench
from .chat import chat
from .generate import generate
from .info import info
from .options import GroupedCommand


def command() -> typer.main.TyperGroup:
    """The whole `tiny-llm` command."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,  # rich's help imports for longer than everything else together
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_tiny_llm)
    for function in (chat, generate, info):
        app.command(cls=GroupedCommand)(function)
    app.add_typer(bench, name="bench")
    return typer.main.get_group(app)
