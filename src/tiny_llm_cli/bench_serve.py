"""Requests to a server over HTTP, measured from outside: `bench serve`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any

import httpx2

from .serve_load import Answer, ServeRun, put_load
from .workload import Progress

CLOSED = (httpx2.RemoteProtocolError, httpx2.NetworkError)  # errors of a connection that the server closed
LONGEST_MESSAGE = 300  # characters of a server's message


def measure_server(run: ServeRun, progress: Progress) -> dict[str, object]:
    """Send requests to a running server and return the figures, with the settings of the run.

    Raises ValueError if the server does not answer, requires an API key, or has several models and none is
    named.
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
    """The name of the server's model. Raises ValueError unless it has exactly one."""
    url = f"{run.base_url}/v1/models"
    try:
        response = await client.get("/v1/models")
        if response.status_code != HTTPStatus.OK:
            raise ValueError(f"{url}: {_said(response, run)}")
        names = [str(model["id"]) for model in response.json()["data"]]
    except httpx2.HTTPError as error:
        raise ValueError(f"{url} does not answer: {error}") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url} is not a list of models in OpenAI's format") from error
    if len(names) != 1:
        raise ValueError(
            f"{run.base_url} has {len(names)} models: name one with --model ({', '.join(names)})"
        )
    return names[0]


def _said(response: httpx2.Response, run: ServeRun) -> str:
    """The text of an error response: its status, and the server's message or what to do."""
    status = response.status_code
    message = f"{status}: {_message(response)[:LONGEST_MESSAGE]}"
    if status == HTTPStatus.UNAUTHORIZED and not run.api_key:
        return f"the server requires an API key: pass --api-key or set OPENAI_API_KEY ({status})"
    if status == HTTPStatus.UNAUTHORIZED:
        return f"the server rejects this API key ({message})"
    if status == HTTPStatus.FORBIDDEN and not run.api_key:
        return f"{message} (if the server requires an API key: pass --api-key or set OPENAI_API_KEY)"
    return message


def _message(response: httpx2.Response) -> str:
    """The message of an error in OpenAI's format, or else the whole text, or else the name of the status."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip() or response.reason_phrase


async def _ask(client: httpx2.AsyncClient, run: ServeRun, job: dict[str, Any]) -> Answer:
    """Send one request; send it once more if the server had closed the connection that it went to."""
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
    """Send a request and read its answer piece by piece."""
    async with client.stream("POST", run.endpoint, json=job) as response:
        if response.status_code != HTTPStatus.OK:
            await response.aread()
            answer.error = _said(response, run)
            return
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                _take(answer, json.loads(data))


def _num_sent(job: dict[str, Any]) -> int:
    """The number of tokens of a prompt; for a chat the number of words, which is about the same."""
    return len(job["prompt"] if "prompt" in job else job["messages"][0]["content"].split())


def _take(answer: Answer, event: dict[str, Any]) -> None:
    """Note what an event contains: a piece of the answer, its usage, or an error."""
    if event.get("error"):
        answer.error = str(event["error"])
    for choice in event.get("choices") or ():
        has_text = _has_text(choice)
        # The stream of a chat starts with the role, before any token.
        if has_text or answer.moments or "delta" not in choice or choice.get("finish_reason"):
            answer.moments.append(perf_counter())
        if answer.is_counted and has_text:
            answer.output_tokens += 1
    usage = event.get("usage") or {}
    if usage.get("completion_tokens") is not None:
        answer.prompt_tokens = usage.get("prompt_tokens") or answer.prompt_tokens
        answer.output_tokens, answer.is_counted = usage["completion_tokens"], False


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a piece adds to an answer: text, the content of a chat, or reasoning."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text")) or any(said for name, said in delta.items() if name != "role")
