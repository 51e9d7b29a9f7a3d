"""Options that several commands share, and how a command takes them.

A group of options is a frozen dataclass, declared once: each field is one option. A command decorated
with `takes_groups` has a parameter of that type. Defaults are written here, and a test holds them equal
to the engine's, because importing the engine to ask would make `--help` slow.
"""

import inspect
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click.formatting import HelpFormatter

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}{unit}": 1024**power for power, prefix in enumerate("kmgt", 1) for unit in ("", "ib")}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_SAMPLING, _ENGINE = "Sampling", "Engine"


def parse_bytes(text: str | int) -> int:
    """`512MiB`, `1.5GiB`, `2GB` or a plain number of bytes -> bytes. KiB and K are 1024, KB is 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(
            f"{text!r} is not a size: write for example 512MiB, 1.5GiB or 2GB "
            "(units: KiB, MiB, GiB and TiB of 1024; KB, MB, GB and TB of 1000; none: bytes)"
        )
    return int(float(match[1]) * _UNITS[match[2]])


class Bias(NamedTuple):
    """A token id and what is added to its logit."""

    token_id: int
    bias: float


def parse_bias(text: str) -> Bias:
    """`42=-100` -> the bias of token 42."""
    match = re.fullmatch(r"(\d+)=([+-]?\d+(?:\.\d+)?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not ID=BIAS: write for example 42=-100")
    return Bias(int(match[1]), float(match[2]))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The model file and the fields of `EngineConfig`, under the same names with dashes."""

    model: Annotated[
        str | None,
        typer.Option(
            help="A .gguf file, a folder in Hugging Face's layout, OWNER/NAME on the hub, or one file of it, "
            "OWNER/NAME/FILE.gguf.",
            show_default="the embedded SmolLM2-135M-Instruct",
            metavar="MODEL",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    chat_template_content_format: Annotated[
        str,
        typer.Option(
            help="What the chat template gets as a message's content: string, openai (a list of parts), or "
            "auto, which finds out.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto"
    block_size: Annotated[
        int, typer.Option(help="Tokens in one block of the KV pool.", rich_help_panel=_ENGINE)
    ] = 16
    num_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks in the KV pool.", show_default="from --kv-cache-memory", rich_help_panel=_ENGINE
        ),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            help="Bytes for the KV pool, for example 1GiB.",
            show_default="512MiB, less where less is enough",
            metavar="SIZE",
            parser=parse_bytes,
            rich_help_panel=_ENGINE,
        ),
    ] = None
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences that run in one step.", rich_help_panel=_ENGINE)
    ] = 64
    max_num_waiting: Annotated[
        int | None,
        typer.Option(
            help="Requests that may wait at once before the next is turned away.",
            show_default="any number",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(help="Tokens in one step, prompt chunks and decodes together.", rich_help_panel=_ENGINE),
    ] = 512
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt + output in tokens.",
            show_default="the model's context, or what the pool holds",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            help="What is computed in: auto, which is float32; weights stay in their file's type.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="How keys and values are stored: float32, float16 or bfloat16.", rich_help_panel=_ENGINE
        ),
    ] = "float16"
    activation_bits: Annotated[
        int,
        typer.Option(
            help="Bits of an activation where weights are quantized: 16, or 8, faster and less accurate.",
            rich_help_panel=_ENGINE,
        ),
    ] = 16
    min_num_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks that the pool begins with; it grows while they are short, and shrinks again.",
            show_default="all of them",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            help="Keep blocks, so that a prompt that begins like an earlier one is not computed again.",
            rich_help_panel=_ENGINE,
        ),
    ] = True
    preemption_mode: Annotated[
        str,
        typer.Option(
            help="When pages run out, the newest gives way, and is computed again (recompute) or copied to "
            "the host and back (swap); none admits only what fits whole.",
            rich_help_panel=_ENGINE,
        ),
    ] = "recompute"
    swap_space: Annotated[
        int | None,
        typer.Option(
            help="Bytes on the host for --preemption-mode swap, for example 1GiB.",
            show_default="as many as the pool has",
            metavar="SIZE",
            parser=parse_bytes,
            rich_help_panel=_ENGINE,
        ),
    ] = None
    batching: Annotated[
        str,
        typer.Option(
            help="Where keys and values live: paged (blocks) or dense (a contiguous cache of --max-model-len "
            "tokens each: the baseline).",
            rich_help_panel=_ENGINE,
        ),
    ] = "paged"
    generation_config: Annotated[
        str,
        typer.Option(
            help="Sampling defaults: auto, those that the model's files recommend; vllm, none of these; or a "
            "folder with a generation_config.json.",
            metavar="auto|vllm|FOLDER",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen and when an answer ends: the fields of `SamplingParams` that commands share.

    None is an option that was not given: it then has what the model recommends, or else the value that the
    help shows.
    """

    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the likeliest token; higher is more varied.",
            show_default="the model's own, or 0: greedy, reproducible",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the likeliest tokens up to this total probability.",
            show_default="the model's own, or 1.0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep the k likeliest tokens; 0 keeps all.",
            show_default="the model's own, or 0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop tokens less likely than this share of the likeliest.",
            show_default="the model's own, or 0.0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed gives the same answer.",
            show_default="a new one each time",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer in tokens.",
            show_default="the model's own, or 512 (generate: 128)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End the answer before this text; may be repeated.",
            metavar="TEXT",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float,
        typer.Option(
            help="Above 0: words that are there come back less; -2 to 2.", rich_help_panel=_SAMPLING
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(help="The same, more with each time; -2 to 2.", rich_help_panel=_SAMPLING),
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Divides the scores of tokens in prompt and answer; 1 is off, 1.1 a little.",
            show_default="the model's own, or 1.0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_tokens: Annotated[
        int, typer.Option(help="Nothing ends the answer before this many tokens.", rich_help_panel=_SAMPLING)
    ] = 0
    logit_bias: Annotated[
        list[Bias] | None,
        typer.Option(
            help="Add to a token's score, -100 (never) to 100 (always), as in 42=-100; may be repeated.",
            metavar="ID=BIAS",
            parser=parse_bias,
            rich_help_panel=_SAMPLING,
        ),
    ] = None


def takes_groups(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take groups of options: a parameter whose type is one becomes that group's options.

    defaults: other defaults than the group's, by field name, for this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        options = [option for group in groups.values() for option in _options_of(group, defaults)]

        def run(**values: Any) -> None:
            built = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            command(**values, **built)

        parameters = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in own] + options
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _options_of(group: type, defaults: dict[str, object]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=_shown(hints[field.name]) if field.name in defaults else hints[field.name],
        )
        for field in fields(group)
    ]


def _shown(hint: Any) -> Any:
    """The same option, whose help shows a number where it had words for the group's own default."""
    option = copy(hint.__metadata__[0])
    option.show_default = True
    return Annotated[hint.__origin__, option]


class GroupedCommand(TyperCommand):
    """A command whose help shows each group of options under its own heading, in plain text."""

    def format_options(self, ctx: typer.Context, formatter: "HelpFormatter") -> None:  # type: ignore[override]
        """Write one section a group, in the order in which the groups first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            default = "Options" if param.param_type_name == "option" else "Arguments"
            if record is not None:
                sections.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
