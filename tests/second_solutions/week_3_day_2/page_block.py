# A second solution, written only from the docstrings and the first hints.
"""Attention over pages that are separate arrays: rectangular queries, one block table for each row.

A `PageBlock` is one block of one layer, outside any pool. The packed kernel needs a pool, so the pages that
the tables name are stacked into a small one, in which each block has a new number: its index in the stack.
Knows nothing of reference counts; a page is written in place, through its arrays.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import mlx.core as mx

from .paged_attention import BlockTable
from .paged_kernel import PackedBatch, Span, pack_batch, paged_attention


def copy_block(src_page: PageBlock, dst_page: PageBlock, src_start: int, dst_start: int, length: int) -> None:
    _check_range("source", src_page, src_start, length)
    _check_range("target", dst_page, dst_start, length)
    for src, dst in ((src_page.keys, dst_page.keys), (src_page.values, dst_page.values)):
        if (src.shape[0], src.shape[2], src.dtype) != (dst.shape[0], dst.shape[2], dst.dtype):
            raise ValueError(f"the pages differ: {_described(src)} and {_described(dst)}")
    for src, dst in ((src_page.keys, dst_page.keys), (src_page.values, dst_page.values)):
        dst[:, dst_start : dst_start + length] = src[:, src_start : src_start + length]


def pack_last_tokens(tables: Seq[BlockTable], length: int, place_of: Mapping[int, int]) -> PackedBatch:
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
