"""Runs the requests of a batch file through the server's own application, in this process.

A result has OpenAI's batch format: `{"id": ..., "custom_id": "1", "response": {"status_code": 200,
"request_id": ..., "body": {...}}, "error": null}`. A request that the server rejects has the server's status
and error; a line that is not a request has no response, and its `error` has a code, a message and the number
of the line.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import httpx2

from tiny_llm import LLM
from tiny_llm_server import ServerConfig, make_app

from .batch import CHAT, BatchRequest
from .json_line import json_line

_UNLIMITED = 2**31 - 1

Report = Callable[[int], None]  # takes the number of tokens of a request that has ended


@dataclass
class Outcome:
    """How a batch ended. first_failure: the place and the error of the first line that failed."""

    num_requests: int = 0
    num_failed: int = 0
    first_failure: str = ""


def run_batch(
    llm: LLM, requests: Sequence[BatchRequest], defaults: Mapping[str, Any], target: TextIO, report: Report
) -> Outcome:
    """Answer the requests and write each result to `target` as soon as all earlier ones are written.

    defaults: sampling parameters for requests that leave them out, by the names of `SamplingParams`.
    """
    return asyncio.run(_run(llm, requests, defaults, target, report))


async def _run(
    llm: LLM, requests: Sequence[BatchRequest], defaults: Mapping[str, Any], target: TextIO, report: Report
) -> Outcome:
    outcome = Outcome()
    async for request, result in _answers(llm, requests, defaults, report):
        print(json_line(result), file=target, flush=True)
        failure = _failure(result)
        outcome.num_requests += 1
        if failure is not None:
            outcome.num_failed += 1
            outcome.first_failure = outcome.first_failure or f"{request.place}: {failure}"
    return outcome


async def _answers(
    llm: LLM, requests: Sequence[BatchRequest], defaults: Mapping[str, Any], report: Report
) -> AsyncIterator[tuple[BatchRequest, dict[str, Any]]]:
    """Each request with its result, in order. Enough run at once to keep every slot of the engine busy."""
    app = make_app(lambda: llm, _server_config(len(requests)))
    await app.state.service.load()
    limit = asyncio.Semaphore(_concurrency(llm))
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:

        async def answer(place: int, request: BatchRequest) -> dict[str, Any]:
            async with limit:
                result = await _answer(client, request, _body(request, defaults, place))
            report(_num_tokens(result))
            return result

        tasks = [asyncio.create_task(answer(*each)) for each in enumerate(requests)]
        try:
            for request, task in zip(requests, tasks, strict=True):
                yield request, await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _server_config(num_requests: int) -> ServerConfig:
    """A server for one trusted client: without limits that protect clients from each other."""
    return ServerConfig(
        live=False,
        request_timeout=None,
        scheduling_policy="priority",
        max_n=_UNLIMITED,
        max_prompts=_UNLIMITED,
        max_sequences=_UNLIMITED,
        max_stop=_UNLIMITED,
        max_body_bytes=_UNLIMITED,
        body_memory_bytes=_UNLIMITED * max(1, num_requests),
    )


def _concurrency(llm: LLM) -> int:
    waiting = llm.engine_config.max_num_waiting
    enough = 2 * llm.engine_config.max_num_seqs
    return enough if waiting is None else min(enough, waiting)


async def _answer(
    client: httpx2.AsyncClient, request: BatchRequest, body: Mapping[str, Any]
) -> dict[str, Any]:
    if request.problem is not None:
        line = int(request.place.rpartition(":")[2])
        error = {"code": "invalid_request", "message": request.problem, "line": line}
        return _result(request, error=error)
    # Not `json=body`, which refuses numbers such as 1e400 and lone surrogates: the server names the field.
    content = json.dumps(body).encode()
    response = await client.post(request.url, content=content, headers={"Content-Type": "application/json"})
    found = response.json()
    request_id = response.headers.get("X-Request-Id") or f"req_{uuid.uuid4().hex}"
    return _result(
        request, response={"status_code": response.status_code, "request_id": request_id, "body": found}
    )


def _result(
    request: BatchRequest,
    response: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": response,
        "error": error,
    }


def _body(request: BatchRequest, defaults: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The body to send: without the model's name, and with defaults for the fields that it leaves out.

    The default seed is the place in the file, so that the same command gives the same results.
    """
    body = {name: value for name, value in request.body.items() if name != "model" and value is not None}
    is_chat = request.url == CHAT
    if body.get("response_format") is not None:  # the request's own form
        defaults = {**defaults, "structured_outputs": None}
    if "logprobs" in body:  # true or false, which `top_logprobs` depends on
        defaults = {**defaults, "logprobs": None}
    for name, value in _as_fields(defaults, is_chat).items():
        if name != "max_tokens" or "max_completion_tokens" not in body:
            body.setdefault(name, value)
    body.setdefault("seed", place)
    return body


def _as_fields(defaults: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """Sampling parameters as fields of OpenAI's requests."""
    found = {name: value for name, value in defaults.items() if value is not None}
    if "logit_bias" in found:
        found["logit_bias"] = {str(token): bias for token, bias in found["logit_bias"].items()}
    if is_chat and "logprobs" in found:
        found |= {"logprobs": True, "top_logprobs": found["logprobs"]}
    return found


def _failure(result: Mapping[str, Any]) -> str | None:
    """What went wrong with a request, in words; None if it has an answer."""
    if result["error"] is not None:
        return str(result["error"]["message"])
    response = result["response"]
    if response["status_code"] == 200:
        failed = [one for one in response["body"]["choices"] if one["finish_reason"] == "error"]
        return "a completion failed" if failed else None
    return str((response["body"].get("error") or {}).get("message", response["status_code"]))


def _num_tokens(result: Mapping[str, Any]) -> int:
    body = (result["response"] or {}).get("body") or {}
    return int((body.get("usage") or {}).get("completion_tokens", 0))
