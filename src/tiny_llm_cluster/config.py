"""The options of a cluster: how many replicas there are, how requests are routed, and how replicas end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_llm import ConfigError
from tiny_llm_checkpoints.suggestions import unknown_name
from tiny_llm_routing.fleet import MAX_STALENESS
from tiny_llm_routing.policies import POLICIES

MOST_ON_A_NODE = 100  # Ray's limit of `max_replicas_per_node`


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The replicas and the router. Every field has a default. Raises `ConfigError` for an invalid value.

    num_replicas: how many replicas run; ignored with `autoscaling_config`.
    autoscaling_config: Ray Serve's options for autoscaling, such as {"min_replicas": 1, "max_replicas": 8,
        "target_ongoing_requests": 16}; None: a fixed number. There must be at least one replica.
    ray_actor_options: what Ray reserves for each replica, such as {"num_cpus": 16}, and other options of its
        process.
    max_replicas_per_node: how many replicas a machine gets at most, up to 100; None: as many as it has
        processors for.
    threads: threads of each replica's kernels; None: all processors that the replica sees.
    routing_policy: prefix, least-loaded or round-robin.
    report_period: seconds between two reports of a replica, about its load and the blocks that it caches.
    max_staleness: seconds after which a report is ignored.
    health_check_period: seconds between two checks of a replica.
    grace: seconds that a replica's requests have to finish when the replica is to stop.
    """

    num_replicas: int = 1
    autoscaling_config: Mapping[str, Any] | None = None
    ray_actor_options: Mapping[str, Any] = field(default_factory=dict)
    max_replicas_per_node: int | None = None
    threads: int | None = None
    routing_policy: str = "prefix"
    report_period: float = 1.0
    max_staleness: float = MAX_STALENESS
    health_check_period: float = 2.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_replicas_per_node", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        check_limit(self.max_replicas_per_node)
        for name in ("report_period", "max_staleness", "health_check_period", "grace"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, not {value!r}")
        if self.max_staleness <= self.report_period:
            raise ConfigError(
                f"max_staleness ({self.max_staleness:g} s) must exceed report_period "
                f"({self.report_period:g} s): reports would be too old when they come"
            )
        if self.routing_policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(f"routing_policy must be one of {known}, not {self.routing_policy!r}")
        if self.autoscaling_config is not None:
            _check_autoscaling(self.autoscaling_config)


def check_limit(max_replicas_per_node: int | None) -> None:
    """Raise `ConfigError` for more than Ray accepts."""
    if max_replicas_per_node is not None and max_replicas_per_node > MOST_ON_A_NODE:
        raise ConfigError(
            f"max_replicas_per_node must be at most {MOST_ON_A_NODE}, not {max_replicas_per_node}"
        )


def _check_autoscaling(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what Serve would reject or ignore, and for a fleet that may become empty."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig

    for name in values:
        if name not in AutoscalingConfig.model_fields:
            known = list(AutoscalingConfig.model_fields)
            raise ConfigError(f"autoscaling_config: {unknown_name('key', name, known)}")
    try:
        made = AutoscalingConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name}: " for name in first["loc"])
        raise ConfigError(f"autoscaling_config: {place}{first['msg']}") from error
    if made.min_replicas < 1:
        raise ConfigError(
            "autoscaling_config: min_replicas must be at least 1, not 0: without a replica, requests are "
            "refused, so none would be started"
        )
