"""A pool and a swap space of symbolic blocks, so that tests can check which keys are where."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.sliding_window import WindowedTable
from tiny_llm.swap import SwapSpace

from common.blocks import counts

SIZE = 4  # tokens in a block, everywhere in this suite
TEXT = tuple(range(100, 160))
Slots = dict[int, list[object]]  # the content of each slot of each block


def in_use(allocator: BlockAllocator) -> int:
    """The number of allocated blocks."""
    return allocator.num_blocks - allocator.num_free


class ShortReprSequence(PagedSequence):
    """A sequence with a one-line repr for failing tests."""

    def __repr__(self) -> str:
        return f"<{self.seq_id!r}: {self.num_computed} of {self.num_tokens} tokens computed>"


@dataclass(repr=False)
class Setup:
    """A pool and a swap space of symbolic blocks, so that tests can check which keys are where.

    A slot holds the group of layers and all tokens up to its own: everything that keys depend on. `windows`
    has one entry per group of layers.
    """

    windows: tuple[int | None, ...] = (None,)
    num_blocks: int = 80
    host_blocks: int = 40
    pool: Slots = field(default_factory=dict)
    host: Slots = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = tuple(LayerGroup((layer,), window) for layer, window in enumerate(self.windows))
        self.layout = PageLayout(groups, SIZE, 16)
        self.allocator = BlockAllocator(self.num_blocks)
        self.space = SwapSpace(self.host_blocks, SIZE)
        self.pool = {block: [None] * SIZE for block in range(self.num_blocks)}
        self.host = {block: [None] * SIZE for block in range(self.host_blocks)}

    def __repr__(self) -> str:
        """One line, without the blocks' contents, for failing tests."""
        return f"Setup(windows={self.windows}, {self.num_blocks} blocks, {self.host_blocks} on the host)"

    def sequence(
        self, tokens: Sequence[int], computed: int, outputs: Sequence[int] = (), salt: str = ""
    ) -> PagedSequence:
        """A running sequence with `computed` computed tokens."""
        sequence = ShortReprSequence(
            seq_id="one",
            request_id="one",
            prompt=tuple(tokens),
            params=SamplingParams(cache_salt=salt),
            seed=0,
            max_len=200,
            outputs=list(outputs),
            tables=self.layout.tables(self.allocator),
            streams=self.layout.streams(salt),
        )
        self.compute(sequence, computed)
        return sequence

    def compute(self, sequence: PagedSequence, count: int) -> None:
        """Compute the next known tokens as a step does: copy, write, then release passed blocks."""
        start = sequence.num_computed
        for copy in sequence.append_tokens(count):
            self.pool[copy.dst] = list(self.pool[copy.src])
        sequence.num_computed += count
        for group, table in enumerate(sequence.tables):
            for position in range(start, sequence.num_computed):
                [slot] = table.slots(position, position + 1)
                self.pool[slot // SIZE][slot % SIZE] = (group, *sequence.tokens(0, position + 1))
        self.layout.release_passed(sequence.tables, sequence.num_computed)
        self.overwrite_free_blocks()

    def overwrite_free_blocks(self) -> None:
        """Overwrite free blocks, so that a test notices a read of them."""
        for block, count in enumerate(counts(self.allocator)):
            if count == 0:
                self.pool[block] = ["free"] * SIZE

    def swap_out(self, sequence: PagedSequence, filled_from: Mapping[int, int] | None = None) -> int | None:
        """Swap out, copy, and release the pages; return the number of copies, None if the host is full."""
        copies = self.space.swap_out(sequence, filled_from)
        if copies is None:
            return None
        for block, host_block in copies:
            self.host[host_block] = list(self.pool[block])
        sequence.release_pages()
        self.overwrite_free_blocks()
        return len(copies)

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> int:
        """Swap in and copy; return the number of copies."""
        copies = self.space.swap_in(sequence, at_hand)
        for block, host_block in copies:
            assert block in self.pool
            self.pool[block] = list(self.host[host_block])
        self.overwrite_free_blocks()
        return len(copies)

    def adopt(self, sequence: PagedSequence, donor: PagedSequence, num_blocks: int) -> bool:
        """Let a sequence adopt the first blocks of another, as from a prefix cache.

        Windowed tables get the blocks that the next token sees. Returns False, without a change, if the donor
        lacks some.
        """
        firsts = [
            0 if window is None else max(0, num_blocks * SIZE - window + 1) // SIZE for window in self.windows
        ]
        donors = [getattr(table, "start", 0) // SIZE for table in donor.tables]
        if any(has > needed for has, needed in zip(donors, firsts, strict=True)):
            return False
        for table, other, first, begin in zip(sequence.tables, donor.tables, firsts, donors, strict=True):
            if isinstance(table, WindowedTable):
                table.skip_to(first * SIZE)
            for block in other.blocks[first - begin : num_blocks - begin]:
                table.share_block(block, SIZE)
        sequence.add_shared_tokens(num_blocks * SIZE)
        return True

    def at_hand(self, *others: PagedSequence) -> dict[bytes, int]:
        """The full blocks of other sequences by their hashes."""
        found: dict[bytes, int] = {}
        for other in others:
            stop = other.num_computed // SIZE
            for group, table in enumerate(other.tables):
                hashes = other.stream_of(group, stop).hashes[getattr(table, "start", 0) // SIZE : stop]
                found.update(zip(hashes, table.blocks, strict=False))
        return found

    def check(self, *running: PagedSequence, waiting: Sequence[PagedSequence] = ()) -> None:
        """Assert that the keys of running sequences are in the pool and those of waiting ones on the host."""
        held = Counter(block for one in running for table in one.tables for block in table.blocks)
        assert counts(self.allocator) == [held[block] for block in range(self.num_blocks)]
        for one in running:
            for group, table in enumerate(one.tables):
                start = getattr(table, "start", 0)
                assert start + table.num_tokens == one.num_computed, (
                    "a table does not end at the last computed token"
                )
                for position, slot in enumerate(table.slots(start, one.num_computed), start):
                    found = self.pool[slot // SIZE][slot % SIZE]
                    assert found == (group, *one.tokens(0, position + 1)), (
                        "a slot does not hold the keys of its token"
                    )
        held = Counter()
        for one in waiting:
            assert one.swapped is not None
            tables, num_computed, _ = one.swapped
            for group, (first, host_blocks) in enumerate(tables):
                held.update(host_blocks)
                assert first + len(host_blocks) == -(-num_computed // SIZE)
                for position in range(first * SIZE, num_computed):
                    found = self.host[host_blocks[position // SIZE - first]][position % SIZE]
                    assert found == (group, *one.tokens(0, position + 1)), (
                        "a slot does not hold the keys of its token"
                    )
        assert counts(self.space.allocator) == [held[block] for block in range(self.host_blocks)]
