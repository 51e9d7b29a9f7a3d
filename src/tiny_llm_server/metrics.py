"""Prometheus metrics under vLLM's names, so that dashboards for vLLM work.

`EngineFigures` reads the engine's own counters at each scrape; the times of a request are recorded as its
events arrive.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tiny_llm import RequestEvent, RequestUsage

from .engine_figures import EngineFigures, buckets
from .served_model import ServedModel

CollectRequests = Callable[[], Awaitable[Sequence[Metric]]]  # collects the figures of requests

FAST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
SLOW = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Metrics:
    """The metrics of one server. `llm` and `model_name` are functions: the model may still be loading."""

    def __init__(self, llm: Callable[[], ServedModel | None], model_name: Callable[[], str]) -> None:
        self.tokens = TokenFigures(model_name)
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._engine = EngineFigures(llm, model_name)
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", FAST
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Seconds from arrival until the request first runs.", SLOW
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Seconds from arrival to the last token.", SLOW
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens in a prompt.", TOKENS)
        self._output = self._histogram(
            "request_generation_tokens", "Tokens in all completions of a prompt.", TOKENS
        )
        self._registry.register(self.tokens)
        self._finished_total = Counter(
            "vllm:request_success",
            "Finished completions by reason: stop, length, abort (the client disconnected), timeout, error.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def text(self, of_requests: Sequence[Metric] | None = None) -> bytes:
        """Return all metrics in Prometheus's text format.

        of_requests: the figures of requests; None: those of this server.
        """
        figures = self.of_requests() if of_requests is None else of_requests
        return generate_latest(_Families([*self._engine.collect(), *figures]))

    def of_requests(self) -> list[Metric]:
        """Return the figures of the requests that this server has taken."""
        return [*self._registry.collect()]

    def request_stats(self, prompts: Mapping[str, int], n: int, arrival: float) -> "RequestStats":
        """Make the figures of one HTTP request.

        prompts: each prompt's number of tokens, by its id in the engine. arrival: when the request arrived,
        by `time.monotonic`; messages are rendered and prompts tokenized after that.
        """
        return RequestStats(self, prompts, n, arrival)

    def record_first_token(self, prompt_tokens: int, seconds: float) -> None:
        """Record a prompt's first token, `seconds` after the request arrived."""
        self.tokens.num_prompt_tokens += prompt_tokens
        self._ttft.labels(self._model_name()).observe(seconds)

    def record_finish(self, reason: str, count: int = 1) -> None:
        """Record finished completions."""
        self._finished_total.labels(self._model_name(), reason).inc(count)

    def record_usage(self, usage: RequestUsage, seconds: float) -> None:
        """Record the usage of a prompt that has finished `seconds` after its request arrived."""
        name, times = self._model_name(), usage.metrics
        self._prompt.labels(name).observe(usage.prompt_tokens)
        self._output.labels(name).observe(usage.completion_tokens)
        if times.queue_time is not None:
            self._queue.labels(name).observe(times.queue_time)
        if times.finished is not None:
            self._e2e.labels(name).observe(seconds)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"vllm:{name}", description, ["model_name"], buckets=buckets, registry=self._registry
        )


class TokenFigures(Collector):
    """The server's tokens in total, and the times between a completion's tokens.

    These change with each token, so plain numbers count them: a histogram of prometheus_client locks twice
    for each value. They are read at each scrape; there are no samples before the first token.
    """

    def __init__(self, model_name: Callable[[], str]) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._model_name = model_name
        self._seconds = 0.0
        self._times_up_to = [0] * (len(FAST) + 1)  # by upper bound; the last count is of longer times

    def add(self, count: int, seconds: float | None) -> None:
        """Add new tokens, `seconds` after the previous ones of the completion; None: its first tokens."""
        self.num_generation_tokens += count
        if seconds is not None:
            self._seconds += seconds
            self._times_up_to[bisect_left(FAST, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each metric."""
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens processed.", self.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", self.num_generation_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            if count:
                counter.add_metric([self._model_name()], count)
            yield counter
        latencies = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Seconds between consecutive tokens of a completion.",
            labels=["model_name"],
        )
        if any(self._times_up_to):
            latencies.add_metric([self._model_name()], buckets(FAST, self._times_up_to), self._seconds)
        yield latencies


class _Families(Collector):
    """Metrics that have been collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self._families


class RequestStats:
    """The tokens and times of one HTTP request's completions, which it also adds to the server's metrics.

    num_cached_tokens: prompt tokens that came from the prefix cache; None while no prompt has finished.
    finish_reasons: how many completions ended with each reason.
    """

    def __init__(self, metrics: Metrics, prompts: Mapping[str, int], n: int, arrival: float) -> None:
        self.num_prompt_tokens = sum(prompts.values())
        self.num_cached_tokens: int | None = None
        self.num_output_tokens = 0
        self.finish_reasons: Tally[str] = Tally()
        self._metrics = metrics
        self._arrival = arrival
        self._first_token: float | None = None
        self._last_token = arrival
        self._unseen_prompts = dict(prompts)  # no token has come for these yet
        self._num_unfinished = len(prompts) * n
        self._last: dict[tuple[str, int], float] = {}

    @property
    def ttft(self) -> float | None:
        """Seconds until the first token of any completion; None if there was none."""
        return None if self._first_token is None else self._first_token - self._arrival

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second from the first token to the last one, all completions together.

        The first token of each completion does not count, because it took a prefill. None if only those came.
        """
        num_decoded = self.num_output_tokens - len(self._last)
        if self._first_token is None or num_decoded < 1:
            return None
        return num_decoded / max(1e-9, self._last_token - self._first_token)

    def add(self, event: RequestEvent) -> None:
        """Count an event."""
        if event.token_ids:
            self._add_tokens(event, monotonic())
        if event.finish_reason is not None:
            self._finish(event.finish_reason, 1)
        if event.usage is not None:
            self.num_cached_tokens = (self.num_cached_tokens or 0) + event.usage.num_cached_tokens
            self._metrics.record_usage(event.usage, monotonic() - self._arrival)

    def finish_rest(self, reason: str) -> None:
        """Count the unfinished completions as ended by `reason`: "abort", "timeout" or "error"."""
        self._finish(reason, self._num_unfinished)

    def _add_tokens(self, event: RequestEvent, now: float) -> None:
        completion = (event.request_id, event.index)
        if (prompt_tokens := self._unseen_prompts.pop(event.request_id, None)) is not None:
            self._metrics.record_first_token(prompt_tokens, now - self._arrival)
        before = self._last.get(completion)
        self._metrics.tokens.add(len(event.token_ids), None if before is None else now - before)
        self._last[completion] = self._last_token = now
        self._first_token = now if self._first_token is None else self._first_token
        self.num_output_tokens += len(event.token_ids)

    def _finish(self, reason: str, count: int) -> None:
        self._metrics.record_finish(reason, count)
        if count:
            self.finish_reasons[reason] += count
        self._num_unfinished -= count
