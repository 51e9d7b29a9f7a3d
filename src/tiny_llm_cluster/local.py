"""A server on this machine whose engine runs on replicas: `tiny-llm serve --replicas`.

The HTTP server is this process; Ray Serve runs the replicas in processes of their own.
"""

import logging
import signal
from collections.abc import Callable, Mapping
from threading import Event, Lock, Thread
from types import FrameType
from typing import Any

from .application import ClusterError, ended_process, restart_replicas, start_replicas
from .config import ClusterConfig
from .remote_model import RemoteModel

LOG = logging.getLogger("uvicorn.error")  # the server's log
POLL = 0.5  # seconds between two looks at Ray's processes
WITHOUT_RAY = 50.0  # seconds that requests have to finish: after 60, Ray ends its processes, and this one too


def load_remote_model(engine_options: Mapping[str, Any], config: ClusterConfig) -> RemoteModel:
    """Start the replicas on Ray, which runs already, and return the model that runs on them.

    Raises the errors of `LLM` for a model or options that cannot work, and `ClusterError`.
    """
    replicas = start_replicas(engine_options, config)
    LOG.info("%d replicas are ready; SIGHUP restarts them one after the other", config.num_replicas)
    return RemoteModel(engine_options, replicas, replicas.routing)


def restart_on_hangup(engine_options: Mapping[str, Any], config: ClusterConfig) -> None:
    """From now on, SIGHUP replaces all replicas by new ones, as `restart_replicas` does.

    A signal during a restart does nothing.
    """
    restarting = Lock()

    def restart() -> None:
        if not restarting.acquire(blocking=False):
            return
        LOG.info("Restarting the replicas")
        try:
            restart_replicas(engine_options, config)
        except ClusterError as error:
            LOG.error("%s", error)
        else:
            LOG.info("All replicas have been restarted")
        finally:
            restarting.release()

    def handle(_: int, __: FrameType | None) -> None:
        Thread(target=restart, name="restart", daemon=True).start()

    signal.signal(signal.SIGHUP, handle)


def watch_ray(fail: Callable[[ClusterError, float], object]) -> Callable[[], None]:
    """Watch Ray's processes; returns a function that ends this, to be called before Ray is stopped.

    When a process that Ray needs has ended, `fail` is called once, in another thread, with the error and the
    seconds that requests have to finish. Replicas run on for some time then, but none is started again.
    """
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(POLL):
            name = ended_process()
            if name is not None and not is_over.is_set():
                LOG.error("Ray's process %s has ended, so the server will end too", name)
                fail(ClusterError(f"Ray's process {name} has ended"), WITHOUT_RAY)
                return

    Thread(target=watch, name="watch-ray", daemon=True).start()
    return is_over.set
