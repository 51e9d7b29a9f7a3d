"""Times as `vllm bench serve` reports them."""

from collections.abc import Sequence
from statistics import fmean, median, pstdev


def statistics_of(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and 99th percentile, in milliseconds; None without values."""
    values = sorted(1000 * second for second in seconds)
    return {
        f"mean_{name}_ms": fmean(values) if values else None,
        f"median_{name}_ms": median(values) if values else None,
        f"std_{name}_ms": pstdev(values) if values else None,
        f"p99_{name}_ms": _percentile(values, 99) if values else None,
    }


def _percentile(values: Sequence[float], percent: int) -> float:
    """Interpolate linearly between the two nearest of the sorted values, as numpy does."""
    below, part = divmod(percent * (len(values) - 1), 100)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * part / 100
