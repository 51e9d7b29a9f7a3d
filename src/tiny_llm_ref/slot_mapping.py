"""Slots: the addresses of all tokens of a batch in one array.

A token's slot is block * block_size + offset: its index if the pool is one flat list of tokens. A block table
returns the slots of one sequence as a Python list; a kernel, a gather or a write needs those of a whole batch
as one array. The array is computed once per step and used by every layer. Source: `slot_mapping` in vLLM.
"""

from collections.abc import Sequence as Seq
from itertools import chain

import mlx.core as mx

from .paged_attention import BlockTable


def flat_slots(tables: Seq[BlockTable], lengths: Seq[int]) -> mx.array:
    """Return the slots of the positions 0 .. length - 1 of each table, table after table: int32 [total].

    Token i of a table is in block `blocks[i // block_size]` at offset `i % block_size`; its slot is
    block * block_size + offset. A length may be less than the number of tokens in its table. Compute whole
    blocks with MLX, not one token at a time in Python: the sequences of one step may have a hundred thousand
    tokens.

    No tables, or only lengths of 0, give an empty int32 array [0]. In MLX `mx.array([])` is float32 unless
    you pass a dtype, and `mx.concatenate([])` is an error.

    Raises ValueError if a length is negative or more than the number of tokens in its table, if the number of
    lengths and tables differs, or if tables differ in block size: the given `_check_lengths` does all of
    this.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(8), 4)
    >>> copies = table.append_tokens(6)
    >>> table.blocks = [7, 2]  # for the example: other ids than the allocator chose
    >>> flat_slots([table], [6]).tolist()
    [28, 29, 30, 31, 8, 9]
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
        raise ValueError(
            f"there are {len(tables)} tables and {len(lengths)} lengths, expected one length for each table"
        )
    for table, length in zip(tables, lengths, strict=True):
        if not 0 <= length <= table.num_tokens:
            raise ValueError(f"a length of {length} is not within the table's {table.num_tokens} tokens")
        if table.block_size != tables[0].block_size:
            raise ValueError(
                f"tables of one pool differ in block size: {tables[0].block_size} and {table.block_size}"
            )
