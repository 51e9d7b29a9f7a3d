"""How the server meets the world: names, keys and limits. Frozen; what cannot work is an error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tiny_llm import ConfigError

from .sampling_defaults import checked_overrides

MIB = 1 << 20
_COUNTS = (
    *("max_body_bytes", "body_memory_bytes", "max_connections"),
    *("max_n", "max_stop", "max_prompts", "max_sequences"),
)
_SECONDS = (
    *("request_timeout", "keep_alive", "body_timeout", "header_timeout"),
    *("timeout_keep_alive", "unread_timeout"),
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a client may ask for, and who is a client. Every field has a default that works.

    served_model_name: what the model is called in requests and answers; None: the model's own name.
    api_keys: whoever asks must bring one of them; none: anybody may ask.
    isolate_keys: kept prompts are shared among the requests of one key alone, so that nobody finds out by a
        faster answer, or by `cached_tokens`, what somebody else has asked.
    allowed_origins: web pages of these origins may ask from a browser; none: only the server's own page.
    allowed_hosts: names in the header Host that are answered; none: any. They keep out web pages whose name
        points at this machine (DNS rebinding).
    max_body_bytes: longest body of a request; more is answered with 413.
    body_timeout: seconds that a client may take to send a body; then 408.
    body_memory_bytes: bytes that the bodies of all requests may hold together; more is answered with 503.
    max_connections: most open connections; the one idle for longest is closed for a new one, or else the new
        one is answered with 503. Fewer if the system allows fewer file descriptors.
    header_timeout: seconds that a client may take to send the head of a request; then 408.
    timeout_keep_alive: seconds that an idle connection stays open between two requests.
    unread_timeout: seconds in which a client must read some of an answer that waits for it.
    max_n, max_stop: most completions, and most stop strings, of one request.
    max_prompts: most prompts in one request to /v1/completions.
    max_sequences: most sequences of one request, which are its prompts times n. It bounds how long a client
        that comes later waits behind one request.
    scheduling_policy: `fcfs` serves requests in the order of their arrival and refuses those with a priority;
        `priority` lets every client set one, which ages: each step lets 32 later requests pass.
    request_timeout: seconds after which a request is given up, queued or running; None: never.
    keep_alive: seconds of silence in a stream after which a comment is sent, so that nobody hangs up.
    override_generation_config: sampling parameters, by the names of generation_config.json, for the fields
        that a request leaves out; they replace the model's recommendation.
    live: there is a page at `/`, and `/live`, which tells it what happens in the pool.
    log_requests: what is asked for is written to the log, prompts included; otherwise nobody's words are.
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
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    request_timeout: float | None = 600.0
    keep_alive: float = 15.0
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
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
        if not all(self.api_keys):
            raise ConfigError("an api key must not be empty")
        if any(key != key.strip() for key in self.api_keys):
            raise ConfigError("an api key must not begin or end with white space: no client can send that")
        if self.isolate_keys and not self.api_keys:
            raise ConfigError("isolate_keys is for a server that has api_keys")
