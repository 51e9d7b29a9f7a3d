"""The server's configuration: names, keys, limits and defaults. Frozen; a bad value raises `ConfigError`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tiny_llm import ConfigError
from tiny_llm_checkpoints.reasoning_parser import reasoning_named
from tiny_llm_checkpoints.tool_formats import format_named

from .sampling_defaults import checked_overrides

MIB = 1 << 20
_COUNTS = (
    *("max_body_bytes", "body_memory_bytes", "max_connections"),
    *("max_n", "max_stop", "max_prompts", "max_sequences"),
)
NO_PARSER = ("auto", "none")  # what the options for parsers may be besides a parser's name
_SECONDS = (
    *("request_timeout", "keep_alive", "body_timeout", "header_timeout"),
    *("timeout_keep_alive", "unread_timeout"),
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Who may send requests, how large they may be, and what the server logs. Every field has a default.

    Raises `ConfigError` for an invalid value.

    served_model_name: name of the model in requests and answers; None: the model's own name.
    api_keys: requests need one of these keys; empty: no key is needed.
    isolate_keys: give each key its own prefix cache, so that a client cannot find out by timing, or by
        `cached_tokens`, what others have sent.
    allowed_origins: web pages of these origins may send requests (CORS); empty: only the server's own page.
    allowed_hosts: accepted names in the Host header; empty: any. They stop DNS rebinding: a web page whose
        name resolves to this machine.
    max_body_bytes: largest body of a request; a larger one gets 413.
    body_timeout: seconds that a client has to send a body; then 408.
    body_memory_bytes: bytes that the bodies of all requests may hold together; beyond it, requests get 503.
    max_connections: the maximum number of open connections. A new one replaces the one that has been idle
        longest; if all are busy, the new one gets 503. The limit is lower if the system allows fewer file
        descriptors.
    header_timeout: seconds that a client has to send the headers of a request; then 408.
    timeout_keep_alive: seconds that an idle connection stays open between two requests.
    unread_timeout: seconds after which a connection is closed if its client reads nothing of its answer.
    max_n, max_stop: the maximum number of completions of a prompt, and of stop strings in a request.
    max_prompts: the maximum number of prompts in one request to /v1/completions.
    max_sequences: the maximum number of sequences of one request: its prompts times n. This bounds how long
        a later request waits for this one.
    ignore_unknown_fields: ignore the fields of a request that are in neither OpenAI's API nor vLLM's, and
        log the name of each once; otherwise they are errors. A known field that is not supported is an error
        anyway, because it would change the answer.
    scheduling_policy: `fcfs` serves requests in order of arrival and refuses those with a priority;
        `priority` lets clients set one. Priorities age: for each level of priority between two requests, at
        most 32 later arrivals overtake the less urgent one.
    request_timeout: seconds after which a request is aborted, waiting or running; None: no limit.
    keep_alive: seconds without an event in a stream before an SSE comment is sent, so that clients and
        proxies keep the connection open.
    override_generation_config: sampling parameters for the fields that a request leaves out, by the names of
        generation_config.json. They replace the model's recommendation.
    tool_call_parser: the form in which the model writes calls of tools, by vLLM's name for its parser; auto:
        the form that the chat template shows; none: no tools.
    reasoning_parser: the form of the model's reasoning, likewise; none: reasoning is a part of the content.
    live: serve the page at `/` and its event stream `/live`.
    log_requests: log prompts and sampling parameters; otherwise no text of a request is logged.
    """

    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    isolate_keys: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 4 * MIB
    body_timeout: float = 60.0
    body_memory_bytes: int = 64 * MIB
    max_connections: int = 1000
    header_timeout: float = 10.0
    timeout_keep_alive: int = 60
    unread_timeout: float = 60.0
    max_n: int = 16
    max_stop: int = 16
    max_prompts: int = 64
    max_sequences: int = 128
    ignore_unknown_fields: bool = False
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    request_timeout: float | None = 600.0
    keep_alive: float = 15.0
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    live: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in _SECONDS:
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, not {seconds}")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ConfigError(f"scheduling_policy must be fcfs or priority, not {self.scheduling_policy!r}")
        checked_overrides(self.override_generation_config)
        if self.tool_call_parser not in NO_PARSER:
            format_named(self.tool_call_parser)
        if self.reasoning_parser not in NO_PARSER:
            reasoning_named(self.reasoning_parser)
        if not all(self.api_keys):
            raise ConfigError("an API key must not be empty")
        if any(key != key.strip() for key in self.api_keys):
            raise ConfigError(
                "an API key must not start or end with white space: HTTP headers cannot carry it"
            )
        if self.isolate_keys and not self.api_keys:
            raise ConfigError("isolate_keys needs api_keys")
