"""Where `bench serve` asks, and for what: --backend, --base-url, --host, --port and --endpoint made one."""

from typing import Literal, NamedTuple

import typer

Backend = Literal["openai", "openai-chat", "vllm"]
CHAT, COMPLETION = "/chat/completions", "/completions"


class Address(NamedTuple):
    """The server, without /v1, and the path on it."""

    base_url: str
    endpoint: str


def address_of(backend: Backend, base_url: str | None, host: str, port: int, endpoint: str | None) -> Address:
    """base_url, with or without /v1, before host and port. Raises `BadParameter` for another's endpoint."""
    place = (base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}").rstrip("/")
    path = "/" + (endpoint or _default(backend)).strip("/")
    _check(backend, path)
    if place.endswith("/v1"):
        place = place.removesuffix("/v1").rstrip("/")
        path = path if path.startswith("/v1/") else f"/v1{path}"
    return Address(place, path)


def _default(backend: Backend) -> str:
    return f"/v1{CHAT if backend == 'openai-chat' else COMPLETION}"


def _check(backend: Backend, path: str) -> None:
    """An answer of the other kind would be read as one without text."""
    if not path.endswith(COMPLETION) or path.endswith(CHAT) == (backend == "openai-chat"):
        return
    other = "openai-chat" if path.endswith(CHAT) else "openai"
    raise typer.BadParameter(
        f"{path} is not what --backend {backend} asks ({_default(backend)}): --backend {other} does",
        param_hint="--endpoint",
    )
