"""The figures of requests of several ingresses as one. Needs no Ray.

Oracle: Prometheus's own parser, and sums of what each ingress has counted.
"""

import asyncio
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tiny_llm_cluster.ingress_figures import IngressFigures, merged
from tiny_llm_server.metrics import Metrics

REASONS = ("stop", "length", "abort", 'odd "reason"')
Finished = dict[str, dict[str, int]]  # how many completions ended with each reason, by ingress


class Families(Collector):
    """Metrics as Prometheus's library takes them."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self.families = families

    def collect(self) -> Sequence[Metric]:
        return self.families


def figures_of(finished: Mapping[str, int]) -> list[Metric]:
    """The figures of an ingress, as they arrive from another process."""
    metrics = Metrics(lambda: None, lambda: "smollm2")
    for reason, count in finished.items():
        metrics.record_finish(reason, count)
        metrics.record_first_token(7, 0.25)
    figures: list[Metric] = pickle.loads(pickle.dumps(metrics.of_requests()))
    return figures


@given(
    st.dictionaries(
        st.text("abc09", min_size=1, max_size=3),
        st.dictionaries(st.sampled_from(REASONS), st.integers(1, 9), max_size=3),
        max_size=4,
    )
)
def test_each_ingress_has_its_samples_and_their_sum_is_what_all_have_counted(finished: Finished) -> None:
    families = merged({name: figures_of(counts) for name, counts in finished.items()})
    text = generate_latest(Families(families)).decode()
    read = list(text_string_to_metric_families(text))
    assert len({family.name for family in read}) == len(read), "a family must appear once"
    found = {
        (sample.labels["ingress"], sample.labels["finished_reason"]): sample.value
        for family in read
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    }
    assert found == {
        (name, reason): count for name, counts in finished.items() for reason, count in counts.items()
    }
    first_tokens = Counter(
        {
            sample.labels["ingress"]: sample.value
            for family in read
            for sample in family.samples
            if sample.name == "vllm:time_to_first_token_seconds_count"
        }
    )
    assert first_tokens == Counter({name: len(counts) for name, counts in finished.items() if counts})


def names_in(families: Sequence[Metric]) -> set[str]:
    return {sample.labels["ingress"] for family in families for sample in family.samples}


@pytest.mark.parametrize("error", [TimeoutError("too slow"), RuntimeError("no such deployment")])
def test_an_ingress_tells_its_own_figures_if_the_others_do_not_answer(error: Exception) -> None:
    async def ask_all() -> Mapping[str, Sequence[Metric]]:
        raise error

    figures = IngressFigures("here", lambda: figures_of({"stop": 2}), ask_all)
    assert names_in(asyncio.run(figures.collect())) == {"here"}


def test_the_own_figures_are_those_of_now() -> None:
    """An ingress that is asked by itself could answer late, or not at all."""

    async def ask_all() -> Mapping[str, Sequence[Metric]]:
        return {"here": figures_of({"stop": 1}), "there": figures_of({"stop": 5})}

    figures = IngressFigures("here", lambda: figures_of({"stop": 2}), ask_all)
    families = asyncio.run(figures.collect())
    counts = {
        sample.labels["ingress"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    }
    assert counts == {"here": 2, "there": 5}
