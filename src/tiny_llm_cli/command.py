"""How a command shows its options: in groups, with plain placeholders, ranges and defaults.

This module also turns an error of the engine's configuration into an error of the command line that names
the options as the user types them.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .mistakes import OptionError, is_about_options, with_option_names

if TYPE_CHECKING:
    from typer._click import Context, Parameter
    from typer._click.formatting import HelpFormatter

_PLACEHOLDERS = {
    "int": "N",
    "int range": "N",
    "float": "FLOAT",
    "float range": "FLOAT",
    "str": "TEXT",
    "path": "FILE",
}


class Command(TyperCommand):
    """A command whose help has one section for each group of options."""

    def format_options(self, ctx: typer.Context, formatter: "HelpFormatter") -> None:  # type: ignore[override]
        """Write the sections in the order in which the groups first appear."""
        _write_options(self.get_params(ctx), ctx, formatter)

    def invoke(self, ctx: "Context") -> Any:
        """Run the command. An option that the engine rejects raises `OptionError`, which names the option."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            if not is_about_options(error):
                raise
            raise OptionError(with_option_names(str(error), self.get_params(ctx)), ctx) from error


class Group(TyperGroup):
    """A command with sub-commands."""

    def format_options(self, ctx: typer.Context, formatter: "HelpFormatter") -> None:  # type: ignore[override]
        """Write the options, then the commands."""
        _write_options(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)


def _write_options(params: Iterable["Parameter"], ctx: typer.Context, formatter: "HelpFormatter") -> None:
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in params:
        if param.metavar is None:
            param.metavar = _PLACEHOLDERS.get(param.type.name)
        record = param.get_help_record(ctx)
        if record is not None:
            names, text = record
            if param.secondary_opts:
                text = re.sub(
                    r"(?<=[\[ ])default: (no-)?[a-z-]+\]$", lambda m: f"default: {_switch(m)}]", text
                )
            default = "Options" if param.param_type_name == "option" else "Arguments"
            title = getattr(param, "rich_help_panel", None) or default
            sections.setdefault(title, []).append((names, _plain(text)))
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)


def _switch(default: re.Match[str]) -> str:
    """The default of `--progress / --no-progress`: on or off."""
    return "off" if default[1] else "on"


def _plain(text: str) -> str:
    """Help text with its range in words, and without parentheses around a default that is given in words."""
    text = re.sub(r"(\d\S*)<=x<=(\d[^];]*)(?=[];])", r"\1 to \2", text)
    text = re.sub(r"x>=(\d[^];]*)(?=[];])", r"at least \1", text)
    return re.sub(r"(?<=[\[ ])default: \((.*)\)(?=[];])", r"default: \1", text, flags=re.DOTALL)
