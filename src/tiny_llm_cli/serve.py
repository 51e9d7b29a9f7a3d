"""`tiny-llm serve`: OpenAI's API over HTTP."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .engine import load_silently
from .key_file import read_keys
from .model_check import check_model
from .options import EngineOptions, parse_bytes, parse_object, takes_groups

if TYPE_CHECKING:
    from tiny_llm_server import ServerConfig

_SERVER, _ACCESS, _DEFAULTS = "Server", "Access", "Sampling defaults"
_ANSWERS = "Tools and reasoning"
_REPLICAS, _POLICIES = "Replicas", ("prefix", "least-loaded", "round-robin")
_LIMITS, _CONNECTIONS, _LOGGING = "Limits of a request", "Connections", "Page and log"
_KEY_VARIABLE = "TINY_LLM_API_KEY"  # holds one key, whatever characters are in it
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
_DEMO_BLOCKS = 96
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The fields of `ServerConfig`: who may send requests, and how large they may be."""

    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in requests and answers.",
            show_default="the model's own name",
            rich_help_panel=_SERVER,
        ),
    ] = None
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Accept only requests with this key; may be repeated. Without the option, the key is read "
            f"from {_KEY_VARIABLE}.",
            show_default="no key needed",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    isolate_keys: Annotated[
        bool,
        typer.Option(
            "--isolate-keys",
            help="Give each API key its own prefix cache, so that clients cannot find out by timing what "
            "others sent.",
            rich_help_panel=_ACCESS,
        ),
    ] = False
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin",
            help="Accept requests from web pages of this origin (CORS); may be repeated.",
            show_default="none",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Accept only requests for this host name (the Host header); may be repeated.",
            show_default="any host; if the server listens on 127.0.0.1 without a key, only 127.0.0.1 and "
            "localhost",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    max_body_bytes: Annotated[
        int,
        typer.Option(
            "--max-body",
            help="Largest request body; larger ones get 413.",
            metavar="SIZE",
            parser=parse_bytes,
            show_default="4MiB",
            rich_help_panel=_LIMITS,
        ),
    ] = 4 << 20
    body_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that a client has to send a body; after that, it gets 408.", rich_help_panel=_LIMITS
        ),
    ] = 60.0
    body_memory_bytes: Annotated[
        int,
        typer.Option(
            "--body-memory",
            help="Memory for the bodies of all requests together; beyond it, requests get 503.",
            metavar="SIZE",
            parser=parse_bytes,
            show_default="64MiB",
            rich_help_panel=_LIMITS,
        ),
    ] = 64 << 20
    max_connections: Annotated[
        int,
        typer.Option(
            help="The most open connections. Beyond that, a new one replaces the connection that has been "
            "idle longest; if all are busy, the new one gets 503.",
            rich_help_panel=_CONNECTIONS,
        ),
    ] = 1000
    header_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that a client has to send a request's headers.", rich_help_panel=_CONNECTIONS
        ),
    ] = 10.0
    timeout_keep_alive: Annotated[
        int,
        typer.Option(
            help="Seconds that an idle connection stays open between two requests.",
            rich_help_panel=_CONNECTIONS,
        ),
    ] = 60
    unread_timeout: Annotated[
        float,
        typer.Option(
            help="Close a connection whose client reads nothing of its answer for this many seconds.",
            rich_help_panel=_CONNECTIONS,
        ),
    ] = 60.0
    max_n: Annotated[
        int, typer.Option(help="The most completions of one prompt (n).", rich_help_panel=_LIMITS)
    ] = 16
    max_stop: Annotated[
        int, typer.Option(help="The most stop strings in one request.", rich_help_panel=_LIMITS)
    ] = 16
    max_prompts: Annotated[
        int, typer.Option(help="The most prompts in one request to /v1/completions.", rich_help_panel=_LIMITS)
    ] = 64
    max_sequences: Annotated[
        int,
        typer.Option(help="The most sequences in one request: its prompts times n.", rich_help_panel=_LIMITS),
    ] = 128
    ignore_unknown_fields: Annotated[
        bool,
        typer.Option(
            "--ignore-unknown-fields",
            help="Ignore fields of a request that are in neither OpenAI's API nor vLLM's, and log the name "
            "of each once, instead of answering with 400. Known fields that are not supported still get 400.",
            rich_help_panel=_LIMITS,
        ),
    ] = False
    scheduling_policy: Annotated[
        str,
        typer.Option(
            help="fcfs: first come, first served; requests with a priority get 400. priority: requests may "
            "set a priority, and lower numbers run first.",
            metavar="fcfs|priority",
            rich_help_panel=_LIMITS,
        ),
    ] = "fcfs"
    request_timeout: Annotated[
        float,
        typer.Option(
            help="Abort a request that has waited and run for this many seconds; 0 means no limit.",
            rich_help_panel=_LIMITS,
        ),
    ] = 600.0
    keep_alive: Annotated[
        float,
        typer.Option(
            help="Send an SSE comment after this many seconds without an event in a stream.",
            rich_help_panel=_CONNECTIONS,
        ),
    ] = 15.0
    override_generation_config: Annotated[
        Any,
        typer.Option(
            help="Sampling parameters for the fields that a request leaves out, as JSON: "
            '\'{"temperature": 0.2, "top_p": 0.9}\'. They replace those of the model. The accepted '
            "parameters are temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty and "
            "max_new_tokens.",
            metavar="JSON",
            parser=parse_object,
            show_default="the model's own",
            rich_help_panel=_DEFAULTS,
        ),
    ] = None
    tool_call_parser: Annotated[
        str,
        typer.Option(
            help="How the model writes calls of tools: hermes (also Qwen), llama3_json, mistral or smollm2. "
            "auto: as the chat template shows; smollm2 if it has no tools. none: reject requests with tools.",
            metavar="NAME",
            rich_help_panel=_ANSWERS,
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        typer.Option(
            help="How the model marks its reasoning, which answers have in reasoning_content: qwen3 "
            "(<think>), deepseek_r1 (the same, but every answer starts with reasoning) or mistral ([THINK]). "
            "auto: as the chat template shows. none: reasoning is a part of the content.",
            metavar="NAME",
            rich_help_panel=_ANSWERS,
        ),
    ] = "auto"
    live: Annotated[
        bool,
        typer.Option(
            help="Serve the page at /, with a chat and a view of the KV pool, and its event stream /live.",
            rich_help_panel=_LOGGING,
        ),
    ] = True
    log_requests: Annotated[
        bool,
        typer.Option(
            "--log-requests",
            help="Log prompts and sampling parameters too, at --log-level info or debug.",
            rich_help_panel=_LOGGING,
        ),
    ] = False


@takes_groups(max_num_waiting=256)
def serve(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 accepts connections from other machines.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help="Port to listen on; 0 picks a free one.", min=0, max=65535, rich_help_panel=_SERVER
        ),
    ] = 8000,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that running and waiting requests have to finish after Ctrl-C or SIGTERM.",
            min=0,
            rich_help_panel=_SERVER,
        ),
    ] = 30.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Accept the keys in this file too, one on each line, besides those of --api-key or "
            f"{_KEY_VARIABLE}. Blank lines and lines that start with # are ignored.",
            metavar="FILE",
            show_default="none",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed from which requests without one get theirs: with the same value, the n-th request "
            "after every start gets the same seed.",
            rich_help_panel=_DEFAULTS,
        ),
    ] = 0,
    replicas: Annotated[
        int,
        typer.Option(
            help="Engines that serve the requests, each in a process of its own with its own model and KV "
            "pool; they share --threads. More than 1 needs Ray: docs/cluster.md says how to install it.",
            min=1,
            rich_help_panel=_REPLICAS,
        ),
    ] = 1,
    routing_policy: Annotated[
        str,
        typer.Option(
            help="Which replica gets a request. prefix: the one with the least work before the first token, "
            "which is less where the prompt's start is cached. least-loaded: the same without the cache. "
            "round-robin: each in turn.",
            metavar="|".join(_POLICIES),
            rich_help_panel=_REPLICAS,
        ),
    ] = "prefix",
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help=f"Use a pool of only {_DEMO_BLOCKS} blocks and swapping, so that the page at / shows prefix "
            "sharing, forks and preemption within a minute.",
            rich_help_panel=_LOGGING,
        ),
    ] = False,
    log_level: Annotated[
        str,
        typer.Option(
            help="info logs a line for each finished request and the throughput every 10 s; debug adds "
            "requests for the page, /health and /metrics, and the lines of the HTTP server itself (uvicorn).",
            metavar="|".join(_LOG_LEVELS),
            rich_help_panel=_LOGGING,
        ),
    ] = "info",
    *,
    server: ServerOptions,
    engine: EngineOptions,
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    \b
    Start the server with the embedded model:
      tiny-llm serve
    Ask it from another terminal:
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    See how it works: open http://127.0.0.1:8000 and press "Load it":
      tiny-llm serve --demo
    Accept requests from other machines, with a key:
      tiny-llm serve --host 0.0.0.0 --api-key choose-your-own-key

    GET /health returns 503 until the model is loaded. The first Ctrl-C or SIGTERM refuses new requests and
    lets the others finish within --grace seconds; the second one aborts them.

    All requests share one KV pool of blocks, each with the keys and values of --block-size tokens. Requests
    with a common prefix share its blocks. If the pool runs out of blocks, the newest request is preempted and
    continues later, with the same answer.
    """
    if log_level not in _LOG_LEVELS:
        known = ", ".join(_LOG_LEVELS)
        raise typer.BadParameter(f"{log_level!r} is not one of {known}", param_hint="--log-level")
    if demo:
        _check_demo(context)
        engine = replace(engine, num_blocks=_DEMO_BLOCKS, preemption_mode="swap")
    if routing_policy not in _POLICIES:
        known = ", ".join(_POLICIES)
        raise typer.BadParameter(f"{routing_policy!r} is not one of {known}", param_hint="--routing-policy")
    from tiny_llm_server import make_app
    from tiny_llm_server.serve import GracefulServer, listen

    config = server_config(server, host, () if api_key_file is None else _keys_of(api_key_file))
    check_model(engine, seed=seed)
    if host not in _LOOPBACK and not config.api_keys:
        print(
            f"tiny-llm: warning: other machines may reach {host}, and requests need no key: see --api-key",
            file=sys.stderr,
        )
    if replicas == 1:
        app = make_app(partial(load_silently, engine, seed=seed), config)
        GracefulServer(app, host, port, grace, log_level).run(listen(host, port))
        return
    from .replicas import Replicated

    with Replicated(engine, replicas, routing_policy, grace, seed) as replicated:
        app = make_app(replicated.load, replace(config, live=False))  # the page shows one pool
        http_server = GracefulServer(app, host, port, grace, log_level)
        replicated.watch(http_server.fail)
        http_server.run(listen(host, port))


def _keys_of(file: Path) -> Sequence[str]:
    """The keys of a file; warns if other users can access it. Raises a usage error for an invalid file."""
    try:
        keys, is_private = read_keys(file)
    except OSError as error:
        reason = f"{file}: {error.strerror or error}"
        raise typer.BadParameter(reason, param_hint="--api-key-file") from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--api-key-file") from error
    if not is_private:
        warning = f"tiny-llm: warning: other users can access {file}, which holds API keys: run chmod 600"
        print(warning, file=sys.stderr)
    return keys


def _check_demo(context: typer.Context) -> None:
    """Reject options that --demo would override, or that would leave nothing to see."""
    for name in ("num_blocks", "kv_cache_memory", "preemption_mode", "batching", "live", "replicas"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"it sets a pool of {_DEMO_BLOCKS} blocks with swapping: leave {option} out",
                param_hint="--demo",
            )


def server_config(
    options: ServerOptions, host: str = "0.0.0.0", keys_of_file: Sequence[str] = ()
) -> "ServerConfig":
    """Make a `ServerConfig` from `options`.

    host: the address to listen on. Allowed hosts are those of `options.allowed_hosts` and the loopback's
    names. Without `options.allowed_hosts`, these names are the only ones if `host` is one of them and there
    are no keys; otherwise any host is allowed. keys_of_file: API keys in addition to those of the options, or
    to that of the environment if the options have none.
    """
    from tiny_llm_server import ServerConfig

    values = asdict(options)
    held = os.environ.get(_KEY_VARIABLE)
    keys = (*(options.api_keys or ([] if held is None else [held])), *keys_of_file)
    hosts = tuple(options.allowed_hosts or ())
    values["api_keys"] = keys
    values["allowed_hosts"] = hosts + _LOOPBACK if hosts or (host in _LOOPBACK and not keys) else ()
    values["allowed_origins"] = tuple(options.allowed_origins or ())
    values["request_timeout"] = options.request_timeout or None
    values["override_generation_config"] = options.override_generation_config or {}
    return ServerConfig(**values)
