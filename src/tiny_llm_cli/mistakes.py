"""Explains a wrong command line in one line: the value, what is expected, and the option that was meant."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from typer.exceptions import TyperException

from tiny_llm_checkpoints.suggestions import closest, letters

if TYPE_CHECKING:
    from typer._click import Context, Parameter

# What other programs call an option, such as llama.cpp, mlx-lm, ollama, vLLM and transformers.
_OTHER_NAMES = {
    "--alias": "--served-model-name",
    "--batch-size": "--max-num-batched-tokens",
    "--cache-type-k": "--kv-cache-dtype",
    "--cache-type-v": "--kv-cache-dtype",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--gpu-memory-utilization": "--kv-cache-memory",
    "--hf-repo": "--model",
    "--input-file": "--file",
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-ctx": "--max-model-len",
    "--num-predict": "--max-tokens",
    "--output-file": "--output",
    "--parallel": "--max-num-seqs",
    "--predict": "--max-tokens",
    "--reverse-prompt": "--stop",
    "--system-prompt": "--system",
}


class OptionError(TyperException):
    """An option has a value that cannot work. The message names the option and the limit."""

    exit_code = 2

    def __init__(self, message: str, ctx: "Context | None" = None) -> None:
        super().__init__(message)
        self.ctx = ctx


def is_about_options(error: ValueError) -> bool:
    """Whether an error of the engine is about a value that came from the command line."""
    from tiny_llm import ConfigError, SamplingParamsError

    return isinstance(error, ConfigError | SamplingParamsError)


def with_option_names(message: str, params: Iterable["Parameter"]) -> str:
    """The message, with the name of each field replaced by the option that sets it.

    `num_blocks` becomes `--num-blocks` wherever it is a word of the message. A name without an underscore is
    replaced only at the start (`seed must be ...`), because elsewhere it may be an ordinary word.
    """
    for field, option in _option_of_field(params).items():
        start = "" if "_" in field else "^"
        pattern = rf"{start}(?<![\w/.'\"-]){re.escape(field)}(?![\w/.'\"-])"
        message = re.sub(rf"{pattern}='(\w+)'", rf"{option} \1", message)
        message = re.sub(pattern, option, message)
    return message


# Options that do not have the name of their field.
_OTHER_FIELDS = {
    "stop_token_id": "stop_token_ids",
    "include_stop": "include_stop_str_in_output",
    "show_special_tokens": "skip_special_tokens",
    "json_schema": "structured_outputs.json",
    **{kind: f"structured_outputs.{kind}" for kind in ("json_object", "regex", "choice", "grammar")},
}


def _option_of_field(params: Iterable["Parameter"]) -> dict[str, str]:
    found = {}
    for param in params:
        option = _long_name(param)
        if option is not None and param.name is not None:
            found[_OTHER_FIELDS.get(param.name, param.name)] = option
    return found


def _long_name(param: "Parameter") -> str | None:
    return next((option for option in param.opts if option.startswith("--")), None)


def explain(error: TyperException) -> str:
    """One line about a command line that cannot be parsed, or about an option's value."""
    context = getattr(error, "ctx", None)
    return _explained(error, context).removesuffix(".") + (
        "" if context is None else f" (see `{context.command_path} --help`)"
    )


def _explained(error: TyperException, context: Any) -> str:
    name = getattr(error, "option_name", None)
    if name is not None and context is not None and hasattr(error, "possibilities"):
        return _after_the_command(str(name), context) or _unknown_option(
            str(name), context.command.get_params(context)
        )
    if name is not None and "requires" in error.message:
        return f"{name} needs a value"
    if extra := re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)", error.message, re.DOTALL):
        return f"unexpected argument {extra[1]!r}: quote a prompt that has spaces"
    param = getattr(error, "param", None)
    if param is not None and _is_number(param):
        return f"{_long_name(param) or param.opts[0]} must be {_wanted(param.type)}, not {_value(error)}"
    if param is not None and context is not None and _is_from_environment(param, context):
        return f"{param.envvar} must be 1 (on) or 0 (off), not {_value(error)}"
    hint = getattr(error, "param_hint", None) or (None if param is None else _long_name(param))
    return f"{hint}: {error.message}" if hint and error.message else error.format_message()


def _after_the_command(name: str, context: Any) -> str | None:
    """The message for an option in front of the command that it belongs to; None if no command has it."""
    for command, found in getattr(context.command, "commands", {}).items():
        if any(name in param.opts for param in found.params):
            return f"{name} goes after the command: `{context.command_path} {command} {name} ...`"
    return None


def _unknown_option(name: str, params: Sequence["Parameter"]) -> str:
    known = [option for param in params for option in (*param.opts, *param.secondary_opts)]
    if name == "--prompt" and name not in known:
        return "there is no option --prompt: give the prompt as an argument"
    if not name.startswith("--") and any(param.param_type_name == "argument" for param in params):
        return f"there is no option {name}: put -- in front of a prompt that starts with -"
    guesses = _guesses(name, [option for option in known if option.startswith("--")])
    if not guesses:
        return f"there is no option {name}"
    return f"there is no option {name}; did you mean {' or '.join(guesses)}?"


def _guesses(name: str, known: list[str]) -> list[str]:
    """The options that a name may stand for; only one if it is the name that another program uses."""
    plain = letters(name)
    other = {letters(one): option for one, option in _OTHER_NAMES.items() if option in known}
    is_known = plain in map(letters, known)
    return [other[plain]] if plain in other and not is_known else closest(name, known)


def _is_number(param: "Parameter") -> bool:
    return param.type.name in ("int", "int range", "float", "float range")


def _is_from_environment(param: Any, context: Any) -> bool:
    """Whether a switch got its value from an environment variable."""
    source = context.get_parameter_source(param.name)
    return source is not None and source.name == "ENVIRONMENT" and param.is_flag


def _wanted(kind: Any) -> str:
    """What a number must be: `a whole number from 0 to 65535`."""
    wanted = "a whole number" if kind.name.startswith("int") else "a number"
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    if least is not None and most is not None:
        return f"{wanted} from {least:g} to {most:g}"
    return wanted if least is None else f"{wanted} of at least {least:g}"


def _value(error: TyperException) -> str:
    """The value at the start of an error's message, such as `'abc' is not a valid int`."""
    return error.message.partition(" is not ")[0]
