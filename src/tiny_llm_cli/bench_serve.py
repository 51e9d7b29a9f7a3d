"""Requests to a server, measured from outside: `bench serve`, with the flags and figures of vLLM's."""

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import httpx2

from .statistics_of import statistics_of
from .workload import Progress

CLOSED = (httpx2.RemoteProtocolError, httpx2.NetworkError)  # how a connection ends that its server has closed
TOKENS = range(1000, 30_000)  # ids that are text in every vocabulary that we know of


class ServeRun(NamedTuple):
    """What is asked, and how fast. request_rate: requests a second, inf: all at once."""

    base_url: str
    endpoint: str
    model: str | None
    api_key: str | None
    num_prompts: int
    max_concurrency: int | None
    request_rate: float
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    random_prefix_len: int
    ignore_eos: bool
    seed: int


@dataclass
class Answer:
    """One request: when it was sent, when pieces came, how many tokens they were, and why it failed."""

    sent: float = field(default_factory=perf_counter)
    moments: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


def measure_server(run: ServeRun, progress: Progress) -> dict[str, object]:
    """Ask a server that runs already; the figures, and what was asked.

    Raises ValueError where there is no server, or where it has more than one model and none is named.
    """
    return asyncio.run(_measure(run, progress))


async def _measure(run: ServeRun, progress: Progress) -> dict[str, object]:
    async with _client(run) as client:
        model = run.model or await _only_model(client, run)
        return await put_load(partial(_ask, client, run), run._replace(model=model), progress)


async def put_load(ask: Ask, run: ServeRun, progress: Progress) -> dict[str, object]:
    """The figures of what `ask` gives for the requests of a run, and what was asked.

    ask: sends the body of a request, and reads its answer to the end. Raises ValueError where the first one,
    which does not count, fails.
    """
    numbers = random.Random(run.seed)
    prefix = numbers.choices(TOKENS, k=run.random_prefix_len)
    jobs = [_job(run, prefix, numbers) for _ in range(run.num_prompts)]
    first = await ask({**_job(run, prefix, numbers), "max_tokens": 2})
    if first.error is not None:
        raise ValueError(f"{run.base_url}{run.endpoint}: {first.error}")
    start = perf_counter()
    answers = await _all(ask, run, jobs, numbers, progress)
    return {**figures(answers, perf_counter() - start), "run": {**run._asdict(), "api_key": None}}


def figures(answers: list[Answer], duration: float) -> dict[str, object]:
    """vLLM's figures of requests that took so many seconds together; failed ones are counted, and no more."""
    done = [answer for answer in answers if answer.error is None]
    num_in, num_out = sum(a.prompt_tokens for a in done), sum(a.output_tokens for a in done)
    spans = [a.moments[-1] - a.moments[0] for a in done]
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "errors": sorted({a.error for a in answers if a.error is not None}),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(done) / duration,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        **statistics_of("ttft", [a.moments[0] - a.sent for a in done]),
        **statistics_of(
            "tpot",
            [s / (a.output_tokens - 1) for s, a in zip(spans, done, strict=True) if a.output_tokens > 1],
        ),
        **statistics_of("itl", [b - c for a in done for b, c in zip(a.moments[1:], a.moments, strict=False)]),
        **statistics_of("e2el", [a.moments[-1] - a.sent for a in done]),
    }


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


def _job(run: ServeRun, prefix: list[int], numbers: random.Random) -> dict[str, Any]:
    """The body of a request: random tokens, its lengths within --random-range-ratio of those asked for."""

    def length(wanted: int) -> int:
        spread = int(wanted * run.random_range_ratio)
        return max(1, numbers.randint(wanted - spread, wanted + spread))

    return {
        "model": run.model,
        "prompt": prefix + numbers.choices(TOKENS, k=length(run.random_input_len)),
        "max_tokens": length(run.random_output_len),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if run.ignore_eos else {}),
    }


async def _all(
    ask: Ask,
    run: ServeRun,
    jobs: list[dict[str, Any]],
    numbers: random.Random,
    progress: Progress,
) -> list[Answer]:
    """Send all: as fast as --request-rate says, with gaps like those of independent arrivals."""
    seats, ended = asyncio.Semaphore(run.max_concurrency or len(jobs)), 0

    async def send(job: dict[str, Any]) -> Answer:
        nonlocal ended
        async with seats:
            answer = await ask(job)
        ended += 1
        progress("bench serve", ended, len(jobs))
        return answer

    tasks = []
    for job in jobs:
        tasks.append(asyncio.create_task(send(job)))
        if math.isfinite(run.request_rate):
            await asyncio.sleep(numbers.expovariate(run.request_rate))
    return await asyncio.gather(*tasks)


async def _ask(client: httpx2.AsyncClient, run: ServeRun, job: dict[str, Any]) -> Answer:
    """One request; sent again where its server had closed the connection that it came by."""
    for may_try_again in (True, False):
        answer = Answer()
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
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(answer, json.loads(line[6:]))


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])
    if event.get("choices"):
        answer.moments.append(perf_counter())
    if event.get("usage"):
        answer.prompt_tokens = event["usage"]["prompt_tokens"]
        answer.output_tokens = event["usage"]["completion_tokens"]
