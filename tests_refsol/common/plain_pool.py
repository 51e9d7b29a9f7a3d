"""A pool of plain values: copies and writes as arrays would make them, without arrays."""

from collections import Counter
from collections.abc import Sequence

from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable

from common.blocks import counts


class PlainPool:
    """What is in each slot of a pool, by slot; a slot that was never written to is None."""

    def __init__(self) -> None:
        self.held: dict[int, object] = {}

    def copy(self, copies: Sequence[BlockCopy], size: int) -> None:
        """Make copies of blocks of `size` tokens: all sources are read before any target is written."""
        assert len({copy.dst for copy in copies}) == len(copies), "two copies go to one block"
        read = [[self.held.get(copy.src * size + i) for i in range(copy.length)] for copy in copies]
        for copy, tokens in zip(copies, read, strict=True):
            self.held |= {copy.dst * size + i: token for i, token in enumerate(tokens) if token is not None}

    def write(self, table: BlockTable, tokens: Sequence[object]) -> None:
        """Write the last tokens of a table."""
        slots = table.slots(table.num_tokens - len(tokens), table.num_tokens)
        self.held |= dict(zip(slots, tokens, strict=True))

    def read(self, table: BlockTable) -> list[object]:
        """What a table finds in the slots of its tokens."""
        return [self.held.get(slot) for slot in table.slots(0, table.num_tokens)]


def check_conserved(allocator: BlockAllocator, *tables: BlockTable) -> None:
    """Free and held blocks are the whole pool, and a block has as many holders as tables name it."""
    held = Counter(block for table in tables for block in table.blocks)
    assert counts(allocator) == [held[block] for block in range(allocator.num_blocks)]
    assert allocator.num_free == counts(allocator).count(0)
