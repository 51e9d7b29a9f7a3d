"""How an ingress sees its replicas: what it may send them, the streams of their answers, and its errors."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from tiny_llm import EngineStoppingError, TinyLLMError

from .calls import Call, OpenStream


class ReplicaError(TinyLLMError):
    """A replica has failed at a call; the same call would fail elsewhere."""


class ReplicaEndedError(ReplicaError):
    """A replica's process has ended, or cannot be reached."""


class NoReplicaError(EngineStoppingError):
    """No replica can take a request now; one may in some seconds."""


class Stream(Protocol):
    """A replica's answers. Iterating raises `ReplicaError`."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    async def __anext__(self) -> Any: ...
    def cancel(self) -> None:
        """Cancel the call on its replica; does nothing if it has ended."""


class Replicas(Protocol):
    """The way to the replicas."""

    def send(self, call: Call) -> Stream:
        """Send a call to a replica that the router chooses."""

    def open_stream(self, request: OpenStream) -> Stream:
        """Open a shared stream of the replica that the request names."""
