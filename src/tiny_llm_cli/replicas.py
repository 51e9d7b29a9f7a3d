"""`tiny-llm serve --replicas`: several engines behind one server, each in a process of its own."""

from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .options import EngineOptions

if TYPE_CHECKING:
    from tiny_llm_cluster.config import ClusterConfig
    from tiny_llm_cluster.remote_model import RemoteModel


class Replicated:
    """The replicas of one server, until the end of a `with` block. They share the kernels' threads."""

    def __init__(self, engine: EngineOptions, replicas: int, policy: str, grace: float, seed: int) -> None:
        self._engine_options: dict[str, Any] = {**asdict(engine), "seed": seed}
        self._config = _config(replicas, policy, grace)
        self._end_watch: Callable[[], None] = lambda: None

    def load(self) -> "RemoteModel":
        """Start the replicas, and return the model that runs on them."""
        from tiny_llm_cluster.local import load_remote_model

        return load_remote_model(self._engine_options, self._config)

    def watch(self, fail: Callable[[Exception, float], object]) -> None:
        """Have `fail` called if Ray ends, with the error and the seconds that requests have to finish."""
        from tiny_llm_cluster.local import watch_ray

        self._end_watch = watch_ray(fail)

    def __enter__(self) -> Self:
        """Start Ray. From now on, SIGHUP restarts the replicas."""
        from tiny_llm_cluster.application import start_ray_here
        from tiny_llm_cluster.local import restart_on_hangup

        start_ray_here(self._config)
        restart_on_hangup(self._engine_options, self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the replicas."""
        from tiny_llm_cluster.application import stop_here

        self._end_watch()
        stop_here()


def _config(replicas: int, policy: str, grace: float) -> "ClusterConfig":
    """The cluster's options. Each replica has its share of the threads, at least one."""
    from tiny_llm import kernel_info
    from tiny_llm_cluster.config import ClusterConfig

    threads = max(1, (kernel_info().num_threads or 1) // replicas)
    return ClusterConfig(num_replicas=replicas, threads=threads, routing_policy=policy, grace=max(grace, 0.1))
