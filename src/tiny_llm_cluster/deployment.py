"""What a deployment on a cluster is made of: engine, server, replicas, ingress and proxies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_llm import ConfigError
from tiny_llm_server import ServerConfig

from .config import ClusterConfig, check_limit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True, kw_only=True)
class IngressConfig:
    """The processes that take HTTP requests. Raises `ConfigError` for an invalid value.

    num_replicas: how many there are.
    ray_actor_options: what Ray reserves for each, such as {"num_cpus": 1}, and other options of its process.
    max_replicas_per_node: how many of them a machine gets at most, up to 100; None: any number.
    log_level: what each writes to its log, as in `tiny-llm serve --log-level`.
    """

    num_replicas: int = 1
    ray_actor_options: Mapping[str, Any] = field(default_factory=dict)
    max_replicas_per_node: int | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_replicas_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        check_limit(self.max_replicas_per_node)
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where Ray Serve's proxies listen, on each machine. Raises `ConfigError` for an invalid value."""

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host must not be empty")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be from 1 to 65535, not {self.port}")

    @property
    def is_local(self) -> bool:
        """Whether no machine can reach another one's proxy."""
        return self.host in LOOPBACK


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What `tiny-llm serve-cluster` deploys.

    engine: the arguments of `LLM`, with its `model`. server: holds the API keys, so it is not in the repr.
    """

    engine: Mapping[str, Any] = field(default_factory=dict)
    server: ServerConfig = field(default_factory=ServerConfig, repr=False)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    ingress: IngressConfig = field(default_factory=IngressConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
