"""Times as `vllm bench serve` reports them."""

from statistics import fmean, median, pstdev


def statistics_of(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and 99th percentile, in milliseconds; None where there is nothing."""
    values = sorted(1000 * second for second in seconds)
    nearest_rank = -(-99 * len(values) // 100) - 1
    return {
        f"mean_{name}_ms": fmean(values) if values else None,
        f"median_{name}_ms": median(values) if values else None,
        f"std_{name}_ms": pstdev(values) if values else None,
        f"p99_{name}_ms": values[nearest_rank] if values else None,
    }
