"""Slots: the address of every token of a batch as one number, in one array.

A block table gives the addresses of one sequence as a Python list. A kernel, a gather or a write needs those
of a whole batch as one array: slot = block * block_size + offset, the token's row in a pool seen as a flat
list of tokens. The array is computed once a step and used by every layer. Source: `slot_mapping` in vLLM.
"""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .paged_attention import BlockTable


def flat_slots(tables: Seq[BlockTable], lengths: Seq[int]) -> mx.array:
    _check_lengths(tables, lengths)
    slots = [mx.array([], mx.int32)]
    for table, length in zip(tables, lengths, strict=True):
        size = table.block_size
        blocks = mx.array(table.physical_indices()[: -(-length // size)], mx.int32)
        slots.append((blocks[:, None] * size + mx.arange(size)).reshape(-1)[:length])
    return mx.concatenate(slots)
