"""Options that several commands share, and how a command takes them.

A group of options is a frozen dataclass: each field is one option. A command decorated with `takes_groups`
has a parameter of that type. The defaults are written here and a test compares them with the engine's,
because importing the engine to ask for them would make `--help` slow.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from math import isinf
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from .threads import set_threads, threads_option

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}{unit}": 1024**power for power, prefix in enumerate("kmgt", 1) for unit in ("", "ib")}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_SAMPLING, _ENGINE, _TUNING = "Sampling", "Engine", "Engine tuning"


def parse_bytes(text: str | int) -> int:
    """`512MiB`, `1.5GiB`, `2GB` or a plain number of bytes -> bytes. KiB and K are 1024, KB is 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(
            f"{text!r} is not a size such as 512MiB, 1.5GiB or 2GB (KiB, MiB, GiB and TiB are powers of "
            "1024; KB, MB, GB and TB are powers of 1000; a number without a unit is in bytes)"
        )
    number = float(match[1]) * _UNITS[match[2]]
    if isinf(number):
        raise typer.BadParameter(f"{str(text)[:20]!r}... is too large")
    return int(number)


def parse_object(text: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse a JSON object: `{"temperature": 0.2}`."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise typer.BadParameter(f'{text!r} is not a JSON object, such as {{"name": "value"}}')
    return value


class Bias(NamedTuple):
    """A token id and the number to add to its logit."""

    token_id: int
    bias: float


def parse_bias(text: str) -> Bias:
    """`42=-100` -> `Bias(42, -100.0)`."""
    match = re.fullmatch(r"(\d+)=([+-]?\d+(?:\.\d+)?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not ID=BIAS, for example 42=-100")
    return Bias(int(match[1]), float(match[2]))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The model, and the fields of `EngineConfig` under the same names with dashes."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A .gguf file, a folder in Hugging Face's layout, OWNER/NAME or OWNER/NAME/FILE.gguf on the "
            "Hugging Face hub, or a packaged model: smollm2 or gemma3-270m.",
            show_default="smollm2, which is SmolLM2-135M-Instruct",
            metavar="MODEL",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            "-c",
            help="Context length: the longest prompt and answer together, in tokens.",
            show_default="the model's context, or as much as the KV pool holds",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            help="Memory for the KV pool, which all requests share: 512MiB, 2GB, ...",
            show_default="512MiB, or less if that is enough for --max-num-seqs sequences of --max-model-len "
            "tokens",
            metavar="SIZE",
            parser=parse_bytes,
            rich_help_panel=_ENGINE,
        ),
    ] = None
    max_num_seqs: Annotated[
        int, typer.Option(help="The most sequences that run at the same time.", rich_help_panel=_ENGINE)
    ] = 64
    generation_config: Annotated[
        str,
        typer.Option(
            help="Which recommended sampling parameters to use: those of the model (auto), none (vllm), or "
            "those of the generation_config.json in a folder.",
            metavar="auto|vllm|FOLDER",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto"
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            help="Cache full KV blocks, so that requests that share a prefix compute it once.",
            rich_help_panel=_TUNING,
        ),
    ] = True
    activation_bits: Annotated[
        int,
        typer.Option(
            help="Bits of an activation when it is multiplied by quantized weights: 8 is faster and less "
            "accurate.",
            metavar="8|16",
            rich_help_panel=_TUNING,
        ),
    ] = 16
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="The data type of stored keys and values.",
            metavar="float32|float16|bfloat16",
            rich_help_panel=_TUNING,
        ),
    ] = "float16"
    dtype: Annotated[
        str,
        typer.Option(
            help="The data type of computation; auto is float32. Weights keep the type that they have in "
            "their file.",
            metavar="auto|float32",
            rich_help_panel=_TUNING,
        ),
    ] = "auto"
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            help="The most tokens computed in one step, counting prompt chunks and decoded tokens.",
            rich_help_panel=_TUNING,
        ),
    ] = 512
    max_num_waiting: Annotated[
        int | None,
        typer.Option(
            help="The most requests that wait in the queue; further ones are rejected.",
            show_default="no limit",
            rich_help_panel=_TUNING,
        ),
    ] = None
    preemption_mode: Annotated[
        str,
        typer.Option(
            help="What happens to the newest sequence when the KV pool is full: its keys and values are "
            "computed again later (recompute) or copied to the host and back (swap). With none, a request "
            "starts only if all of it fits.",
            metavar="recompute|swap|none",
            rich_help_panel=_TUNING,
        ),
    ] = "recompute"
    swap_space: Annotated[
        int | None,
        typer.Option(
            help="Host memory for --preemption-mode swap.",
            show_default="the size of the KV pool",
            metavar="SIZE",
            parser=parse_bytes,
            rich_help_panel=_TUNING,
        ),
    ] = None
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.", rich_help_panel=_TUNING)] = 16
    num_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks in the KV pool.",
            show_default="as many as fit in --kv-cache-memory",
            rich_help_panel=_TUNING,
        ),
    ] = None
    min_num_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks in the KV pool at the start; the pool grows on demand and shrinks again.",
            show_default="all blocks: the pool does not grow",
            rich_help_panel=_TUNING,
        ),
    ] = None
    batching: Annotated[
        str,
        typer.Option(
            help="How keys and values are stored: in KV blocks (paged), or in one contiguous cache of "
            "--max-model-len tokens for each sequence (dense), which is a baseline for comparisons.",
            metavar="paged|dense",
            rich_help_panel=_TUNING,
        ),
    ] = "paged"
    speculative_config: Annotated[
        Any,
        typer.Option(
            help="Speculative decoding: guess tokens from earlier repeats in the text, and check several in "
            'one step. Answers do not change. A JSON object: \'{"method": "ngram"}\', with optional '
            "num_speculative_tokens (default 7, at most 64), prompt_lookup_max (4) and prompt_lookup_min (2; "
            "both at most 32).",
            show_default="no speculation",
            metavar="JSON",
            parser=parse_object,
            rich_help_panel=_TUNING,
        ),
    ] = None
    chat_template_content_format: Annotated[
        str,
        typer.Option(
            help="The form in which the chat template gets the content of a message: a string, a list of "
            "parts (openai), or the form that the template expects (auto).",
            metavar="auto|string|openai",
            rich_help_panel=_TUNING,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen and when an answer stops: the fields of `SamplingParams` that commands share.

    None means that the option was not given. It then has the value that the model recommends, or else the
    value that the help shows.
    """

    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the most likely token; higher values give more varied answers.",
            show_default="the model's recommendation, or 0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="The longest answer, in tokens.",
            show_default="the model's recommendation, or 512",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="With the same seed, the same command gives the same answer.",
            show_default="a new seed each time",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Stop before this text. Repeat the option for several.",
            metavar="TEXT",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample only from the most likely tokens whose probabilities add up to this.",
            show_default="the model's recommendation, or 1 (all tokens)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample from this many of the most likely tokens.",
            show_default="the model's recommendation, or 0 (all tokens)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Never sample a token whose probability is below this share of the most likely token's.",
            show_default="the model's recommendation, or 0 (off)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1, make tokens that are in the prompt or the answer less likely; 1.1 is mild.",
            show_default="the model's recommendation, or 1 (off)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 0 (up to 2), make tokens that are already in the answer less likely; below 0 (down "
            "to -2), more likely.",
            show_default="the model's recommendation, or 0 (off)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            help="Like --presence-penalty, but in proportion to how often each token has been used; from "
            "-2 to 2.",
            show_default="the model's recommendation, or 0 (off)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_tokens: Annotated[
        int,
        typer.Option(help="Do not stop before this many tokens.", rich_help_panel=_SAMPLING),
    ] = 0
    logit_bias: Annotated[
        list[Bias] | None,
        typer.Option(
            help="Add a number from -100 (never) to 100 (always) to the score of a token, for example "
            "42=-100. Repeat the option for several.",
            metavar="ID=BIAS",
            parser=parse_bias,
            rich_help_panel=_SAMPLING,
        ),
    ] = None


def takes_groups(
    *, shown: Mapping[str, str] | None = None, **defaults: object
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take groups of options: a parameter whose type is a group becomes that group's options.

    The options take the parameter's place in the help. A command that takes `EngineOptions` has `--threads`
    too, which is set before the command runs.

    defaults: this command's own defaults, by field name. shown: by field name, the words that this command's
    help shows as the default, for a field that keeps the group's default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, type] = {}
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            hint = hints[name]
            if not is_dataclass(hint):
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
                continue
            groups[name] = hint  # type: ignore[assignment]
            parameters += _options_of(groups[name], defaults, shown or {})
            if hint is EngineOptions:
                parameters.append(threads_option(_ENGINE))

        def run(*, threads: int | None = None, **values: Any) -> None:
            if threads is not None:
                set_threads(threads)
            built = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            command(**values, **built)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _options_of(
    group: type, defaults: Mapping[str, object], shown: Mapping[str, str]
) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    show_default: dict[str, bool | str] = {**dict.fromkeys(defaults, True), **shown}
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=_showing(hints[field.name], show_default.get(field.name)),
        )
        for field in fields(group)
    ]


def _showing(hint: Any, show_default: bool | str | None) -> Any:
    """The same option with another default in its help: the value (True) or words; None changes nothing."""
    if show_default is None:
        return hint
    option = copy(hint.__metadata__[0])
    option.show_default = show_default
    return Annotated[hint.__origin__, option]
