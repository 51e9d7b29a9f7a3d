"""What happens to the blocks of a pool, step by step, for whoever watches; nothing while nobody does.

Found by comparing the pool's bookkeeping before and after a step, so that nothing in it has to tell.
"""

from enum import Enum
from typing import NamedTuple

from .paged_batch import PagedBatchManager


class BlockEventKind(Enum):
    """What can happen to a block. Holders are tables; what the prefix cache keeps is counted apart."""

    ALLOCATED = "allocated"  # it was free, and is held
    SHARED = "shared"  # it has more holders than before, or was kept and is in use again
    RELEASED = "released"  # it has fewer holders than before, and is not free
    FREED = "freed"  # nobody holds or keeps it any more
    CACHED = "cached"  # the prefix cache keeps it
    EVICTED = "evicted"  # the prefix cache has given it up
    COPIED = "copied"  # it was filled from another block of the pool
    SWAPPED_OUT = "swapped_out"  # it was copied to a block on the host
    SWAPPED_IN = "swapped_in"  # it was filled from a block on the host


class BlockEvent(NamedTuple):
    """What happened to a block. holders: tables that hold it now. other: the other block of a copy."""

    kind: BlockEventKind
    block: int
    holders: int
    other: int | None = None


class BlockWatch:
    """Watches the blocks of a batch manager. Belongs to the engine's thread."""

    def __init__(self, manager: PagedBatchManager) -> None:
        self._manager = manager
        self._seen_plan = manager.last_plan
        self._holders, self._kept = self._count()

    def look(self) -> list[BlockEvent]:
        """What has happened since the last look, or since this was made: the net effect of each step.

        Copies first, then the blocks in the order of their ids.
        """
        holders, kept = self._count()
        events = self._copies(holders)
        for block in sorted({*self._holders, *holders, *self._kept, *kept}):
            before, after = self._holders.get(block, 0), holders.get(block, 0)
            was_kept, is_kept = block in self._kept, block in kept
            kinds = _what_happened(before, after, was_kept, is_kept)
            events += [BlockEvent(kind, block, after) for kind in kinds]
        self._holders, self._kept = holders, kept
        return events

    def _count(self) -> tuple[dict[int, int], set[int]]:
        """How many tables hold each block that any holds, and which blocks are kept."""
        holders: dict[int, int] = {}
        for sequence in self._manager.running:
            for block in sequence.blocks:
                holders[block] = holders.get(block, 0) + 1
        return holders, set(self._manager.prefix.blocks)

    def _copies(self, holders: dict[int, int]) -> list[BlockEvent]:
        """The copies of the last step, if it has not been looked at."""
        plan = self._manager.last_plan
        if plan is self._seen_plan:
            return []
        self._seen_plan = plan
        moved = [
            *((BlockEventKind.SWAPPED_OUT, block, host_block) for block, host_block in plan.swapped_out),
            *(
                (BlockEventKind.SWAPPED_IN, block, host_block)
                for block, host_block in plan.swapped_in.items()
            ),
            *((BlockEventKind.COPIED, copy.dst, copy.src) for copy in plan.copies),
        ]
        return [BlockEvent(kind, block, holders.get(block, 0), other) for kind, block, other in moved]


def _what_happened(before: int, after: int, was_kept: bool, is_kept: bool) -> list[BlockEventKind]:
    """The events of one block, from its holders and whether it was kept."""
    kinds = []
    if was_kept and not is_kept:
        kinds.append(BlockEventKind.EVICTED)
    if after > before:
        is_shared = before > 0 or (was_kept and is_kept)
        kinds.append(BlockEventKind.SHARED if is_shared else BlockEventKind.ALLOCATED)
    if is_kept and not was_kept:
        kinds.append(BlockEventKind.CACHED)
    if after < before and (after or is_kept):
        kinds.append(BlockEventKind.RELEASED)
    if (before or was_kept) and not (after or is_kept):
        kinds.append(BlockEventKind.FREED)
    return kinds
