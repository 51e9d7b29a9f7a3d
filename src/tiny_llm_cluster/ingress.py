"""The ingress: the server's own routes in a process that Ray Serve runs, in front of the replicas."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from tiny_llm_server import ServerConfig, make_app

from .application import Replicas
from .ingress_figures import Families, IngressFigures
from .remote_model import RemoteModel

LOG = logging.getLogger("uvicorn.error")  # the server's log
MOMENT = 0.01  # seconds between two looks at whether the model is loaded
ANSWER_SECONDS = 2.0  # how long the other ingresses have to answer


@serve.ingress()  # the application is made by `__serve_build_asgi_app__`
class Ingress:
    """The class of the ingress's deployment; it is ready when a replica is.

    replicas: Serve's handle of the replicas' deployment. engine_options: as the replicas get them.
    num_ingresses: how many ingresses there are.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        replicas: Any,
        engine_options: Mapping[str, Any],
        config: ServerConfig,
        log_level: str,
        num_ingresses: int,
    ) -> None:
        _log_to_stderr(log_level)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._ingresses: DeploymentHandle[Self] | None = None  # made when it is first needed
        self._asking = ThreadPoolExecutor(1, "figures")
        name = self._name if num_ingresses > 1 else None
        self._model = await asyncio.to_thread(_load, replicas, engine_options, name)
        figures = IngressFigures(self._name, self._own_figures, self._ask_all)
        self._app = make_app(lambda: self._model, config, figures.collect)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; called by Serve after the constructor."""
        return self._app

    async def check_health(self) -> None:
        """Return when the server has its model. Serve sends no request here before the first check."""
        service = self._app.state.service
        while service.engine_stats() is None:
            if service.failure is not None:
                raise service.failure
            await asyncio.sleep(MOMENT)

    def _own_figures(self) -> Families:
        figures: Families = self._app.state.service.metrics.of_requests()
        return figures

    async def figures(self) -> tuple[str, Families]:
        """This ingress's name and figures of requests; another ingress asks for them."""
        return self._name, self._own_figures()

    async def _ask_all(self) -> dict[str, Families]:
        """The figures of each ingress, by its name. Raises TimeoutError and errors of Ray."""
        async with asyncio.timeout(ANSWER_SECONDS):
            loop = asyncio.get_running_loop()
            broadcast = await loop.run_in_executor(self._asking, self._broadcast)
            answers = await broadcast.results_async(return_exceptions=True)
        return dict(one for one in answers if not isinstance(one, BaseException))

    def _broadcast(self) -> Any:
        """Ask all ingresses. The first time, Serve's controller is asked for them, which may take long."""
        if self._ingresses is None:
            context = serve.get_replica_context()
            self._ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        return self._ingresses.broadcast("figures")


def _load(replicas: Any, engine_options: Mapping[str, Any], name: str | None) -> RemoteModel:
    running = Replicas.of(replicas)
    return RemoteModel(engine_options, running, running.routing, name)


def _log_to_stderr(level: str) -> None:
    """Write the server's log to standard error, which Ray keeps in a file for each process."""
    LOG.setLevel(level.upper())
    LOG.propagate = False
    if not LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        LOG.addHandler(handler)
