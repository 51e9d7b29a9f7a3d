"""One layer of a pool with several tables in interleaved blocks, and the same tokens in contiguous arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tiny_llm.paged_attention import BlockAllocator, BlockTable

from common.toy_arrays import EMPTY, floats


@dataclass
class Pool:
    """Tables with interleaved blocks, their keys and values in a layer of a pool, and contiguous copies."""

    tables: list[BlockTable]
    keys: mx.array  # [num_blocks, Hkv, block_size, D]
    values: mx.array
    streams: list[tuple[np.ndarray, np.ndarray]]  # keys and values [Hkv, tokens, D], rounded as stored


def pool_of(
    totals: Sequence[int],
    *,
    kv_heads: int = 2,
    size: int = 8,
    block_size: int = 4,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Pool:
    """`totals` random tokens in each table; slots without a token hold `EMPTY`."""
    rng = np.random.default_rng(seed)
    allocator = BlockAllocator(sum(-(-total // block_size) for total in totals) + 2)
    allocator.allocate()  # another sequence's
    tables = [BlockTable(allocator, block_size) for _ in totals]
    for row in rng.permutation(np.repeat(np.arange(len(totals)), totals)):
        tables[row].append_tokens(1)
    layer = np.full((2, allocator.num_blocks, kv_heads, block_size, size), EMPTY, np.float32)
    streams = []
    for table, total in zip(tables, totals, strict=True):
        tokens = floats(mx.array(rng.normal(size=(2, kv_heads, total, size)), dtype))
        for position, slot in enumerate(table.slots(0, total)):
            layer[:, slot // block_size, :, slot % block_size] = tokens[:, :, position]
        streams.append((tokens[0], tokens[1]))
    return Pool(tables, mx.array(layer[0], dtype), mx.array(layer[1], dtype), streams)


# Arguments of `pool_of`, and `heads`: the numbers of query heads and of key and value heads.
SHAPES = {
    "blocks_of_one_token": {"totals": [5, 1, 9], "block_size": 1},
    "only_full_blocks": {"totals": [8, 4, 12]},
    "one_token_in_the_last_block": {"totals": [9, 5, 1]},
    "blocks_larger_than_the_sequence": {"totals": [3, 1, 30], "block_size": 32},
    "blocks_of_seven_tokens": {"totals": [23, 2, 14], "block_size": 7},
    "as_many_kv_heads_as_query_heads": {"totals": [9, 6], "heads": (3, 3)},
    "three_query_heads_per_kv_head": {"totals": [9, 6], "heads": (9, 3)},
    "one_kv_head": {"totals": [9, 6], "heads": (4, 1)},
    "heads_of_4": {"totals": [9, 6], "size": 4},
    "heads_of_20": {"totals": [9, 6], "size": 20},
    "heads_of_64": {"totals": [40, 6], "size": 64},
    "stored_in_float16": {"totals": [9, 6, 17], "dtype": mx.float16},
    "stored_in_bfloat16": {"totals": [9, 6, 17], "dtype": mx.bfloat16},
    "long_sequences": {"totals": [100, 1, 65], "block_size": 16},
}


def shaped_pool(shape: dict) -> tuple[Pool, int]:
    """The pool of one of `SHAPES`, and its number of query heads."""
    heads, kv_heads = shape.get("heads", (4, 2))
    others = {name: value for name, value in shape.items() if name != "heads"}
    return pool_of(kv_heads=kv_heads, **others), heads
