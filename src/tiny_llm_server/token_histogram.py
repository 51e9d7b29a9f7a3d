"""A Prometheus histogram that is updated for each token of the server.

The library's histogram takes two locks and searches its buckets one by one, which costs more than the rest of
a token's metrics. This one is updated in the event loop only, and makes its samples at each scrape.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from time import time

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenHistogram(Collector):
    """A histogram with the label `model_name`; no samples before the first observation.

    bounds: the upper bounds of the buckets, in ascending order and without infinity.
    """

    def __init__(
        self, name: str, description: str, bounds: Sequence[float], model_name: Callable[[], str]
    ) -> None:
        self._name = name
        self._description = description
        self._bounds = bounds
        self._model_name = model_name
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._created = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._created = self._created or time()
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        family = HistogramMetricFamily(self._name, self._description, labels=["model_name"])
        if self._created:
            model, names = self._model_name(), [*map(str, self._bounds), "+Inf"]
            buckets = list(zip(names, accumulate(self._counts), strict=True))
            family.add_metric([model], buckets, self._sum)
            family.add_sample(f"{self._name}_created", {"model_name": model}, self._created)
        yield family
