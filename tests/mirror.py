"""A model of the pool built only from block events, to be compared with the pool itself."""

from collections import Counter

from tiny_llm.block_events import BlockEventKind, PoolChange, SequenceView, TableView
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sliding_window import first_block

Kind = BlockEventKind


class Mirror:
    """The state of a pool as a listener to its block events knows it."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.cached: set[int] = set()
        self.hashes: set[bytes] = set()
        self.sequences: dict[str, SequenceView] = {}

    def apply(self, change: PoolChange) -> None:
        """Apply a change; each part must be consistent with the state so far."""
        for seq_id in change.ended:
            del self.sequences[seq_id]
        for view in change.sequences:
            assert self.sequences.get(view.seq_id) != view, "a view is sent without a change"
            self.sequences[view.seq_id] = view
        before = dict(self.holders)
        for kind, block, holders, _, digest in change.events:
            had = before.get(block, 0)
            assert kind is not Kind.ALLOCATED or (not had and block not in self.cached), (
                "allocated a block that is not free"
            )
            assert kind is not Kind.SHARED or holders > had, "shared, but no holder was added"
            assert kind is not Kind.RELEASED or holders < had, "released, but no holder was removed"
            self.holders[block] = holders
            assert (digest is not None) == (kind in (Kind.CACHED, Kind.EVICTED))
            if kind is Kind.CACHED:
                assert digest not in self.hashes, "cached a hash that is cached already"
                self.cached.add(block)
                self.hashes.add(digest)
            if kind is Kind.EVICTED:
                self.cached.remove(block)
                self.hashes.remove(digest)
            assert kind is not Kind.FREED or (holders == 0 and block not in self.cached), (
                "freed a block that is in use"
            )

    def check(self, manager: PagedBatchManager) -> None:
        """Compare it with the tables, the prefix cache and the queues."""
        held = Counter(block for sequence in manager.running for block in sequence.blocks)
        assert {block: count for block, count in self.holders.items() if count} == held
        assert self.cached == set(manager.prefix.blocks)
        assert self.hashes == set(manager.prefix.hashes())
        active = {sequence.seq_id: sequence for sequence in (*manager.running, *manager.waiting)}
        assert self.sequences.keys() == active.keys()
        for seq_id, view in self.sequences.items():
            sequence = active[seq_id]
            assert view.is_running == (sequence in manager.running)
            assert view.num_prompt_tokens + view.num_outputs == sequence.num_tokens
            assert (view.num_computed, view.num_forks) == (sequence.num_computed, sequence.num_forks)
            tables = [(first_block(table), tuple(table.blocks)) for table in sequence.tables]
            assert view.tables == tuple(TableView(*table) for table in tables)
            assert (view.num_host_blocks > 0) == (sequence.swapped is not None)
