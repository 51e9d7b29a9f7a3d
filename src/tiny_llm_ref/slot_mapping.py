"""Slots: the flat address of a token in the pool, `block * block_size + offset`.

Computed once a step for every token that the step writes, so that no layer looks anything up.
"""

from .paged_attention import BlockTable


def slots(table: BlockTable, start: int, stop: int) -> list[int]:
    """The slots of the logical positions start .. stop - 1 of a table.

    Raises ValueError where the range lies outside the table's tokens.
    """
    if not 0 <= start <= stop <= table.num_tokens:
        raise ValueError(f"positions {start} to {stop} are not within the table's {table.num_tokens} tokens")
    size = table.block_size
    return [table.blocks[position // size] * size + position % size for position in range(start, stop)]
