# A second solution, written from the docstrings and the first hints.
"""Attention over pages that are arrays of their own: rectangular queries, one block table for each row.

A `PageBlock` is one block of one layer; pages and tables need no pool. The packed kernel needs one, so the
pages that the tables name are stacked to a small pool, and a block's number is its place in that pool. Knows
nothing of reference counts; a page is written to through its arrays, in place.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import mlx.core as mx

from .paged_attention import BlockTable
from .paged_kernel import PackedBatch, Span, pack_batch, paged_attention


def copy_block(src_page: PageBlock, dst_page: PageBlock, src_start: int, dst_start: int, length: int) -> None:
    """Copy `length` tokens, keys and values, from offset `src_start` of one page to `dst_start` of another.

    Both may be the same page, with ranges that overlap: the target then has what the source range held
    before. (A slice of an MLX array is a value: a later write to the array does not change it.) The pages may
    have different block sizes, and share nothing afterwards. A length of 0 copies nothing.

    Raises ValueError, and copies nothing, if a range is not within its page (the given `_check_range` does
    this), or if the pages differ in heads, D or type: MLX would not complain, it would broadcast one head to
    all, and round.

    >>> def page(*tokens): return PageBlock(*(mx.array(tokens, mx.float32).reshape(1, -1, 1) for _ in "kv"))
    >>> one, other = page(1, 2, 3, 4), page(7, 8, 9)
    >>> copy_block(one, other, src_start=1, dst_start=0, length=2)
    >>> other.keys.flatten().tolist(), other.values.flatten().tolist()
    ([2.0, 3.0, 9.0], [2.0, 3.0, 9.0])
    """
    _check_range("source", src_page, src_start, length)
    _check_range("target", dst_page, dst_start, length)
    for src, dst in ((src_page.keys, dst_page.keys), (src_page.values, dst_page.values)):
        if (src.shape[0], src.shape[2], src.dtype) != (dst.shape[0], dst.shape[2], dst.dtype):
            raise ValueError(f"the pages differ: {_described(src)} and {_described(dst)}")
    for src, dst in ((src_page.keys, dst_page.keys), (src_page.values, dst_page.values)):
        dst[:, dst_start : dst_start + length] = src[:, src_start : src_start + length]


def pack_last_tokens(tables: Seq[BlockTable], length: int, place_of: Mapping[int, int]) -> PackedBatch:
    """Pack the last `length` tokens of each of B tables, to be read from a pool with other block numbers.

    place_of: for each block in which a table has tokens, its number in the small pool. The batch is that of
    `pack_batch` for these B spans, in the tables' order, but with the small pool's numbers in `tables`: row b
    has those of table b's blocks that hold tokens (the given `_filled_blocks`), filled up with 0 to the
    longest row, int32. `slots` stay as `pack_batch` makes them: nothing is going to be written. A
    `PackedBatch` is frozen; `dataclasses.replace` makes a changed one.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> one, other = (BlockTable(BlockAllocator(64), block_size=4) for _ in range(2))
    >>> one.blocks, one.num_tokens, other.blocks, other.num_tokens = [42, 7, 9], 10, [7], 3
    >>> batch = pack_last_tokens([one, other], length=2, place_of={7: 0, 9: 1, 42: 2})
    >>> batch.positions.tolist(), batch.tables.tolist()
    ([8, 9, 1, 2], [[2, 0, 1], [0, 0, 0]])
    """
    batch = pack_batch([Span(table, table.num_tokens - length, table.num_tokens) for table in tables])
    rows = [[place_of[block] for block in _filled_blocks(table)] for table in tables]
    longest = max(len(row) for row in rows)
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return replace(batch, tables=mx.array(padded, mx.int32))


def paged_attention_kernel(
    query: mx.array,
    page_tables: Seq[BlockTable],
    page_blocks: Mapping[int, PageBlock],
    block_size: int = 16,
    scale: float | None = None,
) -> mx.array:
    """Attend with query [B, H, L, D] to the pages of B tables -> [B, H, L, D], in the query's type.

    The L queries of row b are the last L tokens of table b, whose own keys and values are in their pages
    already; each sees the tokens of its sequence up to itself. Tables may differ in length and share pages.
    page_blocks: pages by block id, each [Hkv, block_size, D], all alike; others in it are ignored. H is a
    multiple of Hkv. scale: None is D**-0.5; 0.0 is a scale. The attention itself is float32.

    Raises ValueError for shapes, types, tables or a block size that do not fit together, and
    `UnknownBlockError` for a block that a table names and `page_blocks` lacks. The given `_check_tables`,
    `_named_pages` and `_check_pages` do this, if they are called in this order: the second returns the pages
    to stack, each once, by block id.

    `paged_attention` wants a packed row [1, H, B * L, D], all queries of table 0 first. Reshape does not move
    numbers: bring H in front of B (`swapaxes`) before B and L become one axis, and on the way back likewise.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(64), block_size=2)
    >>> table.blocks, table.num_tokens = [42, 7], 4
    >>> pages = {7: PageBlock(mx.zeros((1, 2, 2)), mx.array([[[6.0, 0], [8.0, 0]]]))}
    >>> pages[42] = PageBlock(mx.zeros((1, 2, 2)), mx.array([[[1.0, 0], [1.0, 0]]]))
    >>> out = paged_attention_kernel(mx.ones((1, 1, 1, 2)), [table], pages, block_size=2)
    >>> out.tolist()  # one query, the last token; equal keys: the mean of 1, 1, 6 and 8
    [[[[4.0, 0.0]]]]
    """
    _check_tables(query, page_tables, block_size)
    pages = _named_pages(page_tables, page_blocks)
    _check_pages(query, pages, block_size)
    B, H, L, D = query.shape
    keys = mx.stack([page.keys for page in pages.values()])
    values = mx.stack([page.values for page in pages.values()])
    batch = pack_last_tokens(page_tables, L, {block: place for place, block in enumerate(pages)})
    if scale is None:
        scale = D**-0.5
    q = query.swapaxes(0, 1).reshape(1, H, B * L, D).astype(mx.float32)
    out = paged_attention(q, keys, values, batch, scale)
    return out.reshape(H, B, L, D).swapaxes(0, 1).astype(query.dtype)
