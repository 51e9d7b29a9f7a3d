"""A pool of plain Python values: each slot remembers which token of which stream was written to it."""

from collections import Counter

from tiny_llm.paged_attention import BlockCopy
from tiny_llm.sequence import PagedSequence
from tiny_llm.sliding_window import WindowedTable
from tiny_llm.step import Plan


class SymbolicPool:
    """The contents of each slot: whose layers' keys, and the stream of tokens up to the one written there."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.held: dict[int, tuple[int, ...] | None] = {}  # the group of layers, then the tokens
        self.on_host: dict[int, list[tuple[int, ...] | None]] = {}

    def perform(self, plan: Plan) -> None:
        """Swap blocks out and in; make the copies, all read before any is written; write the chunks."""
        size = self.block_size
        for block, host_block in plan.swapped_out:
            self.on_host[host_block] = [self.held.get(block * size + i) for i in range(size)]
        for block, host_block in plan.swapped_in.items():
            for i, value in enumerate(self.on_host[host_block]):
                self.held[block * size + i] = value
        read = [
            [self.held.get(copy.src * self.block_size + i) for i in range(copy.length)]
            for copy in plan.copies
        ]
        for copy, values in zip(plan.copies, read, strict=True):
            for i, value in enumerate(values):
                assert value is not None, "a copy of a slot that was never written"
                self.held[copy.dst * self.block_size + i] = value
        written = Counter()
        for sequence, start, stop, _ in plan.chunks:
            for group, table in enumerate(sequence.tables):
                addresses = table.slots(start, stop)
                written.update(addresses)
                for position, slot in zip(range(start, stop), addresses, strict=True):
                    self.held[slot] = (group, *sequence.tokens(0, position + 1))
        assert all(count == 1 for count in written.values()), (
            "two tokens of one step were written to one slot"
        )

    def check(self, sequence: PagedSequence) -> None:
        """Check that every computed token that a query may see is in its slot, after the right prefix."""
        tokens = tuple(sequence.tokens(0, sequence.num_computed))
        for group, table in enumerate(sequence.tables):
            start = table.start if isinstance(table, WindowedTable) else 0
            for position, slot in enumerate(table.slots(start, sequence.num_computed), start):
                assert self.held[slot] == (group, *tokens[: position + 1]), (
                    f"{sequence.seq_id} reads another sequence's token {position}"
                )

    def move(self, copies: list[BlockCopy]) -> None:
        """Make compaction's copies: whole blocks, whatever they hold."""
        size = self.block_size
        read = [[self.held.get(copy.src * size + i) for i in range(size)] for copy in copies]
        for copy, values in zip(copies, read, strict=True):
            for i, value in enumerate(values):
                if value is not None:
                    self.held[copy.dst * size + i] = value
