"""The engine's own figures as Prometheus metrics, under vLLM's names: its load and its counters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tiny_llm import EngineStats

from .served_model import Replicated, ServedEngine, ServedModel


class _Figure(NamedTuple):
    """A metric of one number. name: its name without "vllm:"."""

    family: type[Gauge] | type[Counter]
    name: str
    description: str
    value: Callable[[EngineStats], float]


FIGURES = (
    _Figure(Gauge, "num_requests_running", "Sequences that are running.", lambda stats: stats.num_running),
    _Figure(Gauge, "num_requests_waiting", "Sequences that are waiting.", lambda stats: stats.num_waiting),
    _Figure(
        Gauge,
        "kv_cache_usage_perc",
        "Fraction of the KV pool's blocks in use, 0 to 1.",
        lambda stats: _num_used_blocks(stats) / max(1, stats.num_blocks),
    ),
    _Figure(
        Counter,
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.prefix_cache_queries,
    ),
    _Figure(
        Counter,
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda stats: stats.prefix_cache_hits,
    ),
    _Figure(Counter, "num_preemptions", "Preemptions of sequences.", lambda stats: stats.num_preemptions),
)
OF_SPECULATION = (
    _Figure(
        Counter,
        "spec_decode_num_drafts",
        "Drafts that were checked.",
        lambda stats: stats.drafts.num_drafts,
    ),
    _Figure(
        Counter,
        "spec_decode_num_draft_tokens",
        "Guessed tokens that were checked.",
        lambda stats: stats.drafts.num_draft_tokens,
    ),
    _Figure(
        Counter,
        "spec_decode_num_accepted_tokens",
        "Guessed tokens that were right.",
        lambda stats: stats.drafts.num_accepted_tokens,
    ),
)


class _Source(NamedTuple):
    """An engine or one of its replicas: the values of the labels of its samples, and its statistics."""

    labels: list[str]
    stats: EngineStats


class EngineFigures(Collector):
    """Reads the engine's statistics at each scrape; no metrics while the model loads.

    With several replicas, each figure has one sample for each, with the replica's name as the label
    `replica`. llm, model_name: functions, because the model may still be loading.
    """

    def __init__(self, llm: Callable[[], ServedModel | None], model_name: Callable[[], str]) -> None:
        self._llm = llm
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each metric."""
        llm = self._llm()
        if llm is None:
            return
        speculates = llm.engine_config.speculative_config is not None
        sources = self._sources(llm.engine)
        names = ["model_name", "replica"] if isinstance(llm.engine, Replicated) else ["model_name"]
        for figure in FIGURES + OF_SPECULATION if speculates else FIGURES:
            family = figure.family(f"vllm:{figure.name}", figure.description, labels=names)
            for source in sources:
                family.add_metric(source.labels, figure.value(source.stats))
            yield family
        yield _steps(names, sources)
        if speculates:
            yield _accepted_by_position(names, sources)

    def _sources(self, engine: ServedEngine) -> list[_Source]:
        model = self._model_name()
        if isinstance(engine, Replicated):
            return [_Source([model, name], stats) for name, stats in engine.replica_stats.items()]
        return [_Source([model], engine.stats)]


def _steps(names: list[str], sources: Sequence[_Source]) -> Metric:
    """The histogram of the sizes of steps."""
    steps = HistogramMetricFamily(
        "vllm:iteration_tokens_total", "Tokens computed in an engine step.", labels=names
    )
    for labels, stats in sources:
        bounds = (float(1 << power) for power in range(len(stats.steps_of) - 1))
        steps.add_metric(labels, buckets(bounds, stats.steps_of), stats.num_tokens)
    return steps


def _accepted_by_position(names: list[str], sources: Sequence[_Source]) -> Metric:
    counter = Counter(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Accepted guessed tokens by their position in the draft, from 0.",
        labels=[*names, "position"],
    )
    for labels, stats in sources:
        for position, count in enumerate(stats.drafts.accepted_at):
            counter.add_metric([*labels, str(position)], count)
    return counter


def _num_used_blocks(stats: EngineStats) -> int:
    return stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks


def buckets(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Turn counts by upper bounds into Prometheus's cumulative buckets; the last count has no bound."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))
