"""The options that give every answer a form: a JSON schema, a regular expression, choices or a grammar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

_FORM = "Form of the answer"
_OPTIONS = ("--json-schema", "--json-object", "--regex", "--choice", "--grammar")


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """The form of the answers: at most one of these options."""

    json_schema: Annotated[
        Path | None,
        typer.Option(
            help="Answer with JSON that satisfies the JSON Schema in this file. Say in the prompt what the "
            "fields mean: the model does not see the schema.",
            metavar="FILE",
            rich_help_panel=_FORM,
        ),
    ] = None
    json_object: Annotated[
        bool,
        typer.Option("--json-object", help="Answer with any JSON object.", rich_help_panel=_FORM),
    ] = False
    regex: Annotated[
        str | None,
        typer.Option(
            help="Answer with a text that matches this regular expression as a whole, for example "
            "'[0-9]{4}-[0-9]{2}-[0-9]{2}'.",
            metavar="REGEX",
            rich_help_panel=_FORM,
        ),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer with one of these texts. Repeat the option for each.",
            metavar="TEXT",
            rich_help_panel=_FORM,
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(
            help="Answer with a sentence of the grammar in this file, in llguidance's dialect of Lark. It "
            "begins with the rule `start`.",
            metavar="FILE",
            rich_help_panel=_FORM,
        ),
    ] = None


def asked_form(options: FormOptions) -> dict[str, Any] | None:
    """Return the fields of `StructuredOutputsParams` that the options ask for; None if they ask for none.

    Raises a usage error for several options, and for a file that is not text.
    """
    texts = (options.json_schema, options.json_object or None, options.regex, options.choice, options.grammar)
    given = [option for option, text in zip(_OPTIONS, texts, strict=True) if text is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"an answer has only one form, not {' and '.join(given)}")
    if options.json_schema is not None:
        return {"json": _read(options.json_schema, "--json-schema")}
    if options.grammar is not None:
        return {"grammar": _read(options.grammar, "--grammar")}
    found = {"json_object": options.json_object or None, "regex": options.regex, "choice": options.choice}
    return {name: value for name, value in found.items() if value is not None} or None


def _read(file: Path, option: str) -> str:
    """The text of a file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text", param_hint=option) from error
