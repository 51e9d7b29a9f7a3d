"""The `tiny-llm` command, put together. It imports every command's module, so they must import quickly."""

from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .bench import bench_app
from .chat import chat
from .command import Command, Group
from .generate import generate
from .info import info
from .models import models
from .serve import serve
from .serve_cluster import serve_cluster


def command() -> TyperGroup:
    """The whole `tiny-llm` command."""
    app = typer.Typer(
        cls=Group,
        add_completion=True,
        rich_markup_mode=None,  # importing rich takes longer than everything else that --help does
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_tiny_llm)
    for function in (chat, generate, serve, serve_cluster, models, info):
        app.command(cls=Command)(function)
    app.add_typer(bench_app, name="bench")
    whole = get_command(app)
    assert isinstance(whole, TyperGroup)
    return whole


def _print_version(wanted: bool) -> None:
    if wanted:
        from .facts import version

        print(f"tiny-llm {version()}")
        raise typer.Exit


def _tiny_llm(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-v", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Run language models: chat, complete prompts in batches, serve OpenAI's API.

    \b
    tiny-llm chat "What is the capital of France?"
    tiny-llm generate "Once upon a time" "The sky is"
    tiny-llm serve

    \b
    A model comes with the installation; `tiny-llm models` lists others.
    `tiny-llm COMMAND --help` explains a command.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
