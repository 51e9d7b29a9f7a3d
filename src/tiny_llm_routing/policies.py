"""Routing policies: in which order a request's replicas are tried."""

from collections.abc import Callable, Mapping
from typing import Protocol

from .fleet import Fleet
from .prompt_blocks import PromptBlocks

# Tokens of prefill that an unfinished sequence costs a new request. In the simulations of
# `pdm run bench routing --sequence-costs` the time to the first token does not change up to 32 and grows from
# 128 on, because hits are given up. A larger cost spreads long answers better.
SEQUENCE_COST = 32


class RoutingPolicy(Protocol):
    """Chooses a replica for a request."""

    def rank(self, blocks: PromptBlocks, fleet: Fleet, now: float) -> list[str]:
        """Return all replicas, the best first; those that are full come last."""


class RoundRobin:
    """Each request goes to the next replica, whatever it has cached or has to do."""

    def __init__(self) -> None:
        self._turn = 0

    def rank(self, blocks: PromptBlocks, fleet: Fleet, now: float) -> list[str]:
        """Return the replicas in their order, from the next one on."""
        replicas = fleet.replicas
        start = self._turn % max(1, len(replicas))
        self._turn += 1
        in_turn = [*replicas[start:], *replicas[:start]]
        return [replica.name for replica in sorted(in_turn, key=lambda replica: replica.is_full)]


class LeastLoaded:
    """The replica with the least work comes first, in tokens of prefill, whatever it has cached.

    Its work is the tokens that are queued there, plus `sequence_cost` for each unfinished sequence, because
    decodes take part in each step. Among equals the replica with the fewest unfinished sequences comes first,
    and among equals of these each one in turn.
    """

    def __init__(self, sequence_cost: float = SEQUENCE_COST) -> None:
        self.sequence_cost = sequence_cost
        self._turn = 0

    def rank(self, blocks: PromptBlocks, fleet: Fleet, now: float) -> list[str]:
        """Return the replicas by their work, the least first."""
        return self._by_cost({}, blocks, fleet)

    def _by_cost(self, cached: Mapping[str, int], blocks: PromptBlocks, fleet: Fleet) -> list[str]:
        """Return the replicas by their work with this prompt; cached: blocks of it that replicas have."""
        replicas, weight = fleet.replicas, self.sequence_cost
        uncached = [blocks.num_uncached(num_blocks) for num_blocks in range(len(blocks.hashes) + 1)]
        count = len(replicas)
        turn = self._turn % max(1, count)
        self._turn += 1
        takes: list[tuple[float, int, int, str]] = []
        is_full: list[tuple[float, int, int, str]] = []
        for place, replica in enumerate(replicas):
            name, unfinished = replica.name, replica.unfinished.value
            cost = replica.queued_tokens.value + uncached[cached.get(name, 0)] + weight * unfinished
            key = (cost, unfinished, (place - turn) % count, name)
            (is_full if replica.is_full else takes).append(key)
        return [key[-1] for key in (*sorted(takes), *sorted(is_full))]


class PrefixAware(LeastLoaded):
    """The replica with the least work before the request's first token comes first.

    This is the work that `LeastLoaded` counts, plus the tokens of the prompt that are not cached there. So a
    cached prefix and a queue are compared in one unit, and no ratio balances them: a replica that has 1,000
    tokens of the prompt cached is chosen until 1,000 tokens more are queued there than elsewhere.
    """

    def rank(self, blocks: PromptBlocks, fleet: Fleet, now: float) -> list[str]:
        """Return the replicas by their work with this prompt, the least first."""
        return self._by_cost(fleet.cached_blocks(blocks, now), blocks, fleet)


POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "prefix": PrefixAware,
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
}


def make_policy(name: str) -> RoutingPolicy:
    """Return a new policy of `POLICIES`. Raises ValueError, which lists them, for an unknown name.

    >>> make_policy("random")
    Traceback (most recent call last):
    ValueError: there is no routing policy 'random': choose one of prefix, least-loaded, round-robin
    """
    if name not in POLICIES:
        raise ValueError(f"there is no routing policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
