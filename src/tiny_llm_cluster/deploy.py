"""Deploys the replicas and their ingress on a Ray cluster that runs already, and stops them."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ProxyStatus, ReplicaState

from . import MESSAGE_LIMIT
from .application import (
    APPLICATION,
    MAX_ONGOING,
    ClusterError,
    explaining,
    replicas_of,
    silence_ray,
)
from .deployment import Deployment, HttpConfig
from .ingress import Ingress

INGRESS = "ingress"  # Serve's name of the deployment
CONNECT_SECONDS = 10.0
POLL = 0.5  # seconds between two looks at the status
MORE_GRACE = 5.0  # seconds that an ingress runs on after its replicas: their errors must reach the clients
SLOW = "have taken more than"  # Serve's words for processes that take long to start
ALL_ADDRESSES = ("0.0.0.0", "::")

Tell = Callable[[str], object]  # shows a line of progress


@dataclass(frozen=True)
class DeployedStatus:
    """What runs on the cluster.

    status: Serve's word for the application's state, such as "RUNNING". deployments: for each deployment, how
    many of its processes are in each state. addresses: where the proxies listen.
    """

    status: str
    deployments: Mapping[str, Mapping[str, int]]
    addresses: tuple[str, ...]


@contextmanager
def connected() -> Iterator[None]:
    """Be connected to the running cluster within this block. Raises `ClusterError` if there is none.

    The cluster is that of this machine, or the one that the environment variable RAY_ADDRESS names.
    """
    silence_ray()
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ClusterError(
            "no Ray cluster was found: run `ray start --head` on one machine and `ray start --address "
            "HEAD:6379` on the others, or set RAY_ADDRESS"
        ) from error
    except Exception as error:
        with explaining("cannot connect to the Ray cluster"):
            raise error
    try:
        _check_owner()
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `ClusterError` if nothing listens at a `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}, which RAY_ADDRESS names: {error}"
        ) from error


def _check_owner() -> None:
    """Raise `ClusterError` if Ray runs only for a `tiny-llm serve --replicas`: it has no proxies."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None and client.get_serve_details().get("proxy_location") == ProxyLocation.Disabled:
        raise ClusterError(
            "the Ray cluster that was found has no HTTP proxies, as that of `tiny-llm serve --replicas`: set "
            "RAY_ADDRESS to another one's address"
        )


def deploy(deployment: Deployment, tell: Tell) -> DeployedStatus:
    """Deploy the application, or replace the one that runs; returns when it runs.

    What runs already is replaced process by process: one that stops takes no new requests, and has
    `cluster.grace` seconds to finish its own. Raises `ClusterError`.
    """
    with explaining("Ray Serve cannot start"):
        _start_serve(deployment.http)
    with explaining("the application cannot be deployed"):
        target = serve.RunTarget(_application(deployment), APPLICATION, "/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(tell)
        return status()


def stop(tell: Tell) -> None:
    """Delete the application; returns when it has ended. Serve ends too if it has no other application.

    Raises `ClusterError` if the application does not exist.
    """
    require_running()
    with explaining("the application cannot be stopped"):
        serve.delete(APPLICATION, _blocking=False)
        progress = _Progress(tell)
        while (application := _application_status()) is not None:
            progress.show(application)
            time.sleep(POLL)
        if not serve.status().applications:
            serve.shutdown()


def require_running() -> None:
    """Raise `ClusterError` unless the application exists."""
    if _application_status() is None:
        raise ClusterError("tiny-llm does not run on this cluster")


def status() -> DeployedStatus:
    """What runs on the cluster now. Raises `ClusterError` if the application does not exist."""
    require_running()
    application = _application_status()
    assert application is not None
    return DeployedStatus(ApplicationStatus(application.status).value, _states(application), _addresses())


def _application(deployment: Deployment) -> serve.Application:
    """The application: the ingress, which has the handle of the replicas."""
    ingress, cluster = deployment.ingress, deployment.cluster
    deployed = serve.deployment(
        Ingress,
        name=INGRESS,
        num_replicas=ingress.num_replicas,
        ray_actor_options=_with_message_limit(ingress.ray_actor_options),
        max_replicas_per_node=ingress.max_replicas_per_node,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=cluster.grace + MORE_GRACE,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=cluster.health_check_period,
    )
    replicas = replicas_of(deployment.engine, cluster)
    return deployed.bind(
        replicas, dict(deployment.engine), deployment.server, ingress.log_level, ingress.num_replicas
    )


def _with_message_limit(options: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's options of an ingress, with its environment: there Ray is imported before our package."""
    environment = options.get("runtime_env", {})
    variables = {**MESSAGE_LIMIT, **environment.get("env_vars", {})}
    return {**options, "runtime_env": {**environment, "env_vars": variables}}


def _start_serve(http: HttpConfig) -> None:
    """Start Serve with proxies on each machine, unless it runs.

    Raises `ClusterError` if it runs and its proxies listen elsewhere: Serve cannot change that.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        options = HTTPOptions(host=http.host, port=http.port)
        try:
            serve.start(ProxyLocation.EveryNode, options)
        except (RayActorError, TimeoutError):
            # On a busy machine Serve replaces a proxy that is not ready within seconds. It goes on, but this
            # call has waited for the old one. `_wait_until_running` waits for the new one.
            if _get_global_client(raise_if_no_controller_running=False) is None:
                raise
        return
    running = client.http_config
    if (running.host, running.port) != (http.host, http.port):
        raise ClusterError(
            f"it listens on {running.host}, port {running.port} already: stop it before you change http"
        )


def _wait_until_running(tell: Tell) -> None:
    progress = _Progress(tell)
    while True:
        application = _application_status()
        if application is not None:
            progress.show(application)
            if application.status == ApplicationStatus.RUNNING and _proxies_listen():
                return
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise ClusterError(_reason(application))
        time.sleep(POLL)


def _reason(application: ApplicationStatusOverview) -> str:
    """Why an application cannot run: the last line of a replica's traceback, or else Serve's own words."""
    messages = [one.message for one in application.deployments.values() if "Error" in one.message]
    lines = (messages or [application.message])[0].strip().splitlines()
    return lines[-1] if lines else "it has failed"


def _proxies_listen() -> bool:
    proxies = serve.status().proxies.values()
    return bool(proxies) and all(one != ProxyStatus.STARTING for one in proxies)


def _application_status() -> ApplicationStatusOverview | None:
    return serve.status().applications.get(APPLICATION)


def _states(application: ApplicationStatusOverview) -> dict[str, dict[str, int]]:
    return {
        name: {ReplicaState(state).value: count for state, count in deployment.replica_states.items()}
        for name, deployment in application.deployments.items()
    }


def _addresses() -> tuple[str, ...]:
    """The URL of each machine's proxy."""
    http = _get_global_client().http_config
    hosts = [http.host]
    if http.host in ALL_ADDRESSES:
        ips = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        hosts = [ips[node] for node in serve.status().proxies if node in ips]
    return tuple(
        f"http://{f'[{host}]' if ':' in host else host}:{http.port}" for host in dict.fromkeys(hosts)
    )


class _Progress:
    """Shows the states of the processes when they change, and what Serve says about slow ones."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = ""
        self._notices: set[str] = set()

    def show(self, application: ApplicationStatusOverview) -> None:
        """Show the states unless they were shown last, and a notice unless it was shown before."""
        parts = [f"{name}: {_counts(counts)}" for name, counts in _states(application).items() if counts]
        line = "; ".join(parts)
        if line and line != self._told:
            self._tell(line)
            self._told = line
        for notice in _notices(application):
            if notice not in self._notices:
                self._tell(notice)
                self._notices.add(notice)


def _notices(application: ApplicationStatusOverview) -> list[str]:
    """What Serve says about processes that take long to start, such as how many processors they need."""
    messages = [one.message for one in application.deployments.values()]
    return [" ".join(message.split()) for message in messages if SLOW in message]


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
