"""Requests to a server over HTTP, measured from outside: `bench serve`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

import httpx2

from .serve_load import Answer, ServeRun, put_load
from .workload import Progress

CLOSED = (httpx2.RemoteProtocolError, httpx2.NetworkError)  # how a connection ends that its server has closed


def measure_server(run: ServeRun, progress: Progress) -> dict[str, object]:
    """Ask a server that runs already; the figures, and what was asked.

    Raises ValueError where there is no server, or where it has more than one model and none is named.
    """
    return asyncio.run(_measure(run, progress))


async def _measure(run: ServeRun, progress: Progress) -> dict[str, object]:
    async with _client(run) as client:
        model = run.model or await _only_model(client, run)
        return await put_load(partial(_ask, client, run), run._replace(model=model), progress)


@asynccontextmanager
async def _client(run: ServeRun) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"Authorization": f"Bearer {run.api_key}"} if run.api_key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=run.base_url, headers=headers, timeout=None, limits=limits, trust_env=False
    ) as client:
        yield client


async def _only_model(client: httpx2.AsyncClient, run: ServeRun) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        names = [str(model["id"]) for model in answer.json()["data"]]
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        raise ValueError(f"{run.base_url}/v1/models does not answer: {error}") from error
    if len(names) != 1:
        raise ValueError(
            f"{run.base_url} has {len(names)} models: name one with --model ({', '.join(names)})"
        )
    return names[0]


async def _ask(client: httpx2.AsyncClient, run: ServeRun, job: dict[str, Any]) -> Answer:
    """One request; sent again where its server had closed the connection that it came by."""
    for may_try_again in (True, False):
        answer = Answer(prompt_tokens=_num_sent(job), is_counted=True)
        try:
            await _read(client, run, job, answer)
        except (httpx2.HTTPError, ValueError) as error:
            if may_try_again and isinstance(error, CLOSED) and not answer.moments:
                continue
            answer.error = f"{type(error).__name__}: {error}"
        break
    if answer.error is None and not answer.moments:
        answer.error = "the stream ended without a token"
    return answer


async def _read(client: httpx2.AsyncClient, run: ServeRun, job: dict[str, Any], answer: Answer) -> None:
    """Send a request, and take its answer piece by piece."""
    async with client.stream("POST", run.endpoint, json=job) as response:
        if response.status_code != 200:
            answer.error = (
                f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
            )
            return
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                _take(answer, json.loads(data))


def _num_sent(job: dict[str, Any]) -> int:
    """Tokens of a prompt, or words of a chat, which are about as many."""
    return len(job["prompt"] if "prompt" in job else job["messages"][0]["content"].split())


def _take(answer: Answer, event: dict[str, Any]) -> None:
    """Note what an event says: a piece of the answer, its usage, or that it failed."""
    if event.get("error"):
        answer.error = str(event["error"])
    for choice in event.get("choices") or ():
        has_text = _has_text(choice)
        # A chat's stream opens with the role, before any token.
        if has_text or answer.moments or "delta" not in choice or choice.get("finish_reason"):
            answer.moments.append(perf_counter())
        if answer.is_counted and has_text:
            answer.output_tokens += 1
    usage = event.get("usage") or {}
    if usage.get("completion_tokens") is not None:
        answer.prompt_tokens = usage.get("prompt_tokens") or answer.prompt_tokens
        answer.output_tokens, answer.is_counted = usage["completion_tokens"], False


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a piece brings anything of an answer: text, a chat's content, or what it reasons."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text")) or any(said for name, said in delta.items() if name != "role")
