"""Slots: the addresses of all tokens of a batch in one array.

A token's slot is block * block_size + offset: its index if the pool is one flat list of tokens. A block table
returns the slots of one sequence as a Python list; a kernel, a gather or a write needs those of a whole batch
as one array. The array is computed once per step and used by every layer. Source: `slot_mapping` in vLLM.
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
