"""`tiny-llm serve`: OpenAI's API over HTTP."""

import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from .engine import check, load
from .options import EngineOptions, parse_bytes, takes_groups

if TYPE_CHECKING:
    from tiny_llm_server import ServerConfig

_SERVER = "Server"
_KEY_VARIABLE = "TINY_LLM_API_KEY"  # one key, whatever is in it
_DEMO_BLOCKS = 96
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Who may ask, and for how much: the fields of `ServerConfig`."""

    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="What the model is called.", show_default="the model's own name", rich_help_panel=_SERVER
        ),
    ] = None
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help=f"A key that clients must bring; may be repeated. Without it: what {_KEY_VARIABLE} holds.",
            show_default="anybody may ask",
            rich_help_panel=_SERVER,
        ),
    ] = None
    isolate_keys: Annotated[
        bool,
        typer.Option(
            "--isolate-keys",
            help="Share kept prompts among the requests of one key alone: nobody learns what others ask.",
            rich_help_panel=_SERVER,
        ),
    ] = False
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin",
            help="A web page's origin that may ask from a browser; may be repeated.",
            show_default="none",
            rich_help_panel=_SERVER,
        ),
    ] = None
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="A name under which clients reach it; may be repeated. Requests for others are refused.",
            show_default="any; on 127.0.0.1 without a key, that and localhost",
            rich_help_panel=_SERVER,
        ),
    ] = None
    max_body_bytes: Annotated[
        int,
        typer.Option(
            "--max-body",
            help="Longest body of a request.",
            metavar="SIZE",
            parser=parse_bytes,
            show_default="4MiB",
            rich_help_panel=_SERVER,
        ),
    ] = 4 << 20
    body_timeout: Annotated[
        float, typer.Option(help="Seconds that a client has to send a body.", rich_help_panel=_SERVER)
    ] = 60.0
    body_memory_bytes: Annotated[
        int,
        typer.Option(
            "--body-memory",
            help="Memory for the bodies of all requests together; more is answered with 503.",
            metavar="SIZE",
            parser=parse_bytes,
            show_default="64MiB",
            rich_help_panel=_SERVER,
        ),
    ] = 64 << 20
    max_connections: Annotated[
        int,
        typer.Option(
            help="Most open connections. For a new one the longest idle one is closed; if all are busy, the "
            "new one gets 503.",
            rich_help_panel=_SERVER,
        ),
    ] = 1000
    header_timeout: Annotated[
        float,
        typer.Option(help="Seconds that a client has to send a request's headers.", rich_help_panel=_SERVER),
    ] = 10.0
    timeout_keep_alive: Annotated[
        int,
        typer.Option(
            help="Seconds that an idle connection stays open between two requests.", rich_help_panel=_SERVER
        ),
    ] = 60
    unread_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds in which a client must read some of an answer that waits for it.",
            rich_help_panel=_SERVER,
        ),
    ] = 60.0
    max_n: Annotated[int, typer.Option(help="Most completions of a request.", rich_help_panel=_SERVER)] = 16
    max_stop: Annotated[
        int, typer.Option(help="Most stop strings of a request.", rich_help_panel=_SERVER)
    ] = 16
    max_prompts: Annotated[
        int, typer.Option(help="Most prompts of a request to /v1/completions.", rich_help_panel=_SERVER)
    ] = 64
    max_sequences: Annotated[
        int,
        typer.Option(help="Most sequences of a request: its prompts times n.", rich_help_panel=_SERVER),
    ] = 128
    scheduling_policy: Annotated[
        str,
        typer.Option(
            help="fcfs: first come, first served, and a request with a priority is refused; priority: every "
            "client may set one, the lower, the earlier.",
            rich_help_panel=_SERVER,
        ),
    ] = "fcfs"
    request_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds after which a request is given up, queued or running; 0: never.",
            rich_help_panel=_SERVER,
        ),
    ] = 600.0
    keep_alive: Annotated[
        float,
        typer.Option(
            help="Seconds of silence after which a stream says that it is still there.",
            rich_help_panel=_SERVER,
        ),
    ] = 15.0
    live: Annotated[
        bool,
        typer.Option(
            help="A page at / that chats and shows the pool, and /live, which tells it.",
            rich_help_panel=_SERVER,
        ),
    ] = True
    log_requests: Annotated[
        bool,
        typer.Option(
            "--log-requests",
            help="Write down what is asked, prompts included, with --log-level info or debug.",
            rich_help_panel=_SERVER,
        ),
    ] = False


@takes_groups(max_num_waiting=256)
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    grace: Annotated[
        float, typer.Option(help="Seconds that accepted requests have to end after Ctrl-C or SIGTERM.", min=0)
    ] = 30.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Source of the seeds of requests that bring none: the same again, the same answers."
        ),
    ] = 0,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help=f"A pool of {_DEMO_BLOCKS} blocks that swaps: so small that the page at / shows sharing, "
            "forks and preemption within a minute.",
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="critical, error, warning, info (a line a request) or debug.")
    ] = "info",
    *,
    server: ServerOptions,
    engine: EngineOptions,
) -> None:
    """Serve a model over HTTP, with OpenAI's API.

    \b
    tiny-llm serve
    tiny-llm serve --demo     # then open http://127.0.0.1:8000 and press "Load it"
    tiny-llm serve --model Qwen/Qwen3-0.6B --port 9000 --api-key "$KEY"
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

    /health says 503 until the model is loaded. The first Ctrl-C or SIGTERM lets accepted requests end, for
    --grace seconds; the second one stops at once.

    One pool holds the keys and values of all requests, in blocks of --block-size tokens; requests that begin
    alike share blocks. When none is free, the newest request gives its own up and goes on later: that is
    preemption, and its answer is the same.
    """
    if log_level not in ("critical", "error", "warning", "info", "debug"):
        raise typer.BadParameter(f"{log_level!r} is no level", param_hint="--log-level")
    if demo:
        _check_demo(context)
        engine = replace(engine, num_blocks=_DEMO_BLOCKS, preemption_mode="swap")
    from tiny_llm_server import make_app
    from tiny_llm_server.serve import GracefulServer, listen

    check(engine, seed=seed)
    config = server_config(server, host)
    if host not in _LOOPBACK and not config.api_keys:
        print(
            f"tiny-llm: warning: {host} may be reached by others, and there is no --api-key", file=sys.stderr
        )
    app = make_app(partial(load, engine, seed=seed), config)
    GracefulServer(app, host, port, grace, log_level).run(listen(host, port))


def _check_demo(context: typer.Context) -> None:
    """Refuse options that it would override, or that would leave nothing to look at."""
    for name in ("num_blocks", "kv_cache_memory", "preemption_mode", "batching", "live"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"it shows a pool of {_DEMO_BLOCKS} blocks that swaps: leave {option} out",
                param_hint="--demo",
            )


def server_config(options: ServerOptions, host: str = "0.0.0.0") -> "ServerConfig":
    """The `ServerConfig` of `options`. host: where it listens; on loopback without keys by its own names."""
    from tiny_llm_server import ServerConfig

    values = asdict(options)
    held = os.environ.get(_KEY_VARIABLE)
    keys = tuple(options.api_keys or ([] if held is None else [held]))
    hosts = tuple(options.allowed_hosts or ())
    values["api_keys"] = keys
    values["allowed_hosts"] = hosts + _LOOPBACK if hosts or (host in _LOOPBACK and not keys) else ()
    values["allowed_origins"] = tuple(options.allowed_origins or ())
    values["request_timeout"] = options.request_timeout or None
    return ServerConfig(**values)
