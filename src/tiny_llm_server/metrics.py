"""Figures for Prometheus, under vLLM's names, so that dashboards made for it work.

What the engine counts is read from it when somebody asks; what a request took is noted when it ends.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tiny_llm import LLM, RequestEvent, RequestUsage

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
    """Counts and times of one server. `model_name` is asked for at every scrape: a model may still load."""

    def __init__(self, llm: Callable[[], LLM | None], model_name: Callable[[], str]) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._registry.register(_EngineFigures(llm, model_name))
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FAST)
        self._itl = self._histogram("inter_token_latency_seconds", "Between neighbouring tokens.", FAST)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival until it runs.", SLOW)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", SLOW)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._output = self._histogram(
            "request_generation_tokens", "Tokens of a prompt's completions.", TOKENS
        )
        self._read = Counter("vllm:prompt_tokens", "Prompt tokens.", ["model_name"], registry=self._registry)
        self._written = Counter(
            "vllm:generation_tokens", "Generated tokens.", ["model_name"], registry=self._registry
        )
        self._ended = Counter(
            "vllm:request_success",
            "Completions that have ended, by reason: abort (the client left), timeout, error, stop, length.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)

    def watch(self, prompts: Mapping[str, int], n: int) -> "Watch":
        """For one HTTP request: tell it of every event. prompts: the tokens of each, by the engine's id."""
        return Watch(self, prompts, n)

    def note_first(self, prompt_tokens: int, seconds: float) -> None:
        """A request's first token has come, so many seconds after it arrived."""
        self._read.labels(self._model_name()).inc(prompt_tokens)
        self._ttft.labels(self._model_name()).observe(seconds)

    def note_tokens(self, count: int, seconds: float | None) -> None:
        """Tokens have come, `seconds` after the completion's last ones; None: they are its first."""
        self._written.labels(self._model_name()).inc(count)
        if seconds is not None:
            self._itl.labels(self._model_name()).observe(seconds)

    def note_end(self, reason: str, count: int = 1) -> None:
        """Completions have ended."""
        self._ended.labels(self._model_name(), reason).inc(count)

    def note_usage(self, usage: RequestUsage) -> None:
        """A request has ended."""
        name, times = self._model_name(), usage.metrics
        self._prompt.labels(name).observe(usage.prompt_tokens)
        self._output.labels(name).observe(usage.completion_tokens)
        if times.queue_time is not None:
            self._queue.labels(name).observe(times.queue_time)
        if times.finished is not None:
            self._e2e.labels(name).observe(times.finished - times.arrival)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", what, ["model_name"], buckets=buckets, registry=self._registry)


class Watch:
    """Notes what the events of one HTTP request's completions took."""

    def __init__(self, metrics: Metrics, prompts: Mapping[str, int], n: int) -> None:
        self._metrics = metrics
        self._begun = monotonic()
        self._unread = dict(prompts)  # those of which nothing has come yet
        self._num_live = len(prompts) * n
        self._last: dict[tuple[str, int], float] = {}

    def note(self, event: RequestEvent) -> None:
        """An event has come."""
        now, completion = monotonic(), (event.request_id, event.index)
        if event.token_ids:
            if (prompt_tokens := self._unread.pop(event.request_id, None)) is not None:
                self._metrics.note_first(prompt_tokens, now - self._begun)
            before = self._last.get(completion)
            self._metrics.note_tokens(len(event.token_ids), None if before is None else now - before)
            self._last[completion] = now
        if event.finish_reason is not None:
            self._metrics.note_end(event.finish_reason)
            self._num_live -= 1
        if event.usage is not None:
            self._metrics.note_usage(event.usage)

    def end(self, reason: str) -> None:
        """Those that have not ended are given up: "abort", "timeout" or "error"."""
        self._metrics.note_end(reason, self._num_live)
        self._num_live = 0


class _EngineFigures(Collector):
    """What the engine says of itself when it is asked; nothing while it loads."""

    def __init__(self, llm: Callable[[], LLM | None], model_name: Callable[[], str]) -> None:
        self._llm = llm
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """One family for each figure."""
        llm = self._llm()
        if llm is None:
            return
        stats = llm.engine.stats
        used = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait.", stats.num_waiting),
            "kv_cache_usage_perc": (
                "Share of the pool's blocks in use; 1 is all.",
                used / max(1, stats.num_blocks),
            ),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found.", stats.prefix_cache_hits),
            "num_preemptions": ("Sequences that gave their pages up.", stats.num_preemptions),
        }
        for name, (what, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", what, labels=["model_name"])
            gauge.add_metric([self._model_name()], value)
            yield gauge
        for name, (what, count) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", what, labels=["model_name"])
            counter.add_metric([self._model_name()], count)
            yield counter
        steps = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", labels=["model_name"]
        )
        steps.add_metric([self._model_name()], _buckets(stats.steps_of), stats.num_tokens)
        yield steps


def _buckets(steps_of: Sequence[int]) -> list[tuple[str, float]]:
    """Counts by powers of two as Prometheus has them: each with all smaller ones, the last has no bound."""
    bounds = [str(float(1 << power)) for power in range(len(steps_of) - 1)]
    return list(zip([*bounds, "+Inf"], accumulate(steps_of), strict=True))
