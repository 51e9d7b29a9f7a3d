"""A pool that stores plain values instead of arrays."""

from collections import Counter
from collections.abc import Sequence

from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable

from common.blocks import counts


class PlainPool:
    """The value in each slot of a pool; None for a slot that was never written."""

    def __init__(self) -> None:
        self.held: dict[int, object] = {}

    def copy(self, copies: Sequence[BlockCopy], size: int) -> None:
        """Copy blocks of `size` tokens: all sources are read before any target is written."""
        assert len({copy.dst for copy in copies}) == len(copies), "two copies have the same target block"
        read = [[self.held.get(copy.src * size + i) for i in range(copy.length)] for copy in copies]
        for copy, tokens in zip(copies, read, strict=True):
            self.held |= {copy.dst * size + i: token for i, token in enumerate(tokens) if token is not None}

    def write(self, table: BlockTable, tokens: Sequence[object]) -> None:
        """Write the last tokens of a table."""
        slots = table.slots(table.num_tokens - len(tokens), table.num_tokens)
        self.held |= dict(zip(slots, tokens, strict=True))

    def read(self, table: BlockTable) -> list[object]:
        """The values in the slots of a table's tokens."""
        return [self.held.get(slot) for slot in table.slots(0, table.num_tokens)]


def check_conserved(allocator: BlockAllocator, *tables: BlockTable) -> None:
    """Assert that each block's reference count is the number of tables that contain it."""
    held = Counter(block for table in tables for block in table.blocks)
    assert counts(allocator) == [held[block] for block in range(allocator.num_blocks)]
    assert allocator.num_free == counts(allocator).count(0)
