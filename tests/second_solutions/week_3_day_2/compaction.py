"""Blocks from the end of the pool to the first free ids."""

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
        """Use the new ids of blocks that have moved: {old: new}; other blocks keep theirs."""


def moves_to_front(allocator: BlockAllocator) -> dict[int, int]:
    """Return which blocks move so that those in use have the ids 0 .. n - 1."""
    moved, front = {}, 0
    used = allocator.num_blocks - allocator.num_free
    for block in reversed(range(used, allocator.num_blocks)):
        if allocator.ref_count(block):
            while allocator.ref_count(front):
                front += 1
            moved[block] = front
            front += 1
    return moved


def compact_pages(allocator: BlockAllocator, active_tables: Iterable[BlockHolder]) -> list[BlockCopy]:
    """Give the blocks in use the ids 0 .. n - 1, and return the copies that the pool must make now."""
    holders = tuple(active_tables)
    _check_all_are_here(allocator, holders)
    moved = moves_to_front(allocator)
    for holder in holders:
        holder.rename_blocks(moved)
    allocator.relocate(moved)
    return [BlockCopy(a, b, holders[-1].block_size) for a, b in moved.items()]


def compact_memory(
    allocator: BlockAllocator, active_requests: Iterable[BlockHolder], pool: KVPool | None = None
) -> int:
    """Compact a pool between two steps, and return how many blocks are free: they are all at its end now."""
    made = compact_pages(allocator, active_requests)
    if pool:
        pool.copy_blocks(made)
    return allocator.num_free


def _check_all_are_here(allocator: BlockAllocator, holders: Iterable[BlockHolder]) -> None:
    """Raise ValueError unless the holders account for every reference that the allocator counts."""
    held = Counter(block for holder in holders for block in holder.blocks)
    for block in range(allocator.num_blocks):
        if allocator.ref_count(block) != held[block]:
            raise ValueError(
                f"block {block} has {allocator.ref_count(block)} holders, {held[block]} of them are here: "
                "one that is not told of a move would read other keys"
            )
