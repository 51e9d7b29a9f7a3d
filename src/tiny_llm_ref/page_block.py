"""Attention over pages that are arrays of their own: rectangular queries, one table for each row.

A `PageBlock` is one block of one layer, and who has pages and tables needs no pool. The packed kernel wants
one: so the blocks that the tables name are laid side by side in a small pool, and numbered by their places
there. Knows nothing of who holds which block; writes to a page happen on its arrays, in place.
"""

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
    """One block's keys and values of one layer, each [Hkv, block_size, D]; written in place.

    Raises ValueError where they are not floats of that rank, or not alike.
    """

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
        """Tokens that it holds."""
        return self.keys.shape[1]


def copy_block(src_page: PageBlock, dst_page: PageBlock, src_start: int, dst_start: int, length: int) -> None:
    """Copy `length` tokens, keys and values, from offset `src_start` of one page to `dst_start` of another.

    Both may be the same page, with ranges that overlap: all is read before anything is written. Raises
    ValueError, and copies nothing, where a range leaves its page or the pages differ in heads, D or type.
    """
    src, dst = src_page.keys, dst_page.keys
    if (src.shape[0], src.shape[2], src.dtype) != (dst.shape[0], dst.shape[2], dst.dtype):
        raise ValueError(f"pages differ in heads, D or type: {_described(src)} and {_described(dst)}")
    _check_range("source", src_page, src_start, length)
    _check_range("target", dst_page, dst_start, length)
    keys = src_page.keys[:, src_start : src_start + length]
    values = src_page.values[:, src_start : src_start + length]
    dst_page.keys[:, dst_start : dst_start + length] = keys
    dst_page.values[:, dst_start : dst_start + length] = values


def paged_attention_kernel(
    query: mx.array,
    page_tables: Seq[BlockTable],
    page_blocks: Mapping[int, PageBlock],
    block_size: int = 16,
    scale: float | None = None,
) -> mx.array:
    """Attend with query [B, H, L, D] to the pages of B tables -> [B, H, L, D], in the query's type.

    Row b's queries are the last L tokens of table b, whose own keys and values are in their pages already;
    each sees its sequence's tokens up to itself. Tables may differ in length. page_blocks: pages by block id,
    [Hkv, block_size, D] each, all alike; H is a multiple of Hkv. scale: None is D**-0.5.

    Raises ValueError for shapes, types, tables or a block size that do not fit together, and
    `UnknownBlockError` for a block that a table names and `page_blocks` has not.
    """
    _check_tables(query, page_tables, block_size)
    pages = _named_pages(page_tables, page_blocks)
    _check_pages(query, pages, block_size)
    B, H, L, D = query.shape
    keys = mx.stack([page.keys for page in pages.values()])  # [len(pages), Hkv, block_size, D]
    values = mx.stack([page.values for page in pages.values()])
    batch = _last_tokens(page_tables, L, list(pages))
    packed = query.astype(mx.float32).swapaxes(0, 1).reshape(1, H, B * L, D)
    out = paged_attention(packed, keys, values, batch, D**-0.5 if scale is None else scale)
    return out.reshape(H, B, L, D).swapaxes(0, 1).astype(query.dtype)


def _named_pages(tables: Seq[BlockTable], page_blocks: Mapping[int, PageBlock]) -> dict[int, PageBlock]:
    """The pages that the tables' tokens are in, each once, by block id."""
    pages: dict[int, PageBlock] = {}
    for number, table in enumerate(tables):
        for block in _filled_blocks(table):
            if block not in page_blocks:
                raise UnknownBlockError(f"table {number} names block {block}, which page_blocks has not")
            pages[block] = page_blocks[block]
    return pages


def _last_tokens(tables: Seq[BlockTable], length: int, laid_out: Seq[int]) -> PackedBatch:
    """The last `length` tokens of each table, over a pool that holds the blocks `laid_out` in this order."""
    batch = pack_batch([Span(table, table.num_tokens - length, table.num_tokens) for table in tables])
    place_of = {block: place for place, block in enumerate(laid_out)}
    rows = [[place_of[block] for block in _filled_blocks(table)] for table in tables]
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return replace(batch, tables=mx.array(padded, mx.int32))


def _filled_blocks(table: BlockTable) -> list[int]:
    return table.blocks[: -(-table.num_tokens // table.block_size)]


# What does not fit together is refused here; the kernel below checks none of it.


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
