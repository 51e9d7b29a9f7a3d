"""A log line every ten seconds while the engine works, with the figures that vLLM logs; silent when idle."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from tiny_llm import EngineStats

from .metrics import Metrics

LOG = logging.getLogger("uvicorn.error")
INTERVAL = 10.0  # seconds


class _Sample(NamedTuple):
    """Tokens counted since the server started, and when they were counted."""

    moment: float
    num_prompt_tokens: int
    num_generation_tokens: int


class ThroughputLog:
    """Logs the throughput since its last line.

    stats: returns the engine's statistics; None while the model loads.
    """

    def __init__(self, metrics: Metrics, stats: Callable[[], EngineStats | None]) -> None:
        self._metrics = metrics
        self._stats = stats
        self._last = self._sample(monotonic())

    async def run(self) -> None:
        """Log until cancelled."""
        while LOG.isEnabledFor(logging.INFO):
            await asyncio.sleep(INTERVAL)
            if (line := self.next_line(monotonic())) is not None:
                LOG.info("%s", line)

    def next_line(self, now: float) -> str | None:
        """Return the line for the time since the last call; None if the engine was idle. now: monotonic."""
        stats, last = self._stats(), self._last
        self._last = sample = self._sample(now)
        if stats is None or (sample[1:] == last[1:] and not stats.num_running and not stats.num_waiting):
            return None
        seconds = max(1e-9, now - last.moment)
        used = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        return (
            f"Avg prompt throughput: {(sample.num_prompt_tokens - last.num_prompt_tokens) / seconds:.1f} "
            "tokens/s, Avg generation throughput: "
            f"{(sample.num_generation_tokens - last.num_generation_tokens) / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {used / max(1, stats.num_blocks):.1%}, Prefix cache hit rate: "
            f"{stats.prefix_cache_hits / max(1, stats.prefix_cache_queries):.1%}"
        )

    def _sample(self, moment: float) -> _Sample:
        tokens = self._metrics.tokens
        return _Sample(moment, tokens.num_prompt_tokens, tokens.num_generation_tokens)
