"""Slots: where the tokens of many sequences live, each as one number, in one array.

A block table answers for one position at a time. A kernel, a gather or a write wants the addresses of a whole
batch at once: slot = block * block_size + offset, the row of that token in a pool seen as a flat list of
tokens. Computed for whole blocks at a time, and used for every layer. Source: `slot_mapping` in vLLM.
"""

from collections.abc import Sequence as Seq
from itertools import chain

import mlx.core as mx

from .paged_attention import BlockTable


def flat_slots(tables: Seq[BlockTable], lengths: Seq[int]) -> mx.array:
    """The slots of the positions 0 .. length - 1 of each table, one table after the other: int32 [total].

    Token i of a table is in block `blocks[i // block_size]` at offset `i % block_size`; its slot is
    block * block_size + offset. Work is done for whole blocks: no step of Python for every token.

    Raises ValueError where a length is negative or more than its table's tokens, where there are not as many
    lengths as tables, or where tables differ in block size, as those of one pool cannot.
    """
    _check_lengths(tables, lengths)
    if not tables:
        return mx.array([], mx.int32)
    size = tables[0].block_size
    used = [table.blocks[: -(-length // size)] for table, length in zip(tables, lengths, strict=True)]
    first_slots = size * mx.array(list(chain.from_iterable(used)), mx.int32)  # [blocks]
    slots = (first_slots[:, None] + mx.arange(size, dtype=mx.int32)).flatten()  # [blocks * size]
    parts, start = [], 0
    for blocks, length in zip(used, lengths, strict=True):
        parts.append(slots[start : start + length])
        start += len(blocks) * size
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
