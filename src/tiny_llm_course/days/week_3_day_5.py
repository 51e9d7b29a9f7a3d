"""Day 3.5: what `pdm run try` shows and `pdm run compare` times."""

from functools import partial
from typing import Any

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """Print the blocks of a long text with and without windows, and the blocks that a prefix hit needs."""
    from tiny_llm.layer_groups import LayerGroup, group_layers
    from tiny_llm.paged_batch import PagedBatchManager
    from tiny_llm.policies import Policies
    from tiny_llm.sampling_params import SamplingParams
    from tiny_llm.windowed_prefix import WindowedPrefixSharing

    size, length, window = 16, 4096, 512
    groups = group_layers((*[window] * 5, None) * 3)
    yield (
        f"a simulation, without the model: 18 layers as in Gemma 3 270M, in {len(groups)} groups; all groups "
        f"except the first have a window of {window} tokens; blocks of {size} tokens"
    )
    params = SamplingParams(max_tokens=1)
    make = partial(PagedBatchManager, 1600, size, 1, max_batched_tokens=128, max_model_len=length + 1)
    whole, near = make(groups=[LayerGroup(group.layers) for group in groups]), make(groups=groups)
    for manager in (whole, near):
        manager.add_request([1] * length, "text", params)
    yield "   tokens | blocks without windows     | with windows: full + windowed | freed"
    for tokens in (256, 512, 640, 1024, 2048, length):
        for manager in (whole, near):
            while manager.sequence("text").num_computed < tokens:
                manager.process_batch()
        all_blocks = sum(len(table.blocks) for table in whole.sequence("text").tables)
        full, *windowed = (len(table.blocks) for table in near.sequence("text").tables)
        gone = sum(table.start // size for table in near.sequence("text").tables[1:])
        yield f"  {tokens:7,} |{all_blocks:27,} |{full:19,} + {sum(windowed):7,} |{gone:10,}"
    kept = full + sum(windowed)
    yield f"{kept:,} of {all_blocks:,} blocks: {kept / all_blocks:.0%}; the share falls as the text grows"
    yield from _what_one_token_reads(near.sequence("text").tables[1], length, window)

    prefix = partial(WindowedPrefixSharing, groups=groups)
    sharing = make(groups=groups, policies=Policies(prefix=prefix))
    for name in ("first", "again"):
        sharing.add_request([1] * length, name, params)
        while sharing.sequence(name).num_computed < length:
            sharing.process_batch()
        if name == "first":
            sharing.finish(name)
    again = sharing.sequence("again")
    blocks = sum(len(table.blocks) for table in again.tables)
    yield (
        f"the same text again: {again.num_cached_tokens:,} of {length:,} tokens are in the prefix cache, in "
        f"{blocks:,} blocks; the {sum(table.start // size for table in again.tables[1:]):,} blocks outside "
        "of all windows are not needed"
    )


def _what_one_token_reads(table: Any, position: int, window: int) -> Lines:
    """Print which blocks a windowed table's next token reads, and its output if all others hold NaN."""
    from tiny_llm.paged_kernel import Span, pack_batch
    from tiny_llm.sliding_window import NO_BLOCK, first_visible, windowed_attention

    table.append_tokens(1)
    indices = table.physical_indices()
    first, holes = first_visible(position, window), indices.count(NO_BLOCK)
    yield (
        f"token {position:,} sees positions {first:,} to {position:,}: {len(indices) - holes} blocks of "
        f"{len(indices)}; the first {holes} were freed"
    )
    num_blocks, batch = table.allocator.num_blocks, pack_batch([Span(table, position, position + 1)])
    q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(0))
    pool = mx.random.normal((2, num_blocks, 1, table.block_size, 64), key=mx.random.key(1))
    is_held = mx.array([[[[block in table.blocks]]] for block in range(num_blocks)])
    outputs = [
        windowed_attention(q, keys, values, batch, 0.125, window)
        for keys, values in (pool, mx.where(is_held, pool, mx.nan))
    ]
    yield f"  same output with NaN in all other blocks of the pool: {mx.array_equal(*outputs).item()}"


def work() -> Work:
    """A chunk of 16 tokens and a decode, 9 heads, at the end of 2,048 tokens, with a window of 512."""
    from tiny_llm.paged_attention import BlockAllocator
    from tiny_llm.paged_kernel import Span, pack_batch
    from tiny_llm.sliding_window import WindowedTable, first_visible, windowed_attention

    table = WindowedTable(BlockAllocator(128), 16)
    table.append_tokens(2048)
    table.release_before(first_visible(2031, 512))
    batch = pack_batch([Span(table, 2031, 2047), Span(table, 2047, 2048)])
    q, keys, values = (
        random_array(1, 9, 17, 64),
        random_array(128, 3, 16, 64),
        random_array(129, 3, 16, 64)[1:],
    )
    return lambda: windowed_attention(q, keys, values, batch, 0.125, 512)
