"""The load of `bench serve` and its figures, which are vLLM's. Does not use HTTP: its caller does."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from time import perf_counter
from typing import Any, NamedTuple

from .serve_address import Backend
from .statistics_of import statistics_of
from .workload import Progress

TOKENS = range(1000, 30_000)  # ids that are text in every vocabulary that we have seen
_COMMON = """about after again all also and answer any around ask back because been before below between big
book both but call came can change children city close come could country day different does done down each
end even every eye face family far father few find first follow food for form found friend from full get
girl give good great group had hand hard has have head help here high home house how idea keep kind know
land large last later learn leave left letter life light like line little live long look made make"""
# Chats take text instead of ids. Each of these words is one token in every vocabulary that we have seen.
WORDS = tuple(_COMMON.split())


class ServeRun(NamedTuple):
    """What to send, and how fast. request_rate: requests in a second; inf sends all at once."""

    backend: Backend
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

    @property
    def is_chat(self) -> bool:
        """Whether the requests are chats instead of completions."""
        return self.backend == "openai-chat"


@dataclass
class Answer:
    """The answer to one request: when it was sent, when its pieces came, its tokens, and why it failed.

    is_counted: True if the server sent no usage. Then each chunk with text counts as an output token, and the
    prompt tokens are those that were sent.
    """

    sent: float = field(default_factory=perf_counter)
    moments: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    is_counted: bool = False


Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


async def put_load(ask: Ask, run: ServeRun, progress: Progress) -> dict[str, object]:
    """Send the requests of a run and return their figures, with the settings of the run.

    ask: sends the body of a request and reads its answer to the end. Raises ValueError if the first request,
    which does not count, fails.
    """
    numbers = random.Random(run.seed)
    prefix = numbers.choices(_vocabulary(run), k=run.random_prefix_len)
    jobs = [_job(run, prefix, numbers) for _ in range(run.num_prompts)]
    first = await ask({**_job(run, prefix, numbers), "max_tokens": 2})
    if first.error is not None:
        raise ValueError(f"{run.base_url}{run.endpoint}: {first.error}")
    start = perf_counter()
    answers = await _all(ask, run, jobs, numbers, progress)
    return _with_run(figures(answers, perf_counter() - start), run)


def figures(answers: list[Answer], duration: float) -> dict[str, object]:
    """vLLM's figures for requests that took `duration` seconds in all. Failed ones are only counted."""
    done = [answer for answer in answers if answer.error is None]
    num_in, num_out = sum(a.prompt_tokens for a in done), sum(a.output_tokens for a in done)
    spans = [a.moments[-1] - a.moments[0] for a in done]
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "error_counts": dict(Counter(a.error for a in answers if a.error is not None)),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "output_tokens_are": "chunks" if any(a.is_counted for a in done) else "usage",
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


def lengths(wanted: int, ratio: float) -> range:
    """The lengths that differ from `wanted` by at most `ratio` times `wanted`, and are at least 1."""
    spread = int(wanted * ratio)
    return range(max(1, wanted - spread), wanted + spread + 1)


def _with_run(found: dict[str, object], run: ServeRun) -> dict[str, object]:
    """The settings that vLLM saves, under vLLM's names, then the figures; other settings under `run`."""
    saved = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": run.backend,
        "label": None,
        "model_id": run.model,
        "tokenizer_id": None,
        "num_prompts": run.num_prompts,
        "request_rate": run.request_rate if math.isfinite(run.request_rate) else "inf",
        "burstiness": 1.0,  # independent arrivals
        "max_concurrency": run.max_concurrency,
    }
    left = {name: value for name, value in run._asdict().items() if name not in {*saved, "model", "api_key"}}
    return {**saved, **found, "run": left}


def _vocabulary(run: ServeRun) -> Sequence[int | str]:
    return WORDS if run.is_chat else TOKENS


def _job(run: ServeRun, prefix: Sequence[int | str], numbers: random.Random) -> dict[str, Any]:
    """The body of a request: random tokens, with lengths varied by up to --random-range-ratio."""
    length = numbers.choice(lengths(run.random_input_len, run.random_range_ratio))
    prompt = [*prefix, *numbers.choices(_vocabulary(run), k=length)]
    content: dict[str, Any] = {"prompt": prompt}
    if run.is_chat:
        content = {"messages": [{"role": "user", "content": " ".join(map(str, prompt))}]}
    return {
        "model": run.model,
        **content,
        "max_tokens": numbers.choice(lengths(run.random_output_len, run.random_range_ratio)),
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
    """Send all requests at --request-rate, with the gaps of independent arrivals."""
    limit, ended = asyncio.Semaphore(run.max_concurrency or len(jobs)), 0

    async def send(job: dict[str, Any]) -> Answer:
        nonlocal ended
        async with limit:
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
