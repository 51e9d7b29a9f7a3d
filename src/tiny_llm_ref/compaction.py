"""Compaction: blocks in use move to the front of the pool, so that its end can be given back.

Pages have no external fragmentation: any free block serves anybody, so serving needs none of this. Its use is
a pool that shrinks, and blocks that stand side by side for one long copy. Ints only, but for the copies that
the pool makes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy


class BlockHolder(Protocol):
    """Who owns references to blocks: a table, or the prefix cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def blocks(self) -> Seq[int]:
        """The blocks, one entry for each reference."""

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved: from old ids to new ones."""


def compact_pages(
    allocator: BlockAllocator, active_tables: Iterable[BlockHolder], pending: Seq[BlockCopy] = ()
) -> list[BlockCopy]:
    """Give the blocks in use the ids 0 .. n - 1; the copies that the pool must make before it is used again.

    n is the number of blocks in use: those that are among the first n already stay, and the others take the
    places of the free ones there. Every holder gets the new ids.

    active_tables: everybody who holds a block. pending: copies that were planned and not made. They are among
    those returned, with their targets renamed, unless nobody holds the target any more. A target that moves
    is not copied itself: nothing is in it yet. All sources are read before any target is written.

    Raises ValueError, unchanged, where somebody who holds a block is missing: he would read another's keys.
    """
    holders = list(active_tables)
    _check_all_are_here(allocator, holders)
    in_use = [block for block in range(allocator.num_blocks) if allocator.ref_count(block) > 0]
    holes = [block for block in range(len(in_use)) if allocator.ref_count(block) == 0]
    moved = dict(zip(in_use[len(in_use) - len(holes) :], holes, strict=True))
    waited_for = [copy for copy in pending if allocator.ref_count(copy.dst) > 0]
    allocator.relocate(moved)
    for holder in holders:
        holder.rename_blocks(moved)
    to_come = {copy.dst for copy in waited_for}
    copies = [BlockCopy(copy.src, moved.get(copy.dst, copy.dst), copy.length) for copy in waited_for]
    size = holders[0].block_size if holders else 0
    return copies + [BlockCopy(old, new, size) for old, new in moved.items() if old not in to_come]


def compact_memory(
    allocator: BlockAllocator, active_requests: Iterable[BlockHolder], pool: KVPool | None = None
) -> int:
    """Compact a pool between two steps; how many blocks at its end are free now, and can be given back.

    active_requests: everybody who holds a block, the prefix cache too. pool: where the keys and values are,
    which move with their blocks; None: the ids alone. Raises as `compact_pages`.
    """
    copies = compact_pages(allocator, active_requests)
    if pool is not None:
        pool.copy_blocks(copies)
    return allocator.num_free


def _check_all_are_here(allocator: BlockAllocator, holders: Iterable[BlockHolder]) -> None:
    held = Counter(block for holder in holders for block in holder.blocks)
    for block in range(allocator.num_blocks):
        if allocator.ref_count(block) != held[block]:
            raise ValueError(
                f"block {block} has {allocator.ref_count(block)} holders, {held[block]} of them are here: "
                "who is not told that it moves would read another's keys"
            )
