"""The address that `bench serve` sends to, from --backend, --base-url, --host, --port and --endpoint."""

from typing import Literal, NamedTuple

import typer

Backend = Literal["openai", "openai-chat", "vllm"]
CHAT, COMPLETION = "/chat/completions", "/completions"


class Address(NamedTuple):
    """A server, without /v1, and a path on it."""

    base_url: str
    endpoint: str


def address_of(backend: Backend, base_url: str | None, host: str, port: int, endpoint: str | None) -> Address:
    """The address. base_url, with or without /v1, overrides host and port.

    Raises `BadParameter` for an endpoint of another backend, or a URL without http:// or https://.
    """
    _check_url(base_url)
    server = (base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}").rstrip("/")
    path = "/" + (endpoint or _default(backend)).strip("/")
    _check(backend, path)
    if server.endswith("/v1"):
        server = server.removesuffix("/v1").rstrip("/")
        path = path if path.startswith("/v1/") else f"/v1{path}"
    return Address(server, path)


def _check_url(base_url: str | None) -> None:
    if base_url and not base_url.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"must start with http:// or https://, not {base_url!r}", param_hint="--base-url"
        )


def _default(backend: Backend) -> str:
    return f"/v1{CHAT if backend == 'openai-chat' else COMPLETION}"


def _check(backend: Backend, path: str) -> None:
    """Raise `BadParameter` for the endpoint of another backend, whose answers would seem to have no text."""
    if not path.endswith(COMPLETION) or path.endswith(CHAT) == (backend == "openai-chat"):
        return
    other = "openai-chat" if path.endswith(CHAT) else "openai"
    raise typer.BadParameter(
        f"{path} does not fit --backend {backend}, which uses {_default(backend)}: use --backend {other}",
        param_hint="--endpoint",
    )
