"""The figures of requests of all ingresses, for the `/metrics` of each of them.

Each ingress counts the requests that it has taken itself, and Serve's proxy lets any of them answer a scrape.
So the one that is asked asks the others.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from prometheus_client import Metric

LOG = logging.getLogger("uvicorn.error")  # the server's log
LABEL = "ingress"

Families = Sequence[Metric]


class IngressFigures:
    """Collects the figures of all ingresses. name: that of this one. own: its figures, with its name.

    ask_all: returns those of all that answer, by their names; it may raise.
    """

    def __init__(
        self, name: str, own: Callable[[], Families], ask_all: Callable[[], Awaitable[Mapping[str, Families]]]
    ) -> None:
        self._name = name
        self._own = own
        self._ask_all = ask_all

    async def collect(self) -> list[Metric]:
        """The figures with the label `ingress`; of this ingress only, if the others do not answer."""
        try:
            others = await self._ask_all()
        except Exception as error:  # a scrape gets what there is
            LOG.warning(
                "the other ingresses have not answered a scrape: %s", str(error) or type(error).__name__
            )
            others = {}
        return merged({**others, self._name: self._own()})


def merged(families_of: Mapping[str, Families]) -> list[Metric]:
    """Families of the same names as one, each sample with its ingress's name as the label `ingress`."""
    found: dict[str, Metric] = {}
    for ingress in sorted(families_of):
        for family in families_of[ingress]:
            whole = found.setdefault(
                family.name, Metric(family.name, family.documentation, family.type, family.unit)
            )
            whole.samples += [
                sample._replace(labels={**sample.labels, LABEL: ingress}) for sample in family.samples
            ]
    return [*found.values()]
