"""The replicas as a Ray Serve application, on this machine or on a cluster that exists."""

import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import psutil  # the copy in Ray
import ray
from grpc.aio import AioRpcError
from ray import serve
from ray._private import auto_init_hook
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from tiny_llm import TinyLLMError

from .answers import ReplicaEndedError, ReplicaError
from .calls import Call, OpenStream
from .config import ClusterConfig
from .routing import Routing

APPLICATION, REPLICAS = "tiny-llm", "replicas"  # Serve's names of the application and of the deployment
ROUTER = "tiny_llm_cluster.request_router.PrefixRouter"  # a class would be copied by value
MAX_ONGOING = 1 << 20  # calls that Serve sends to a replica: the engine limits its queue itself
NEEDED = ("gcs_server", "raylet")  # Ray's processes that it does not start again
STARTS = 3  # attempts to start Ray on this machine
LOG = logging.getLogger("uvicorn.error")  # the server's log
OBJECT_STORE_BYTES = 128 << 20  # Ray's shared memory on this machine: calls go by gRPC, not through it


class ClusterError(TinyLLMError):
    """The replicas cannot start, or restart."""


def replicas_of(engine_options: Mapping[str, Any], config: ClusterConfig) -> serve.Application:
    """Make the application of the replicas. engine_options: the arguments of `LLM`, with its `model`."""
    from .replica import EngineReplica

    scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.autoscaling_config is not None:
        scaling = {"autoscaling_config": dict(config.autoscaling_config)}
    deployment = serve.deployment(
        EngineReplica,
        name=REPLICAS,
        ray_actor_options=dict(config.ray_actor_options),
        max_replicas_per_node=config.max_replicas_per_node,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=config.health_check_period,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"policy": config.routing_policy, "max_staleness": config.max_staleness},
            request_routing_stats_period_s=config.report_period,
        ),
        **scaling,
    )
    return deployment.bind(dict(engine_options), config.threads)


@dataclass
class Replicas:
    """The running replicas: sends calls to them by gRPC.

    calls, streams: Serve's handles for calls and for shared streams. routing: what their router knows.
    """

    calls: DeploymentHandle[Any]
    streams: DeploymentHandle[Any]
    routing: Routing

    @classmethod
    def of(cls, handle: DeploymentHandle[Any]) -> Self:
        """The replicas behind a handle, when one of them answers. Blocks: not for an event loop."""
        handle.is_ready.remote().result()  # Serve makes the handle's router with the first call
        by_grpc = handle.options(stream=True, _by_reference=False)
        return cls(by_grpc.run, by_grpc.events, Routing.of(REPLICAS))

    def send(self, call: Call) -> "RayStream":
        """Send a call to a replica that the router chooses."""
        return RayStream(self.calls.remote(call))

    def open_stream(self, request: OpenStream) -> "RayStream":
        """Open a shared stream of the replica that the request names."""
        return RayStream(self.streams.remote(request))


class RayStream:
    """A replica's answers to a call. Ray's errors become `ReplicaError`, with a message for a client."""

    def __init__(self, response: DeploymentResponseGenerator[Any]) -> None:
        self._response = response

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._response)
        except RayTaskError as error:
            raise ReplicaError(f"the replica failed: {error.cause or error}") from error
        except RayActorError as error:
            raise ReplicaEndedError("the replica has ended") from error
        except RayError as error:
            raise ReplicaEndedError(f"the replica cannot be reached: {error}") from error
        except AioRpcError as error:  # such as a message that is too long
            raise ReplicaError(f"the replica's answer cannot be read: {error.code().name}") from error

    def cancel(self) -> None:
        """Cancel the call on its replica; does nothing if it has ended."""
        with suppress(Exception):
            self._response.cancel()


def start_ray_here(config: ClusterConfig) -> None:
    """Start Ray on this machine, for this process only. Raises `ClusterError` if that fails.

    Call it in the main thread: Ray's processes end with the thread that started them. On a busy machine one
    of them may not be ready after 15 seconds, and then Ray ends; so there are `STARTS` attempts.
    """
    silence_ray()
    auto_init_hook.enable_auto_connect = False  # otherwise a late call would start Ray again
    with explaining("Ray cannot start"):
        for attempt in range(1, STARTS + 1):
            try:
                _init_ray(max(os.cpu_count() or 1, config.num_replicas))
                break
            except Exception as error:
                stop_here()
                if attempt == STARTS:
                    raise
                reason = " ".join(str(error).split())
                LOG.warning("Ray has not started (attempt %d of %d): %s", attempt, STARTS, reason)
        serve.start(http_options={"location": "NoServer"})


def _init_ray(num_cpus: int) -> None:
    ray.init(
        address="local",  # not a cluster that runs on this machine already
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        num_cpus=num_cpus,
    )


def silence_ray() -> None:
    """Keep Ray from writing to the terminal, and from reporting its use over the network."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_replicas(engine_options: Mapping[str, Any], config: ClusterConfig) -> Replicas:
    """Start the replicas; returns when they are ready. Raises `ClusterError` if one cannot start."""
    with explaining("the replicas cannot start"):
        handle = serve.run(replicas_of(engine_options, config), name=APPLICATION, route_prefix=None)
        return Replicas.of(handle)


def restart_replicas(engine_options: Mapping[str, Any], config: ClusterConfig) -> None:
    """Replace the replicas by new ones, one or a fifth of them at a time; returns when all are new.

    A replica that stops takes no new calls, and has `config.grace` seconds to finish its own.
    """
    with explaining("the replicas cannot restart"):
        serve.run(replicas_of(engine_options, config), name=APPLICATION, route_prefix=None)


def ended_process() -> str | None:
    """The name of a process of Ray on this machine that has ended and is needed; None if all run."""
    node = ray._private.worker._global_node
    ended = () if node is None else {name for name, _ in node.dead_processes()}
    return next((name for name in NEEDED if name in ended), None)


def stop_here() -> None:
    """End Ray's processes that this process has started, replicas among them, and its other children.

    They end at once: drain first.
    """
    started = psutil.Process().children(recursive=True)
    ray.shutdown()
    for process in started:  # without its GCS server, Ray leaves some behind for a minute
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn an error of Ray into a `ClusterError` of one line."""
    try:
        yield
    except Exception as error:
        raise ClusterError(f"{what}: {' '.join(str(error).split())[:1000]}") from error
