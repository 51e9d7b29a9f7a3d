"""Block tables with given blocks, and the reference counts of a pool."""

from tiny_llm.paged_attention import BlockAllocator, BlockTable


def counts(allocator: BlockAllocator) -> list[int]:
    """The reference count of each block of the pool."""
    return [allocator.ref_count(block) for block in range(allocator.num_blocks)]


def holders(table: BlockTable) -> list[int]:
    """The reference counts of a table's blocks, in the table's order."""
    return [table.allocator.ref_count(block) for block in table.blocks]


def filled(allocator: BlockAllocator, num_tokens: int, block_size: int = 4) -> BlockTable:
    """A table with `num_tokens` tokens, its blocks allocated by `append_tokens`."""
    table = BlockTable(allocator, block_size)
    table.append_tokens(num_tokens)
    return table


def table_of(blocks: list[int], num_tokens: int, block_size: int = 4) -> BlockTable:
    """A table over exactly these blocks, in this order, on a new pool."""
    table = BlockTable(BlockAllocator(max(blocks) + 1), block_size)
    table.blocks, table.num_tokens = blocks, num_tokens
    return table
