"""What each step changed in a pool, for a watcher: the blocks, and the sequences that hold them.

Changes are found by comparing the bookkeeping before and after a step, so the pool and the scheduler need no
extra code, and an engine without watchers does no extra work.
"""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from .paged_batch import PagedBatchManager
from .sequence import PagedSequence, SequenceState
from .sliding_window import first_block

MAX_WAITING_SHOWN = 256  # waiting sequences that are shown; this bounds the cost of a `poll`


class BlockEventKind(Enum):
    """What can happen to a block. Holders are tables; the prefix cache is not counted as one here."""

    ALLOCATED = "allocated"  # it was free and is held now
    SHARED = "shared"  # it has more holders than before, or was idle in the cache and is held again
    RELEASED = "released"  # it has fewer holders than before, and is not free
    FREED = "freed"  # neither a table nor the prefix cache holds it any more
    CACHED = "cached"  # the prefix cache keeps it now
    EVICTED = "evicted"  # the prefix cache does not keep it any more
    COPIED = "copied"  # it was filled from another block of the pool
    SWAPPED_OUT = "swapped_out"  # it was copied to a block on the host
    SWAPPED_IN = "swapped_in"  # it was filled from a block on the host


class BlockEvent(NamedTuple):
    """One change of a block. holders: tables that hold it now. other: the other block of a copy.

    hash: for CACHED and EVICTED, the hash under which the prefix cache keeps, or kept, the block.
    """

    kind: BlockEventKind
    block: int
    holders: int
    other: int | None = None
    hash: bytes | None = None


class TableView(NamedTuple):
    """A block table: its blocks, and the position of the first of them in the sequence, in blocks."""

    first: int
    blocks: tuple[int, ...]


class SequenceView(NamedTuple):
    """A snapshot of a sequence that has not ended: its token counts, and where its keys and values are.

    num_forks: completions that are still to be forked from it. num_host_blocks: its blocks on the host.
    """

    seq_id: str
    request_id: str
    is_running: bool
    num_prompt_tokens: int
    num_outputs: int
    num_computed: int
    num_cached_tokens: int
    num_forks: int
    num_host_blocks: int
    tables: tuple[TableView, ...]


class PoolChange(NamedTuple):
    """The changes of a step: block events, new or changed sequences, and the ids of ended sequences.

    Only the first `MAX_WAITING_SHOWN` waiting sequences are shown. A waiting sequence that is no longer among
    these is listed in `ended`, and appears again later.
    """

    events: list[BlockEvent]
    sequences: list[SequenceView]
    ended: list[str]

    @property
    def is_empty(self) -> bool:
        """True if nothing has changed."""
        return not (self.events or self.sequences or self.ended)


class BlockWatch:
    """Watches the blocks of a batch manager. Belongs to the engine's thread."""

    def __init__(self, manager: PagedBatchManager) -> None:
        self._manager = manager
        self._seen_plan = manager.last_plan
        self._holders, self._kept = self._count()
        self._sequences = self._views()

    def snapshot(self) -> PoolChange:
        """Return the state at the last `poll`, as the changes that lead to it from an empty pool."""
        holders, kept = self._holders, self._kept
        return PoolChange(_events({}, holders, {}, kept), list(self._sequences.values()), [])

    def poll(self) -> PoolChange:
        """Return the net changes since the last `poll`, or since this object was made.

        Copies come first, then evictions, then the other events in the order of the block ids. So a hash that
        has moved to another block is evicted first and then cached.
        """
        (holders, kept), sequences = self._count(), self._views()
        change = PoolChange(
            self._copies(holders) + _events(self._holders, holders, self._kept, kept),
            [view for seq_id, view in sequences.items() if view != self._sequences.get(seq_id)],
            [seq_id for seq_id in self._sequences if seq_id not in sequences],
        )
        self._holders, self._kept, self._sequences = holders, kept, sequences
        return change

    def _count(self) -> tuple[dict[int, int], dict[int, bytes]]:
        """Return how many tables hold each held block, and the hash of each block that the cache keeps."""
        holders: dict[int, int] = {}
        for sequence in self._manager.running:
            for block in sequence.blocks:
                holders[block] = holders.get(block, 0) + 1
        return holders, dict(self._manager.prefix.hash_of)

    def _views(self) -> dict[str, SequenceView]:
        """Return views of the running sequences, in their order, and of the first waiting ones."""
        shown: Iterable[PagedSequence] = (
            *self._manager.running,
            *self._manager.first_waiting(MAX_WAITING_SHOWN),
        )
        return {sequence.seq_id: _view(sequence) for sequence in shown}

    def _copies(self, holders: dict[int, int]) -> list[BlockEvent]:
        """Return the copies of the last step, or none if an earlier poll has returned them."""
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


def _view(sequence: PagedSequence) -> SequenceView:
    host = sequence.swapped.tables if sequence.swapped is not None else ()
    return SequenceView(
        seq_id=sequence.seq_id,
        request_id=sequence.request_id,
        is_running=sequence.state is SequenceState.RUNNING,
        num_prompt_tokens=len(sequence.prompt),
        num_outputs=len(sequence.outputs),
        num_computed=sequence.num_computed,
        num_cached_tokens=sequence.num_cached_tokens,
        num_forks=sequence.num_forks,
        num_host_blocks=sum(len(table.host_blocks) for table in host),
        tables=tuple(TableView(first_block(table), tuple(table.blocks)) for table in sequence.tables),
    )


def _events(
    before: dict[int, int], after: dict[int, int], was_kept: dict[int, bytes], is_kept: dict[int, bytes]
) -> list[BlockEvent]:
    """Compare the holders and the kept blocks before and after; return the events, evictions first.

    A block that the cache keeps under another hash than before was evicted, and cached again.
    """
    evicted = {block: digest for block, digest in was_kept.items() if is_kept.get(block) != digest}
    cached = {block: digest for block, digest in is_kept.items() if was_kept.get(block) != digest}
    held = {block for block in before.keys() | after.keys() if before.get(block) != after.get(block)}
    others = [
        BlockEvent(
            kind,
            block,
            after.get(block, 0),
            hash=cached.get(block) if kind is BlockEventKind.CACHED else None,
        )
        for block in sorted({*held, *evicted, *cached})
        for kind in _event_kinds(
            before.get(block, 0),
            after.get(block, 0),
            was_kept=block in was_kept,
            is_kept=block in is_kept,
            is_new=block in cached,
        )
    ]
    return [
        BlockEvent(BlockEventKind.EVICTED, block, after.get(block, 0), hash=evicted[block])
        for block in sorted(evicted)
    ] + others


def _event_kinds(
    before: int, after: int, *, was_kept: bool, is_kept: bool, is_new: bool
) -> list[BlockEventKind]:
    """Return the events of one block, except evictions.

    before, after: its number of holders. is_new: the prefix cache keeps it now, and did not under this hash.
    """
    kinds = []
    if after > before:
        is_shared = before > 0 or (is_kept and not is_new)
        kinds.append(BlockEventKind.SHARED if is_shared else BlockEventKind.ALLOCATED)
    if is_new:
        kinds.append(BlockEventKind.CACHED)
    if after < before and (after or is_kept):
        kinds.append(BlockEventKind.RELEASED)
    if (before or was_kept) and not (after or is_kept):
        kinds.append(BlockEventKind.FREED)
    return kinds
