"""Paged batch managers of toy models, and checks of what they hold and compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from tiny_llm.kv_context import KVContext
from tiny_llm.model import Model
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies

from common.plain_pool import check_conserved
from common.toy_models import CountingModel, logits_after, tiny_model


def manager_of(
    blocks: int = 8, seats: int = 4, *, budget: int = 64, context: int = 32, min_pages: int | None = None
) -> PagedBatchManager:
    """Blocks of 4 tokens, and no model: only the bookkeeping."""
    return PagedBatchManager(
        blocks, 4, seats, max_batched_tokens=budget, max_model_len=context, min_pages=min_pages
    )


def check_pages(manager: PagedBatchManager) -> None:
    """Free and held blocks are the whole pool, each held once by each table that names it."""
    sequences = [*manager.running, *manager.waiting]
    check_conserved(manager.allocator, *(table for sequence in sequences for table in sequence.tables))


@dataclass
class WatchedModel(CountingModel):
    """A model that notes how many tokens each pass brings, and for how many of them it makes logits.

    It does not run on a pool whose size is not that of the manager's allocator: it would write anywhere.
    """

    model: Model = field(default_factory=tiny_model)
    num_rows: list[int] = field(default_factory=list)
    manager: PagedBatchManager | None = None

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """The logits that the model makes."""
        assert self.manager is not None
        assert self.manager.pool is not None
        assert self.manager.pool.num_blocks == self.manager.allocator.num_blocks, "the pool's size"
        assert tokens.dtype == mx.int32
        logits = super().__call__(tokens, context)
        self.num_rows.append(logits.shape[1])
        return logits


def with_model(
    blocks: int = 64,
    block_size: int = 4,
    seats: int = 6,
    *,
    budget: int = 512,
    min_pages: int | None = None,
    model: WatchedModel | None = None,
    policies: Policies | None = None,
) -> PagedBatchManager:
    """A manager that computes; keys and values in float32, so that storing them rounds nothing."""
    watched = model or WatchedModel()
    watched.manager = PagedBatchManager(
        blocks,
        block_size,
        seats,
        model=watched,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        min_pages=min_pages,
        policies=policies,
    )
    return watched.manager


def check_logits(ready: Mapping[str, mx.array], known: Mapping[str, Sequence[int]]) -> None:
    """Each row of logits is what the model answers to the sequence's own tokens."""
    for name, row in ready.items():
        expected = logits_after(tiny_model(), known[name])
        np.testing.assert_allclose(
            np.array(row), expected, rtol=1e-3, atol=1e-3, err_msg=f"the logits of {name!r}"
        )
