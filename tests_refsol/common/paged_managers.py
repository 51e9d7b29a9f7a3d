"""Paged batch managers of toy models, and checks of their pages and logits."""

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
    blocks: int = 8, max_seqs: int = 4, *, budget: int = 64, context: int = 32, min_pages: int | None = None
) -> PagedBatchManager:
    """A manager without a model, for bookkeeping only, with blocks of 4 tokens."""
    return PagedBatchManager(
        blocks, 4, max_seqs, max_batched_tokens=budget, max_model_len=context, min_pages=min_pages
    )


def check_pages(manager: PagedBatchManager) -> None:
    """Assert that each block's reference count is the number of tables that contain it."""
    sequences = [*manager.running, *manager.waiting]
    check_conserved(manager.allocator, *(table for sequence in sequences for table in sequence.tables))


@dataclass
class RecordingModel(CountingModel):
    """A model that records the number of tokens and of logit rows of each pass.

    It asserts that the KV pool has as many blocks as the manager's allocator.
    """

    model: Model = field(default_factory=tiny_model)
    num_rows: list[int] = field(default_factory=list)
    manager: PagedBatchManager | None = None

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """The logits of the wrapped model."""
        assert self.manager is not None
        assert self.manager.pool is not None
        assert self.manager.pool.num_blocks == self.manager.allocator.num_blocks, (
            "resize the pool before the pass"
        )
        assert tokens.dtype == mx.int32
        logits = super().__call__(tokens, context)
        self.num_rows.append(logits.shape[1])
        return logits


def with_model(
    blocks: int = 64,
    block_size: int = 4,
    max_seqs: int = 6,
    *,
    budget: int = 512,
    min_pages: int | None = None,
    model: RecordingModel | None = None,
    policies: Policies | None = None,
) -> PagedBatchManager:
    """A manager with a model; keys and values are float32, so storing them does not round."""
    recording = model or RecordingModel()
    recording.manager = PagedBatchManager(
        blocks,
        block_size,
        max_seqs,
        model=recording,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        min_pages=min_pages,
        policies=policies,
    )
    return recording.manager


def check_logits(ready: Mapping[str, mx.array], known: Mapping[str, Sequence[int]]) -> None:
    """Assert that each row of logits matches the model's logits for the sequence's tokens."""
    for name, row in ready.items():
        expected = logits_after(tiny_model(), known[name])
        np.testing.assert_allclose(
            np.array(row), expected, rtol=1e-3, atol=1e-3, err_msg=f"the logits of {name!r}"
        )
