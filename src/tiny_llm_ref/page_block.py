"""Attention over pages that are separate arrays: rectangular queries, one block table for each row.

A `PageBlock` is one block of one layer, outside any pool. The packed kernel needs a pool, so the pages that
the tables name are stacked into a small one, in which each block has a new number: its index in the stack.
Knows nothing of reference counts; a page is written in place, through its arrays.
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
    """The keys and values of one block in one layer, each [Hkv, block_size, D]; written in place.

    Raises ValueError unless both are float32, float16 or bfloat16, of rank 3, and of the same shape and type.
    """

    keys: mx.array
    values: mx.array

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or 0 in self.keys.shape or self.keys.dtype not in FLOATS:
            raise ValueError(
                "keys must be floats of shape [Hkv, block_size, D], with every dimension at least 1, "
                f"not {_described(self.keys)}"
            )
        if (self.keys.shape, self.keys.dtype) != (self.values.shape, self.values.dtype):
            raise ValueError(
                f"keys and values must have the same shape and type: keys are {_described(self.keys)}, "
                f"values are {_described(self.values)}"
            )

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.keys.shape[1]


def copy_block(src_page: PageBlock, dst_page: PageBlock, src_start: int, dst_start: int, length: int) -> None:
    """Copy `length` tokens, keys and values, from offset `src_start` of one page to `dst_start` of another.

    Both may be the same page, with overlapping ranges: the target range then holds what the source range held
    before. (A slice of an MLX array is a value: a later write to the array does not change it.) The pages may
    have different block sizes, and are independent afterwards. Write into the target's two arrays
    (`page.keys[:, a:b] = ...`) and do not replace them, because other objects may refer to them. A length of
    0 copies nothing.

    Raises ValueError, and copies nothing, if a range is not within its page (the given `_check_range` does
    this), or if the pages differ in heads, D or type: MLX would silently broadcast one head to all, or round.

    >>> def page(*tokens): return PageBlock(*(mx.array(tokens, mx.float32).reshape(1, -1, 1) for _ in "kv"))
    >>> one, other = page(1, 2, 3, 4), page(7, 8, 9)
    >>> copy_block(one, other, src_start=1, dst_start=0, length=2)
    >>> other.keys.flatten().tolist(), other.values.flatten().tolist()
    ([2.0, 3.0, 9.0], [2.0, 3.0, 9.0])
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


def pack_last_tokens(tables: Seq[BlockTable], length: int, place_of: Mapping[int, int]) -> PackedBatch:
    """Pack the last `length` tokens of each of B tables, for a small pool with other block numbers.

    place_of: the number in the small pool of each block in which a table has tokens.

    Call `pack_batch` with B spans, in the order of the tables, and replace the batch's `tables` by the small
    pool's numbers, int32: row b has one number for each block of table b that holds tokens (the given
    `_filled_blocks`), padded with 0 to the longest row. Leave `slots` unchanged: nothing will be written. A
    `PackedBatch` is frozen; `dataclasses.replace` makes a changed copy.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> one, other = (BlockTable(BlockAllocator(64), block_size=4) for _ in range(2))
    >>> one.blocks, one.num_tokens, other.blocks, other.num_tokens = [42, 7, 9], 10, [7], 3
    >>> batch = pack_last_tokens([one, other], length=2, place_of={7: 0, 9: 1, 42: 2})
    >>> batch.positions.tolist(), batch.tables.tolist()
    ([8, 9, 1, 2], [[2, 0, 1], [0, 0, 0]])
    """
    batch = pack_batch([Span(table, table.num_tokens - length, table.num_tokens) for table in tables])
    rows = [[place_of[block] for block in _filled_blocks(table)] for table in tables]
    longest = max(map(len, rows))
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

    The L queries of row b are the last L tokens of table b; their keys and values are in the pages already.
    Each query sees the tokens of its sequence up to itself. Tables may differ in length and may share pages.
    page_blocks: pages by block id, each [Hkv, block_size, D], all of one shape and type; pages that no table
    names are ignored. H is a multiple of Hkv. scale: None means D**-0.5; 0.0 is a valid scale. Compute the
    attention in float32.

    Raises ValueError for shapes, types, tables or a block size that do not fit together, and
    `UnknownBlockError` for a block that a table names and `page_blocks` lacks. Call the given
    `_check_tables`, `_named_pages` and `_check_pages`, in this order, to do this. `_named_pages` returns the
    pages to stack, each once, by block id.

    `paged_attention` takes a packed row [1, H, B * L, D], with all queries of table 0 first. A reshape does
    not reorder numbers: exchange B and H with `swapaxes` before you join B and L to one axis, and do the same
    on the way back.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(64), block_size=2)
    >>> table.blocks, table.num_tokens = [42, 7], 4
    >>> pages = {7: PageBlock(mx.zeros((1, 2, 2)), mx.array([[[6.0, 0], [8.0, 0]]]))}
    >>> pages[42] = PageBlock(mx.zeros((1, 2, 2)), mx.array([[[1.0, 0], [1.0, 0]]]))
    >>> out = paged_attention_kernel(mx.ones((1, 1, 1, 2)), [table], pages, block_size=2)
    >>> out.tolist()  # one query, for the last token; equal keys give the mean of 1, 1, 6 and 8
    [[[[4.0, 0.0]]]]
    """
    _check_tables(query, page_tables, block_size)
    pages = _named_pages(page_tables, page_blocks)
    _check_pages(query, pages, block_size)
    B, H, L, D = query.shape
    keys = mx.stack([page.keys for page in pages.values()])  # [len(pages), Hkv, block_size, D]
    values = mx.stack([page.values for page in pages.values()])
    batch = pack_last_tokens(page_tables, L, {block: place for place, block in enumerate(pages)})
    packed = query.astype(mx.float32).swapaxes(0, 1).reshape(1, H, B * L, D)
    out = paged_attention(packed, keys, values, batch, D**-0.5 if scale is None else scale)
    return out.reshape(H, B, L, D).swapaxes(0, 1).astype(query.dtype)


def _named_pages(tables: Seq[BlockTable], page_blocks: Mapping[int, PageBlock]) -> dict[int, PageBlock]:
    """Return the pages in which the tables have tokens, each once, by block id."""
    pages: dict[int, PageBlock] = {}
    for number, table in enumerate(tables):
        for block in _filled_blocks(table):
            if block not in page_blocks:
                raise UnknownBlockError(f"table {number} names block {block}, which is not in page_blocks")
            pages[block] = page_blocks[block]
    return pages


def _filled_blocks(table: BlockTable) -> list[int]:
    """Return the blocks in which a table has tokens, in order."""
    return table.blocks[: -(-table.num_tokens // table.block_size)]


# These checks reject arguments that do not fit together; the packed kernel checks nothing.


def _check_tables(query: mx.array, tables: Seq[BlockTable], block_size: int) -> None:
    if query.ndim != 4 or 0 in query.shape or query.dtype not in FLOATS:
        raise ValueError(
            "query must be floats of shape [B, H, L, D], with every dimension at least 1, "
            f"not {_described(query)}"
        )
    B, _, L, _ = query.shape
    if len(tables) != B:
        raise ValueError(f"query has {B} rows, but there are {len(tables)} page tables")
    for row, table in enumerate(tables):
        if table.block_size != block_size:
            raise ValueError(
                f"table {row} has blocks of {table.block_size} tokens, but block_size is {block_size}"
            )
        if table.num_tokens < L:
            raise ValueError(f"table {row} holds {table.num_tokens} tokens, fewer than the query's {L}")
        if len(table.blocks) * block_size < table.num_tokens:
            raise ValueError(
                f"table {row} has {table.num_tokens} tokens, but its blocks hold at most "
                f"{len(table.blocks)} x {block_size}"
            )


def _check_pages(query: mx.array, pages: Mapping[int, PageBlock], block_size: int) -> None:
    H, D = query.shape[1], query.shape[3]
    block, first = next(iter(pages.items()))
    Hkv = first.keys.shape[0]
    if first.keys.shape != (Hkv, block_size, D):
        raise ValueError(
            f"block_size {block_size} and a query with D = {D} require pages [Hkv, {block_size}, {D}]; "
            f"block {block} is {_described(first.keys)}"
        )
    if H % Hkv:
        raise ValueError(f"H must be a multiple of Hkv: the query has {H} heads, the pages have {Hkv}")
    for other, page in pages.items():
        if (page.keys.shape, page.keys.dtype) != (first.keys.shape, first.keys.dtype):
            raise ValueError(
                f"pages must have one shape and type: block {block} is {_described(first.keys)}, "
                f"block {other} is {_described(page.keys)}"
            )


def _check_range(name: str, page: PageBlock, start: int, length: int) -> None:
    if not 0 <= start <= start + length <= page.block_size:
        raise ValueError(
            f"the {name} range ({length} tokens from position {start}) is not within a page of "
            f"{page.block_size} tokens"
        )


def _described(array: mx.array) -> str:
    return f"{array.dtype} {array.shape}".removeprefix("mlx.core.")
