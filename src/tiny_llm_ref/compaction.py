"""Compaction: move the blocks in use to the front of the pool, so that its end can be cut off.

Serving does not need this: pages have no external fragmentation, because any free block serves any sequence.
It is for a pool that shrinks. Ints only; the pool makes the copies.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy


class BlockHolder(Protocol):
    """A holder of blocks: a block table, or the prefix cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def blocks(self) -> Seq[int]:
        """The ids of its blocks, one entry for each reference."""

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Replace the ids of blocks that have moved: {old: new}; other blocks keep their ids."""


def moves_to_front(allocator: BlockAllocator) -> dict[int, int]:
    """Return moves {old id: new id} after which the blocks in use have the ids 0 .. n - 1. Moves nothing.

    n is the number of blocks in use, those with a holder. To keep the number of copies minimal, a block in
    use with an id below n stays. Each of the others moves to a free id below n; which one does not matter.

    In the example blocks 0, 2 and 5 are in use, so n is 3, and only 5 has to move.

    >>> allocator = BlockAllocator(6)
    >>> for block in [allocator.allocate() for _ in range(6)]:
    ...     if block not in (0, 2, 5):
    ...         allocator.free(block)
    >>> moves_to_front(allocator)
    {5: 1}
    """
    in_use = [block for block in range(allocator.num_blocks) if allocator.ref_count(block) > 0]
    holes = [block for block in range(len(in_use)) if allocator.ref_count(block) == 0]
    return dict(zip(in_use[len(in_use) - len(holes) :], holes, strict=True))


def compact_pages(allocator: BlockAllocator, active_tables: Iterable[BlockHolder]) -> list[BlockCopy]:
    """Give the blocks in use the ids 0 .. n - 1, and return the copies that the pool must make now.

    active_tables: everything that holds a block, which is all block tables and the prefix cache (day 3.4); it
    may be a generator. Make the moves of `moves_to_front` in the allocator (`relocate`) and in every holder
    (`rename_blocks`). Return one copy for each block that moved, of the whole block: `length` is the holders'
    `block_size`. Without holders nothing is in use, and the result is [].

    Raises ValueError, and changes nothing, if a holder is missing from `active_tables`: it would keep the old
    ids, and read another sequence's keys. The given `_check_holders_complete` does this.

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
    _check_holders_complete(allocator, holders)
    moved = moves_to_front(allocator)
    allocator.relocate(moved)
    for holder in holders:
        holder.rename_blocks(moved)
    return [BlockCopy(old, new, holders[0].block_size) for old, new in moved.items()]


def compact_memory(
    allocator: BlockAllocator, active_requests: Iterable[BlockHolder], pool: KVPool | None = None
) -> int:
    """Compact a pool between two steps, and return the number of free blocks, which are all at its end now.

    active_requests: everything that holds a block, as in `compact_pages`. pool: the keys and values; make the
    copies in it (`KVPool.copy_blocks`) before you return. None: only ids move. Raises ValueError, and changes
    nothing, if `compact_pages` does.

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


def _check_holders_complete(allocator: BlockAllocator, holders: Iterable[BlockHolder]) -> None:
    """Raise ValueError unless the holders have every reference that the allocator counts."""
    held = Counter(block for holder in holders for block in holder.blocks)
    for block in range(allocator.num_blocks):
        if allocator.ref_count(block) != held[block]:
            raise ValueError(
                f"holders of block {block}: {allocator.ref_count(block)} counted by the allocator, "
                f"{held[block]} passed; pass each holder once, because one that is left out would read "
                "another block's keys after the move"
            )
