"""Slots: the address of every token of a batch as one number, in one array.

A block table gives the addresses of one sequence as a Python list. A kernel, a gather or a write needs those
of a whole batch as one array: slot = block * block_size + offset, the token's row in a pool seen as a flat
list of tokens. The array is computed once a step and used by every layer. Source: `slot_mapping` in vLLM.
"""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .paged_attention import BlockTable


def flat_slots(tables: Seq[BlockTable], lengths: Seq[int]) -> mx.array:
    """Each table's ids are taken at the blocks of its positions."""
    _check_lengths(tables, lengths)
    parts = [mx.zeros((0,), mx.int32)]
    for table, length in zip(tables, lengths, strict=True):
        positions = mx.arange(length, dtype=mx.int32)
        ids = mx.array(table.blocks or [0], mx.int32)
        parts.append(ids[positions // table.block_size] * table.block_size + positions % table.block_size)
    return mx.concatenate(parts)


def _check_lengths(tables: Seq[BlockTable], lengths: Seq[int]) -> None:
    if len(tables) != len(lengths):
        raise ValueError(f"there are {len(tables)} tables and {len(lengths)} lengths")
    for table, length in zip(tables, lengths, strict=True):
        if not 0 <= length <= table.num_tokens:
            raise ValueError(f"a length of {length} is not within the table's {table.num_tokens} tokens")
        if table.block_size != tables[0].block_size:
            raise ValueError(
                f"tables of one pool differ in block size: {tables[0].block_size} and {table.block_size}"
            )
