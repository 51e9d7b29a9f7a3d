"""The histogram that is updated for each token. Oracle: the library's histogram."""

import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tiny_llm_server.metrics import FAST
from tiny_llm_server.token_histogram import TokenHistogram

NAME, DESCRIPTION = "vllm:inter_token_latency_seconds", "Seconds."


@given(values=st.lists(st.sampled_from(FAST) | st.floats(0, 200)))
def test_a_scrape_shows_what_the_librarys_histogram_shows(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = TokenHistogram(NAME, DESCRIPTION, FAST, lambda: "smollm2")
    ours.register(histogram)
    expected = Histogram(NAME, DESCRIPTION, ["model_name"], buckets=FAST, registry=theirs)
    for value in values:
        histogram.observe(value)
        expected.labels("smollm2").observe(value)
    assert without_times(ours) == without_times(theirs)


def without_times(registry: CollectorRegistry) -> str:
    """The text of a scrape without the times at which histograms were created."""
    return re.sub(r"(_created{.*}) \S+", r"\1", generate_latest(registry).decode())
