"""The engine's figures in `/metrics`: of one engine, and of each replica where a model has several.

Oracles: the text that Prometheus gets, and the official parser of that text.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tiny_llm.batch_manager import DraftStats
from tiny_llm.engine_core import sum_stats

from tiny_llm import EngineConfig, EngineStats
from tiny_llm_server.engine_figures import EngineFigures
from tiny_llm_server.served_model import ServedModel

ONE = EngineStats(
    num_running=3,
    num_waiting=2,
    num_swapped=1,
    num_free_blocks=2,
    num_cached_blocks=1,
    num_blocks=8,
    num_preemptions=4,
    prefix_cache_queries=100,
    prefix_cache_hits=60,
    num_host_blocks=5,
    num_tokens=77,
    steps_of=(4, 0, 3, 1),
    num_waiting_requests=2,
    drafts=DraftStats(6, 20, 9, (5, 3, 1)),
)
OTHER = replace(
    ONE, num_running=1, num_blocks=16, num_tokens=9, steps_of=(2,), drafts=DraftStats(1, 4, 1, (1,))
)

TEXT_OF_ONE = """\
# HELP vllm:num_requests_running Sequences that are running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="smollm2"} 3.0
# HELP vllm:num_requests_waiting Sequences that are waiting.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="smollm2"} 2.0
# HELP vllm:kv_cache_usage_perc Fraction of the KV pool's blocks in use, 0 to 1.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="smollm2"} 0.625
# HELP vllm:prefix_cache_queries_total Prompt tokens looked up in the prefix cache.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{model_name="smollm2"} 100.0
# HELP vllm:prefix_cache_hits_total Prompt tokens found in the prefix cache.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{model_name="smollm2"} 60.0
# HELP vllm:num_preemptions_total Preemptions of sequences.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{model_name="smollm2"} 4.0
# HELP vllm:spec_decode_num_drafts_total Drafts that were checked.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{model_name="smollm2"} 6.0
# HELP vllm:spec_decode_num_draft_tokens_total Guessed tokens that were checked.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{model_name="smollm2"} 20.0
# HELP vllm:spec_decode_num_accepted_tokens_total Guessed tokens that were right.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{model_name="smollm2"} 9.0
# HELP vllm:iteration_tokens_total Tokens computed in an engine step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{le="1.0",model_name="smollm2"} 4.0
vllm:iteration_tokens_total_bucket{le="2.0",model_name="smollm2"} 4.0
vllm:iteration_tokens_total_bucket{le="4.0",model_name="smollm2"} 7.0
vllm:iteration_tokens_total_bucket{le="+Inf",model_name="smollm2"} 8.0
vllm:iteration_tokens_total_count{model_name="smollm2"} 8.0
vllm:iteration_tokens_total_sum{model_name="smollm2"} 77.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted guessed tokens by their position in the draft, from 0.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="smollm2",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="smollm2",position="1"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="smollm2",position="2"} 1.0
"""  # noqa: E501


def model(stats: EngineStats, replicas: Mapping[str, EngineStats] | None = None) -> ServedModel:
    """A model that speculates, with these statistics. replicas: None for a single engine."""
    engine = SimpleNamespace(stats=stats)
    if replicas is not None:
        engine.replica_stats, engine.is_draining = replicas, False
    config = EngineConfig.from_options(speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    return cast(ServedModel, SimpleNamespace(engine=engine, engine_config=config))


def text(served: ServedModel) -> str:
    registry = CollectorRegistry()
    registry.register(EngineFigures(lambda: served, lambda: "smollm2"))
    return generate_latest(registry).decode()


def samples(served: ServedModel) -> dict[str, list[Any]]:
    """The samples of each metric, by the metric's name."""
    return {family.name: family.samples for family in text_string_to_metric_families(text(served))}


def test_the_figures_of_a_single_engine_have_only_the_models_name_as_a_label() -> None:
    """Oracle: the text of the version before replicas, which dashboards read."""
    assert text(model(ONE)) == TEXT_OF_ONE


def test_every_figure_has_a_sample_for_each_replica() -> None:
    """Oracle: the figures of each replica as a single engine, plus the label."""
    replicas = {"a": ONE, "b": OTHER}
    found = samples(model(sum_stats(replicas.values()), replicas))
    expected = {name: samples(model(stats)) for name, stats in replicas.items()}
    assert found.keys() == expected["a"].keys()
    assert len(found) == 11
    for name, of_metric in found.items():
        assert {sample.labels["replica"] for sample in of_metric} == {"a", "b"}, name
        for replica, single in expected.items():
            without = [
                (sample.name, {**sample.labels, "replica": None}, sample.value)
                for sample in of_metric
                if sample.labels["replica"] == replica
            ]
            assert without == [
                (sample.name, {**sample.labels, "replica": None}, sample.value) for sample in single[name]
            ]


def test_replicas_that_have_not_reported_yet_have_no_samples() -> None:
    found = samples(model(sum_stats([]), {}))
    assert set(map(tuple, found.values())) == {()}


def test_the_sum_of_statistics_adds_every_field() -> None:
    """Oracle: by hand."""
    assert sum_stats([ONE, OTHER]) == EngineStats(
        num_running=4,
        num_waiting=4,
        num_swapped=2,
        num_free_blocks=4,
        num_cached_blocks=2,
        num_blocks=24,
        num_preemptions=8,
        prefix_cache_queries=200,
        prefix_cache_hits=120,
        num_host_blocks=10,
        num_tokens=86,
        steps_of=(6, 0, 3, 1),
        num_waiting_requests=4,
        drafts=DraftStats(7, 24, 10, (6, 3, 1)),
    )
    assert sum_stats([ONE]) == ONE
    assert sum_stats([]).num_blocks == 0
