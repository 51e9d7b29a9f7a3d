# A second solution, written from the docstrings and the first hints.
"""Compaction: blocks in use move to the front of the pool, so that its end can be given back.

Pages have no external fragmentation: any free block serves any sequence, so serving needs none of this. It is
for a pool that shrinks. Ints only; the pool makes the copies.
"""

from collections.abc import Iterable

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy


def moves_to_front(allocator: BlockAllocator) -> dict[int, int]:
    """Return which blocks move so that those in use have the ids 0 .. n - 1: {old id: new id}. Moves nothing.

    n is the number of blocks in use, those with a holder. Blocks in use among the first n stay where they
    are: only those behind move, each to one of the free ids among the first n, in any assignment. So the
    number of copies is as small as it can be.

    >>> allocator = BlockAllocator(6)
    >>> for block in [allocator.allocate() for _ in range(6)]:
    ...     if block not in (0, 2, 5):
    ...         allocator.free(block)
    >>> moves_to_front(allocator)
    {5: 1}
    """
    used = [block for block in range(allocator.num_blocks) if allocator.ref_count(block)]
    behind = [block for block in used if block >= len(used)]
    free = [block for block in range(len(used)) if not allocator.ref_count(block)]
    return dict(zip(behind, free, strict=True))


def compact_pages(allocator: BlockAllocator, active_tables: Iterable[BlockHolder]) -> list[BlockCopy]:
    """Give the blocks in use the ids 0 .. n - 1, and return the copies that the pool must make now.

    active_tables: everything that holds a block: all block tables and the prefix cache; may be a generator.
    The blocks move as `moves_to_front` says, in the allocator (`relocate`) and in every holder
    (`rename_blocks`). There is one copy for each block that moved, of the whole block: `length` is the
    holders' `block_size`. Without a holder there is nothing to copy: [].

    Raises ValueError, and changes nothing, if a holder is missing: its ids would stay, and it would read
    another sequence's keys. The given `_check_all_are_here` does this.

    >>> from tiny_llm.paged_attention import BlockTable
    >>> allocator = BlockAllocator(4)
    >>> first, second = BlockTable(allocator, block_size=4), BlockTable(allocator, block_size=4)
    >>> _, _ = first.append_tokens(8), second.append_tokens(3)
    >>> first.release()
    >>> compact_pages(allocator, [second])
    [BlockCopy(src=2, dst=0, length=4)]
    >>> second.blocks, allocator.ref_count(0), allocator.ref_count(2)
    ([0], 1, 0)
    """
    holders = list(active_tables)
    _check_all_are_here(allocator, holders)
    if not holders:
        return []
    moved = moves_to_front(allocator)
    allocator.relocate(moved)
    for holder in holders:
        holder.rename_blocks(moved)
    length = holders[0].block_size
    return [BlockCopy(old, new, length) for old, new in moved.items()]


def compact_memory(
    allocator: BlockAllocator, active_requests: Iterable[BlockHolder], pool: KVPool | None = None
) -> int:
    """Compact a pool between two steps, and return how many blocks are free: they are all at its end now.

    active_requests: everything that holds a block, as in `compact_pages`. pool: the keys and values, which
    move with their blocks in this call (`KVPool.copy_blocks`), before anything reads the new ids; None: only
    ids move. Raises ValueError, and changes nothing, as `compact_pages` does.

    >>> from tiny_llm.paged_attention import BlockTable
    >>> allocator = BlockAllocator(6)
    >>> first, second = BlockTable(allocator, block_size=4), BlockTable(allocator, block_size=4)
    >>> _, _ = first.append_tokens(8), second.append_tokens(3)
    >>> first.release()
    >>> compact_memory(allocator, [second]), second.blocks
    (5, [0])
    """
    copies = compact_pages(allocator, active_requests)
    if pool is not None:
        pool.copy_blocks(copies)
    return allocator.num_free
