"""What was measured of requests that were served, by simulated or by real replicas, and its summary."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """A request that has its answer. Times are in seconds, from the start of the trace."""

    request_id: str
    replica: str
    arrival: float
    first_token: float
    end: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_outputs: int

    @property
    def ttft(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.first_token - self.arrival


@dataclass(frozen=True)
class Summary:
    """Figures of a run.

    hit_rate: the share of all prompt tokens that came from a prefix cache. ttft_p50, ttft_p99, latency_p50:
    seconds from arrival to the first token, and to the last one. throughput: output tokens per second, from
    the first arrival to the last end. imbalance: the largest number of tokens that a replica computed, over
    the mean of all replicas; 1 is perfect.
    """

    num_requests: int
    hit_rate: float
    ttft_p50: float
    ttft_p99: float
    latency_p50: float
    throughput: float
    imbalance: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` percent of the values do not exceed.

    >>> percentile([4, 1, 3, 2], 50), percentile([4, 1, 3, 2], 99)
    (2, 4)
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def summarize(served: Sequence[Served], num_replicas: int) -> Summary:
    """Return the figures of a run. Raises ValueError if nothing was served."""
    if not served:
        raise ValueError("no request was served")
    ttfts = [one.ttft for one in served]
    computed: Counter[str] = Counter()
    for one in served:
        computed[one.replica] += one.num_prompt_tokens - one.num_cached_tokens + one.num_outputs
    seconds = max(one.end for one in served) - min(one.arrival for one in served)
    return Summary(
        num_requests=len(served),
        hit_rate=sum(one.num_cached_tokens for one in served) / sum(one.num_prompt_tokens for one in served),
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        latency_p50=percentile([one.end - one.arrival for one in served], 50),
        throughput=sum(one.num_outputs for one in served) / seconds,
        imbalance=max(computed.values()) * num_replicas / computed.total(),
    )
