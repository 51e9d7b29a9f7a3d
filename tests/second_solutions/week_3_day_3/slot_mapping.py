"""Slots: the address of every token of a batch as one number, in one array.

A block table gives the addresses of one sequence as a Python list. A kernel, a gather or a write needs those
of a whole batch as one array: slot = block * block_size + offset, the token's row in a pool seen as a flat
list of tokens. The array is computed once a step and used by every layer. Source: `slot_mapping` in vLLM.
"""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .paged_attention import BlockTable


def flat_slots(tables: Seq[BlockTable], lengths: Seq[int]) -> mx.array:
    """Return the slots of the positions 0 .. length - 1 of each table, table after table: int32 [total].

    Token i of a table is in block `blocks[i // block_size]` at offset `i % block_size`; its slot is block *
    block_size + offset. A length may be less than its table's tokens. Compute whole blocks as arrays, not one
    token at a time in Python: a step of long sequences has a hundred thousand tokens.

    No tables, or only lengths of 0, give an empty int32 array [0]. In MLX `mx.array([])` is float32 unless
    the type is named, and `mx.concatenate([])` is an error.

    Raises ValueError if a length is negative or more than its table's tokens, if there are not as many
    lengths as tables, or if tables differ in block size: the given `_check_lengths` does all of this.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(8), 4)
    >>> copies = table.append_tokens(6)
    >>> table.blocks = [7, 2]  # instead of the two that the allocator chose
    >>> flat_slots([table], [6]).tolist()
    [28, 29, 30, 31, 8, 9]
    """
    _check_lengths(tables, lengths)
    slots = [mx.array([], mx.int32)]
    for table, length in zip(tables, lengths, strict=True):
        size = table.block_size
        blocks = mx.array(table.physical_indices()[: -(-length // size)], mx.int32)
        slots.append((blocks[:, None] * size + mx.arange(size)).reshape(-1)[:length])
    return mx.concatenate(slots)
