"""`tiny-llm bench`: how fast the engine answers one request, and many."""

import json
import math
import sys
import warnings
from typing import Annotated

import typer

from .command import Command, Group
from .engine import load
from .options import EngineOptions, takes_groups
from .serve_address import Backend, address_of

bench_app = typer.Typer(cls=Group, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
_Seed = Annotated[int, typer.Option(help="Source of the random prompts.")]


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure speed: of one request, of many, or of a running server.

    \b
    tiny-llm bench latency
    tiny-llm bench throughput --num-prompts 16
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench_app.command(cls=Command)
@takes_groups(max_num_seqs=1)
def latency(
    *,
    as_json: _Json = False,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt that prefill is measured with, in tokens.")
    ] = 512,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt before the tokens that decode is measured with.")
    ] = 32,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens that decode is measured with.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 5,
    warmups: Annotated[int, typer.Option(min=0, help="Runs of each before them.")] = 1,
    seed: _Seed = 0,
    engine: EngineOptions,
) -> None:
    """One stream: decode and prefill speed in tokens per second, and the time to the first token.

    \b
    tiny-llm bench latency --json
    tiny-llm bench latency --prefill-tokens 2048 --repetitions 3

    Prompts are random tokens. Decode: the tokens after the first, over the time after the first.
    Prefill: a prompt's tokens over the time to its first output token. ttft_ms: that time after the
    short prompt.
    """
    from .bench_latency import LatencyRun, measure_latency

    run = LatencyRun(prefill_tokens, prompt_tokens, output_tokens, repetitions, warmups, seed)
    _show(measure_latency(load(engine), run, _progress), as_json)


@bench_app.command(cls=Command)
@takes_groups()
def throughput(
    *,
    as_json: _Json = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 32,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 16,
    min_input_tokens: Annotated[int, typer.Option(min=1, help="Shortest prompt in tokens.")] = 32,
    max_input_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt in tokens.")] = 160,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens out of each request.")] = 64,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens that all prompts begin with, in addition.")
    ] = 0,
    seed: _Seed = 0,
    engine: EngineOptions,
) -> None:
    """Many requests: the figures of `vllm bench serve`, under its names.

    \b
    tiny-llm bench throughput
    tiny-llm bench throughput --shared-prefix 256 --json

    A new request arrives when one ends. Prompts are random tokens, the same for the same --seed.
    """
    from .bench_throughput import ThroughputRun, measure_throughput

    if min_input_tokens > max_input_tokens:
        raise typer.BadParameter(
            f"{min_input_tokens} is more than --max-input-tokens ({max_input_tokens})",
            param_hint="--min-input-tokens",
        )
    run = ThroughputRun(
        num_prompts, max_concurrency, min_input_tokens, max_input_tokens, output_tokens, shared_prefix, seed
    )
    _show(measure_throughput(load(engine), run, _progress), as_json)


def _only_random(name: str) -> str:
    if name != "random":
        raise typer.BadParameter(f"{name!r} is not here: prompts are random", param_hint="--dataset-name")
    return name


@bench_app.command(cls=Command)
def serve(
    *,
    as_json: _Json = False,
    backend: Annotated[
        Backend, typer.Option(help="openai, or vllm: completions; openai-chat: chats.")
    ] = "openai",
    base_url: Annotated[
        str | None,
        typer.Option(help="The server, with or without /v1.", show_default="http://HOST:PORT"),
    ] = None,
    host: Annotated[str, typer.Option(help="The server's host, without --base-url.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port, without --base-url.")] = 8000,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="The path that is asked.",
            show_default="/v1/completions, with --backend openai-chat /v1/chat/completions",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its model.", show_default="the only one that it has")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Its key.", envvar="OPENAI_API_KEY", show_default="none")
    ] = None,
    dataset_name: Annotated[
        str, typer.Option(help="random: there is no other.", callback=_only_random)
    ] = "random",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 64,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at a time.", show_default="no limit")
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests a second, at random moments; inf: all at once.")
    ] = math.inf,
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 96,
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens out of each request.")] = 64,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="How far lengths may be from those, as a share of them.")
    ] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for all of --random-output-len, whatever the text says: on, so that runs compare. "
            "Newer versions of vLLM do so for random prompts, older ones where asked. Not every server can."
        ),
    ] = True,
    seed: _Seed = 0,
) -> None:
    """A server that runs already, ours or another with OpenAI's API, under load.

    \b
    tiny-llm serve &
    tiny-llm bench serve --max-concurrency 16
    tiny-llm bench serve --base-url http://127.0.0.1:9000 --request-rate 4 --json
    tiny-llm bench serve --backend openai-chat --port 9000

    The load: one request that does not count, then --num-prompts of them, streamed and greedy. Prompts are
    random token ids from 1,000 to 29,999; of chats, which take text alone, random English words of about one
    token each, and the server's template adds its own. The same --seed asks for the same.

    A subset of `vllm bench serve`'s flags, with smaller defaults. Not there: other data sets, --tokenizer,
    sampling, --burstiness, --ramp-up-strategy, --num-warmups, --percentile-metrics, --goodput, --label and
    --save-result. --json has the keys that vLLM saves. In place of its list of errors, one a request,
    error_counts says how often each text came; output_tokens_are says whether tokens are the server's own
    count (usage) or, where it sends none, chunks with text (chunks).
    """
    if not request_rate > 0:
        raise typer.BadParameter(f"{request_rate} is no rate: more than 0", param_hint="--request-rate")
    from .bench_serve import measure_server
    from .serve_load import ServeRun
    from .serve_table import as_serve_table

    address = address_of(backend, base_url, host, port, endpoint)
    run = ServeRun(
        backend=backend,
        base_url=address.base_url,
        endpoint=address.endpoint,
        model=model,
        api_key=api_key,
        num_prompts=num_prompts,
        max_concurrency=max_concurrency,
        request_rate=request_rate,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        random_range_ratio=random_range_ratio,
        random_prefix_len=random_prefix_len,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    result = measure_server(run, _progress)
    if result["output_tokens_are"] == "chunks":
        warnings.warn(
            f"{run.base_url} sends no usage: output tokens are counted as streamed chunks with text, "
            "prompt tokens as what was sent",
            stacklevel=1,
        )
    print(_as_json(result) if as_json else as_serve_table(result))


def _show(result: dict[str, object], as_json: bool) -> None:
    """A benchmark's figures, and under `run` what they were measured on."""
    if as_json:
        print(_as_json(result))
        return
    from .render import as_table

    run = result.pop("run")
    assert isinstance(run, dict)
    print(as_table(result), "", as_table(run), sep="\n")


def _as_json(result: dict[str, object]) -> str:
    return json.dumps(result, allow_nan=False)


def _progress(what: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten in place, without a thread that would disturb what is measured."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{what} {done}/{total}", end=end, file=sys.stderr, flush=True)
