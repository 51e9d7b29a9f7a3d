"""Rows of queries joined one by one, without a swap of axes."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import mlx.core as mx

from .errors import UnknownBlockError
from .paged_attention import BlockTable
from .paged_kernel import PackedBatch, Span, pack_batch, paged_attention

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(eq=False)
class PageBlock:
    """The keys and values of one block in one layer, each [Hkv, block_size, D]; written in place."""

    keys: mx.array
    values: mx.array

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or 0 in self.keys.shape or self.keys.dtype not in FLOATS:
            raise ValueError(
                f"keys must be floats [Hkv, block_size, D], none of them 0, not {_described(self.keys)}"
            )
        if (self.keys.shape, self.keys.dtype) != (self.values.shape, self.values.dtype):
            raise ValueError(f"keys are {_described(self.keys)}, values {_described(self.values)}")

    @property
    def block_size(self) -> int:
        """The number of tokens that it has places for."""
        return self.keys.shape[1]


def copy_block(src_page: PageBlock, dst_page: PageBlock, src_start: int, dst_start: int, length: int) -> None:
    """Copy `length` tokens, keys and values."""
    a, b = src_page.keys, dst_page.keys
    if a.dtype != b.dtype or a.shape[::2] != b.shape[::2]:
        raise ValueError("the pages are of different kinds")
    _check_range("source", src_page, src_start, length)
    _check_range("target", dst_page, dst_start, length)
    taken = [x[:, src_start : src_start + length] for x in (a, src_page.values)]
    for target, tokens in zip((b, dst_page.values), taken, strict=True):
        target[:, dst_start : dst_start + length] = tokens


def pack_last_tokens(tables: Seq[BlockTable], length: int, place_of: Mapping[int, int]) -> PackedBatch:
    """Pack the last `length` tokens of each of B tables, to be read from a pool with other block numbers."""
    width = max(len(_filled_blocks(table)) for table in tables)
    grid = [[0] * width for _ in tables]
    for row, table in zip(grid, tables, strict=True):
        for place, block in enumerate(_filled_blocks(table)):
            row[place] = place_of[block]
    spans = [Span(table, table.num_tokens - length, table.num_tokens) for table in tables]
    return replace(pack_batch(spans), tables=mx.array(grid, mx.int32))


def paged_attention_kernel(
    query: mx.array,
    page_tables: Seq[BlockTable],
    page_blocks: Mapping[int, PageBlock],
    block_size: int = 16,
    scale: float | None = None,
) -> mx.array:
    """Attend with query [B, H, L, D] to the pages of B tables -> [B, H, L, D], in the query's type."""
    _check_tables(query, page_tables, block_size)
    pages = _named_pages(page_tables, page_blocks)
    _check_pages(query, pages, block_size)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    rows, length, ids = query.shape[0], query.shape[2], list(pages)
    batch = pack_last_tokens(page_tables, length, {block: ids.index(block) for block in ids})
    keys, values = mx.stack([pages[i].keys for i in ids]), mx.stack([pages[i].values for i in ids])
    packed = mx.concatenate([query[i : i + 1].astype(mx.float32) for i in range(rows)], axis=2)
    out = paged_attention(packed, keys, values, batch, scale)
    unpacked = [out[:, :, i * length : (i + 1) * length] for i in range(rows)]
    return mx.concatenate(unpacked, axis=0).astype(query.dtype)


def _named_pages(tables: Seq[BlockTable], page_blocks: Mapping[int, PageBlock]) -> dict[int, PageBlock]:
    """The pages in which the tables have tokens, each once, by block id."""
    pages: dict[int, PageBlock] = {}
    for number, table in enumerate(tables):
        for block in _filled_blocks(table):
            if block not in page_blocks:
                raise UnknownBlockError(f"table {number} names block {block}, which page_blocks lacks")
            pages[block] = page_blocks[block]
    return pages


def _filled_blocks(table: BlockTable) -> list[int]:
    """The blocks in which a table has tokens, in order."""
    return table.blocks[: -(-table.num_tokens // table.block_size)]


# Arguments that do not fit together are refused here; the packed kernel checks none of it.


def _check_tables(query: mx.array, tables: Seq[BlockTable], block_size: int) -> None:
    if query.ndim != 4 or 0 in query.shape or query.dtype not in FLOATS:
        raise ValueError(f"query must be floats [B, H, L, D], none of them 0, not {_described(query)}")
    B, _, L, _ = query.shape
    if len(tables) != B:
        raise ValueError(f"query has {B} rows, and there are {len(tables)} page tables")
    for row, table in enumerate(tables):
        if table.block_size != block_size:
            raise ValueError(
                f"table {row} has blocks of {table.block_size} tokens, block_size is {block_size}"
            )
        if table.num_tokens < L:
            raise ValueError(f"table {row} holds {table.num_tokens} tokens, the query's rows {L}")
        if len(table.blocks) * block_size < table.num_tokens:
            raise ValueError(
                f"table {row} has {len(table.blocks)} blocks of {block_size} for {table.num_tokens} tokens"
            )


def _check_pages(query: mx.array, pages: Mapping[int, PageBlock], block_size: int) -> None:
    H, D = query.shape[1], query.shape[3]
    block, first = next(iter(pages.items()))
    Hkv = first.keys.shape[0]
    if first.keys.shape != (Hkv, block_size, D):
        raise ValueError(
            f"block_size {block_size} and a query of D = {D} want pages of [Hkv, {block_size}, {D}]; "
            f"block {block} is {_described(first.keys)}"
        )
    if H % Hkv:
        raise ValueError(f"H must be a multiple of Hkv: the query has {H} heads, the pages have {Hkv}")
    for other, page in pages.items():
        if (page.keys.shape, page.keys.dtype) != (first.keys.shape, first.keys.dtype):
            raise ValueError(
                f"pages must be alike: block {block} is {_described(first.keys)}, "
                f"block {other} is {_described(page.keys)}"
            )


def _check_range(name: str, page: PageBlock, start: int, length: int) -> None:
    if not 0 <= start <= start + length <= page.block_size:
        raise ValueError(
            f"the {name}, {length} tokens from {start}, is not within a page of {page.block_size}"
        )


def _described(array: mx.array) -> str:
    return f"{array.dtype} {array.shape}".removeprefix("mlx.core.")
