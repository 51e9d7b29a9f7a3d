# A second solution, written only from the docstrings and the first hints.
"""Compaction: move the blocks in use to the front of the pool, so that its end can be cut off.

Serving does not need this: pages have no external fragmentation, because any free block serves any sequence.
It is for a pool that shrinks. Ints only; the pool makes the copies.
"""

from collections.abc import Iterable

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy


def moves_to_front(allocator: BlockAllocator) -> dict[int, int]:
    used = [block for block in range(allocator.num_blocks) if allocator.ref_count(block)]
    past_end = [block for block in used if block >= len(used)]
    free = [block for block in range(len(used)) if not allocator.ref_count(block)]
    return dict(zip(past_end, free, strict=True))


def compact_pages(allocator: BlockAllocator, active_tables: Iterable[BlockHolder]) -> list[BlockCopy]:
    holders = list(active_tables)
    _check_holders_complete(allocator, holders)
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
    copies = compact_pages(allocator, active_requests)
    if pool is not None:
        pool.copy_blocks(copies)
    return allocator.num_free
