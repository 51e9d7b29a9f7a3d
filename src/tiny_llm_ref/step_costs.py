"""What a step costs, relative to other steps, by the number of its rows.

A decode reads all weights to compute one row. More rows share that reading, so they cost little while memory
is the bottleneck; once arithmetic is the bottleneck, each row adds its full cost. Only a measurement tells
where that changes. It is made when the engine starts, and corrected by the steps that follow.
"""

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Self

import mlx.core as mx

from .kv_pool import KVPool
from .model import Model
from .page_layout import PageLayout
from .paged_attention import BlockAllocator

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of rows that are measured
MEASURING_SECONDS = 1.0  # start no new round after this; the first round always completes
CONTEXT = 64  # tokens before the measured rows
SCALE_WEIGHT = 0.2  # exponent by which one step corrects the scale
LEAST_WEIGHT = 0.05  # smallest exponent by which one step corrects its own number of rows
NUM_BEFORE = 2  # steps that the measurement counts for; the more steps there are, the less one more corrects


class StepCosts:
    """The relative cost of a step by its number of rows.

    rows: the measured numbers of rows, increasing, at least one. seconds: for each of them, never decreasing.
    They are seconds as measured at the start; later only their ratios are kept right.
    """

    def __init__(self, rows: Seq[int], seconds: Seq[float]) -> None:
        self.rows = tuple(rows)
        self.seconds = list(seconds)
        self._num_steps = [float(NUM_BEFORE)] * len(self.rows)
        self._scale = 1.0  # how many times as long steps take as `seconds` says

    @classmethod
    def of(cls, measured: Seq[tuple[int, float]]) -> Self:
        """Make costs from pairs of rows and seconds, in increasing order of the rows.

        Other programs can only make a time too long. So a cost that exceeds a later one is lowered to it.

        >>> StepCosts.of([(1, 4.0), (2, 9.0), (4, 8.0)]).seconds
        [4.0, 8.0, 8.0]
        """
        rows, seconds = zip(*measured, strict=True)
        return cls(rows, [*accumulate(reversed(seconds), min)][::-1])

    def of_step(self, num_rows: int) -> float:
        """Return the cost of a step of `num_rows` rows, at least 1.

        Between two measurements the costs are on a straight line. Beyond the last one, the line through the
        last two continues. If there is only one, its cost holds for all numbers of rows.

        >>> costs = StepCosts.of([(1, 1.0), (6, 2.0), (7, 9.0)])
        >>> [costs.of_step(rows) for rows in (1, 5, 7, 8)]
        [1.0, 1.8, 9.0, 16.0]
        """
        if len(self.rows) == 1:
            return self.seconds[0]
        after = self._place_after(num_rows)
        share, (before, behind) = self._share(num_rows, after), self.seconds[after - 1 : after + 1]
        return before + (behind - before) * share

    def observe(self, num_rows: int, seconds: float) -> None:
        """Correct the costs by a step that took so many seconds.

        A part of the difference is common to all numbers of rows, such as a longer context or a busy machine:
        it goes to a scale. A part of the rest goes to the cost of this number of rows, more of it in its
        first steps than later. A step that took more than twice or less than half of what was expected counts
        as twice or half.

        >>> costs = StepCosts.of([(1, 1.0), (8, 2.0)])
        >>> for _ in range(50):
        ...     costs.observe(1, 3.0)
        ...     costs.observe(8, 12.0)
        >>> round(costs.of_step(8) / costs.of_step(1))
        4
        """
        ratio = min(2.0, max(0.5, seconds / (self._scale * self.of_step(num_rows))))
        self._scale *= ratio**SCALE_WEIGHT
        if len(self.rows) == 1:
            return
        after = self._place_after(num_rows)
        share = min(1.0, self._share(num_rows, after))
        for place, weight in ((after - 1, 1 - share), (after, share)):
            self._num_steps[place] += weight
            exponent = max(LEAST_WEIGHT, 0.5 / self._num_steps[place]) * (1 - SCALE_WEIGHT)
            self._move(place, ratio ** (weight * exponent))

    def _move(self, place: int, factor: float) -> None:
        """Multiply one cost; raise later ones and lower earlier ones where needed to keep the order."""
        moved = self.seconds[place] * factor
        earlier = [min(one, moved) for one in self.seconds[:place]]
        later = [max(one, moved) for one in self.seconds[place + 1 :]]
        self.seconds = [*earlier, moved, *later]

    def _place_after(self, num_rows: int) -> int:
        """The place of the second of the two measurements that a number of rows is between."""
        return min(max(1, bisect_left(self.rows, num_rows)), len(self.rows) - 1)

    def _share(self, num_rows: int, after: int) -> float:
        """Where a number of rows is: 0 at the first of two measurements, 1 at the second, above 1 beyond."""
        first, second = self.rows[after - 1 : after + 1]
        return (num_rows - first) / (second - first)


def measure_step_costs(model: Model, layout: PageLayout, kv_dtype: mx.Dtype, max_rows: int) -> StepCosts:
    """Time forward passes of 1 to `max_rows` rows, all with logits, over a small pool of their own.

    Takes about `MEASURING_SECONDS`, or longer if the first round over all numbers of rows does. Each number
    of rows keeps its shortest time.
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
    begun = perf_counter()
    rounds: list[list[float]] = []
    while not rounds or perf_counter() - begun < MEASURING_SECONDS:
        rounds.append([_seconds(partial(run, CONTEXT, CONTEXT + rows)) for rows in wanted])
    return StepCosts.of([(rows, min(times)) for rows, *times in zip(wanted, *rounds, strict=True)])


def _seconds(run: Callable[[], None]) -> float:
    """The time of a call, in seconds."""
    start = perf_counter()
    run()
    return perf_counter() - start
