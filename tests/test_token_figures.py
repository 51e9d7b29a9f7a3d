"""The server's counts of tokens and of the times between them. Oracle: prometheus_client's own histogram."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tiny_llm_server.metrics import FAST, TokenFigures

NAME = "vllm:inter_token_latency_seconds"
TIMES = st.one_of(st.sampled_from((0.0, *FAST)), st.floats(0, 200))  # a time may equal a bound


def lines_of(registry: CollectorRegistry) -> list[str]:
    """The lines of the times between tokens. Only the oracle says when it was created."""
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if NAME in line and "_created" not in line]


@given(seconds=st.lists(TIMES, max_size=20))
def test_times_between_tokens_read_as_those_of_a_histogram(seconds: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    figures = TokenFigures(lambda: "smollm2")
    ours.register(figures)
    histogram = Histogram(
        NAME,
        "Seconds between consecutive tokens of a completion.",
        ["model_name"],
        buckets=FAST,
        registry=theirs,
    )
    for one in seconds:
        figures.add(1, one)
        histogram.labels("smollm2").observe(one)
    assert lines_of(ours) == lines_of(theirs)


def test_a_first_token_has_no_time_before_it() -> None:
    registry = CollectorRegistry()
    figures = TokenFigures(lambda: "smollm2")
    registry.register(figures)
    figures.num_prompt_tokens += 7
    figures.add(1, None)
    figures.add(3, 0.5)
    name = {"model_name": "smollm2"}
    assert registry.get_sample_value("vllm:prompt_tokens_total", name) == 7
    assert registry.get_sample_value("vllm:generation_tokens_total", name) == 4
    assert registry.get_sample_value(f"{NAME}_count", name) == 1
    assert registry.get_sample_value(f"{NAME}_sum", name) == 0.5
