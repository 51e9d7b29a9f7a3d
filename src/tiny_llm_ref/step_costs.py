"""What a step costs: the seconds of a forward pass by the number of its rows.

A decode reads all weights to compute one row. More rows share that reading, so they cost little while memory
is the bottleneck, and their full share once arithmetic is. Only a measurement tells where that changes.
"""

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Self

import mlx.core as mx

from .kv_pool import KVPool
from .model import Model
from .page_layout import PageLayout
from .paged_attention import BlockAllocator

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of rows that are measured
REPETITIONS = 3  # for each; the least time counts, because other programs only add to it
MAX_SECONDS = 2.0  # for measuring; the numbers of rows that are left are extrapolated
CONTEXT = 64  # tokens before the measured rows


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step by its number of rows. rows: increasing, at least one. seconds: never decreasing."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, measured: Seq[tuple[int, float]]) -> Self:
        """Make costs from pairs of rows and seconds, in increasing order; noise cannot make them fall."""
        least: list[float] = []
        for _, seconds in measured:
            least.append(max(seconds, least[-1] if least else 0.0))
        return cls(tuple(rows for rows, _ in measured), tuple(least))

    def of_step(self, num_rows: int) -> float:
        """Return the seconds of a step: on the line through the two nearest measurements.

        >>> costs = StepCosts.of([(1, 4.0), (2, 4.0), (4, 8.0)])
        >>> [costs.of_step(rows) for rows in (1, 2, 3, 4, 6)]
        [4.0, 4.0, 6.0, 8.0, 12.0]
        """
        if len(self.rows) == 1:
            return self.seconds[0]
        after = min(max(1, bisect_left(self.rows, num_rows)), len(self.rows) - 1)
        (x0, x1), (y0, y1) = self.rows[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        return y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0)


def measure_step_costs(model: Model, layout: PageLayout, kv_dtype: mx.Dtype, max_rows: int) -> StepCosts:
    """Time forward passes of 1 to `max_rows` rows, all with logits, over a small pool of their own.

    Takes at most about `MAX_SECONDS`, and one repetition of one row at least.
    """
    wanted = [rows for rows in ROWS if rows <= max_rows]
    allocator = BlockAllocator(len(layout.groups) * -(-(CONTEXT + wanted[-1]) // layout.block_size))
    pool = KVPool.for_model(model.config, allocator.num_blocks, layout.block_size, kv_dtype)
    tables = layout.tables(allocator)
    for table in tables:
        table.append_tokens(CONTEXT + wanted[-1])

    def run(start: int, stop: int) -> None:
        rows = mx.arange(stop - start, dtype=mx.int32)
        context = layout.context(pool, [(tables, start, stop)], model.config.attention_scale, rows)
        logits = model(mx.arange(start, stop, dtype=mx.int32)[None] % model.config.vocab_size, context)
        pool.start(logits)
        mx.eval(logits)

    run(0, CONTEXT)
    start = perf_counter()
    measured: list[tuple[int, float]] = []
    for rows in wanted:
        if measured and perf_counter() - start > MAX_SECONDS:
            break
        measured.append((rows, _least_seconds(partial(run, CONTEXT, CONTEXT + rows))))
    return StepCosts.of(measured)


def _least_seconds(run: Callable[[], None]) -> float:
    """The least time of several calls, in seconds."""
    times = []
    for _ in range(REPETITIONS):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)
