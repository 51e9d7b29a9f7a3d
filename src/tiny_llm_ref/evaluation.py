"""Evaluate a model on a text: compute the logits after each token with paged attention, like the engine."""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .engine_config import EngineConfig
from .kv_pool import DTYPES, KVPool
from .layer_groups import group_layers
from .model import Model
from .page_layout import PageLayout
from .paged_attention import BlockAllocator


def text_logits(model: Model, token_ids: Seq[int], config: EngineConfig) -> mx.array:
    """The logits [L, vocab_size] after each of L tokens, in float32; L is at least 1.

    Uses a temporary pool, and computes in chunks of `max_num_batched_tokens`.
    """
    chunk = config.max_num_batched_tokens
    layout = PageLayout(group_layers(model.config.windows), config.block_size, chunk)
    num_blocks = layout.max_blocks(len(token_ids))
    pool = KVPool.for_model(model.config, num_blocks, config.block_size, DTYPES[config.kv_cache_dtype])
    tables = layout.tables(BlockAllocator(num_blocks))
    rows = []
    for start in range(0, len(token_ids), chunk):
        tokens = token_ids[start : start + chunk]
        for table in tables:
            table.append_tokens(len(tokens))
        spans = [(tables, start, start + len(tokens))]
        context = layout.context(pool, spans, model.config.attention_scale, None)
        rows.append(model(mx.array([list(tokens)], mx.int32), context)[0])
        pool.evaluate(rows[-1])
        layout.release_passed(tables, start + len(tokens))
    return mx.concatenate(rows)
