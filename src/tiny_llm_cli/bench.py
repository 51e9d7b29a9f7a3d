"""`tiny-llm bench`: how fast the engine answers one request, many requests, and requests over HTTP."""

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from .bench_checks import LongestRequest, check_api_key, check_concurrency, load_for
from .command import Command, Group
from .options import EngineOptions, takes_groups
from .serve_address import Backend, address_of

bench_app = typer.Typer(cls=Group, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
_Seed = Annotated[int, typer.Option(help="Seed of the random prompts.")]


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure speed: one request, many requests, or a running server.

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
        int, typer.Option(min=1, help="Prompt length when prefill is measured, in tokens.")
    ] = 512,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length when decode is measured, in tokens.")
    ] = 32,
    output_tokens: Annotated[int, typer.Option(min=2, help="Answer length when decode is measured.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Measured runs; the result is their median.")] = 5,
    warmups: Annotated[int, typer.Option(min=0, help="Unmeasured runs before the measured ones.")] = 1,
    seed: _Seed = 0,
    engine: EngineOptions,
) -> None:
    """Measure the speed of one request at a time.

    \b
    tiny-llm bench latency
    tiny-llm bench latency --prefill-tokens 1024 --repetitions 3 --json

    decode: the tokens after the first, divided by the time after the first token. prefill: the tokens of a
    prompt, divided by the time to its first output token. ttft: time to the first token, for a prompt of
    --prompt-tokens. Prompts are random tokens.
    """
    llm = load_for(
        engine,
        LongestRequest("--prefill-tokens", prefill_tokens, 1),
        LongestRequest("--prompt-tokens, --output-tokens", prompt_tokens, output_tokens),
    )
    from .bench_latency import LatencyRun, measure_latency
    from .bench_tables import as_latency_table

    run = LatencyRun(prefill_tokens, prompt_tokens, output_tokens, repetitions, warmups, seed)
    _show(measure_latency(llm, run, _progress), as_json, as_latency_table)


@bench_app.command(cls=Command)
@takes_groups()
def throughput(
    *,
    as_json: _Json = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 32,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")] = 16,
    min_input_tokens: Annotated[int, typer.Option(min=1, help="Shortest prompt, in tokens.")] = 32,
    max_input_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")] = 160,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer, in tokens.")] = 64,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens in front of every prompt, the same for all.")
    ] = 0,
    seed: _Seed = 0,
    engine: EngineOptions,
) -> None:
    """Measure the speed of many requests together.

    \b
    tiny-llm bench throughput
    tiny-llm bench throughput --shared-prefix 256 --json

    The figures have the same names as in `vllm bench serve`: ttft is the time to the first token, tpot the
    time per output token after it, itl the time between two tokens, e2el the time to the last token. A new
    request arrives when another one ends. Prompts are random tokens, the same for the same --seed.
    """
    if min_input_tokens > max_input_tokens:
        raise typer.BadParameter(
            f"{min_input_tokens} is more than --max-input-tokens ({max_input_tokens})",
            param_hint="--min-input-tokens",
        )
    check_concurrency(engine, min(max_concurrency, num_prompts))
    options = "--shared-prefix, --max-input-tokens, --output-tokens"
    llm = load_for(engine, LongestRequest(options, shared_prefix + max_input_tokens, output_tokens))
    from .bench_tables import as_throughput_table
    from .bench_throughput import ThroughputRun, measure_throughput

    run = ThroughputRun(
        num_prompts, max_concurrency, min_input_tokens, max_input_tokens, output_tokens, shared_prefix, seed
    )
    _show(measure_throughput(llm, run, _progress), as_json, as_throughput_table)


def _only_random(name: str) -> str:
    if name != "random":
        raise typer.BadParameter(
            f"{name!r} is not available: the only data set is random", param_hint="--dataset-name"
        )
    return name


@bench_app.command(cls=Command)
def serve(
    *,
    as_json: _Json = False,
    backend: Annotated[
        Backend,
        typer.Option(
            help="The API to measure: completions (openai, vllm) or chats (openai-chat).",
            metavar="openai|openai-chat|vllm",
        ),
    ] = "openai",
    base_url: Annotated[
        str | None,
        typer.Option(help="The server, with or without /v1.", metavar="URL", show_default="http://HOST:PORT"),
    ] = None,
    host: Annotated[str, typer.Option(help="The server's host, if there is no --base-url.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The server's port, if there is no --base-url.")
    ] = 8000,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="The path that requests go to.",
            metavar="PATH",
            show_default="/v1/completions, or /v1/chat/completions for openai-chat",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model to ask for.",
            metavar="NAME",
            show_default="the server's model, if it has only one",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The API key to send, if the server requires one.",
            metavar="KEY",
            envvar="OPENAI_API_KEY",
            show_default="no key",
        ),
    ] = None,
    dataset_name: Annotated[
        str,
        typer.Option(help="The prompts; random is the only choice.", metavar="random", callback=_only_random),
    ] = "random",
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 64,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that run at the same time.", show_default="no limit"),
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second, sent at random times; inf sends all at once.")
    ] = math.inf,
    random_input_len: Annotated[int, typer.Option(min=1, help="Length of a prompt, in tokens.")] = 96,
    random_output_len: Annotated[int, typer.Option(min=1, help="Length of an answer, in tokens.")] = 64,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Vary both lengths by up to this fraction.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens in front of every prompt, the same for all.")
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for answers of the full length, even past an end-of-sequence token, so that runs can "
            "be compared. Not every server supports it."
        ),
    ] = True,
    seed: _Seed = 0,
) -> None:
    """Measure a running server that has OpenAI's API.

    \b
    tiny-llm bench serve
    tiny-llm bench serve --max-concurrency 16 --json
    tiny-llm bench serve --backend openai-chat --request-rate 4
    tiny-llm bench serve --base-url http://127.0.0.1:9000 --api-key "$KEY"

    Start the server first, for example with `tiny-llm serve`. After one warmup request, --num-prompts
    requests are sent, streamed and greedy. Prompts are random token ids from 1,000 to 29,999. Chats are
    random English words of about one token each, to which the server adds its template. The same --seed
    sends the same requests.

    The command has a subset of the options of `vllm bench serve`, with smaller defaults. It does not have
    vLLM's other data sets, its sampling options, --tokenizer, --burstiness, --ramp-up-strategy,
    --num-warmups, --percentile-metrics, --goodput, --label or --save-result. --json has the keys that vLLM
    saves, but with error_counts (how often each error occurred) instead of a list of errors.
    output_tokens_are says how output tokens were counted: by the server (usage), or as streamed chunks with
    text (chunks) if the server does not count them.
    """
    if not request_rate > 0:
        raise typer.BadParameter(f"must be above 0, not {request_rate}", param_hint="--request-rate")
    check_api_key(api_key)
    from .bench_serve import measure_server
    from .bench_tables import as_serve_table
    from .serve_load import ServeRun

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
            f"{run.base_url} does not report usage: output tokens are counted as streamed chunks with text, "
            "and prompt tokens are those that were sent",
            stacklevel=1,
        )
    _show(result, as_json, as_serve_table)


def _show(result: Mapping[str, object], as_json: bool, as_table: Callable[[Mapping[str, Any]], str]) -> None:
    print(json.dumps(result, allow_nan=False) if as_json else as_table(result))


def _progress(what: str, done: int, total: int) -> None:
    """Rewrite one line on a terminal. A bar with a thread would disturb the measurement."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{what} {done}/{total}", end=end, file=sys.stderr, flush=True)
