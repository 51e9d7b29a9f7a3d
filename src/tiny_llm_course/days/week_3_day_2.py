"""Day 3.2: what `pdm run try` shows and `pdm run compare` times."""

import time
from collections import Counter

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """Four beams, what they are worth, and the pages that they share."""
    from tiny_llm.beam_search import BeamSearchParams
    from tiny_llm.llm import LLM

    size, width = 8, 4
    llm = LLM(block_size=size, num_blocks=96, max_num_seqs=width)
    manager = llm.core.manager
    text = "In the far hills there lived a dragon who was afraid of the dark. Every evening it asked the moon"
    tokens = llm.tokenizer.encode(text)
    params = BeamSearchParams(beam_width=width, max_tokens=32)
    start = time.perf_counter()
    search = llm.core.add_beam_search("one", tokens, params)
    most = (0, 0)
    while search.beams:
        llm.core.step()
        held = Counter(block for one in manager.running for block in one.table.physical_indices())
        most = max(most, (held.total(), len(held)))
    seconds = time.perf_counter() - start
    yield f"the real model, a prompt of {len(tokens)} tokens, beams of width {width}: {seconds:.1f} s"
    yield f"{text} ..."
    for ended in search.ended:
        said, count = llm.tokenizer.decode(list(ended.hypothesis.tokens)), len(ended.hypothesis.tokens)
        shown = " ".join(said.split())
        yield f"  {ended.score:6.3f} a token, {count:2} tokens, {ended.finish_reason:6}: ... {shown}"
    yield (
        f"at most {most[1]} blocks of {size} tokens for all beams; unshared it would be {most[0]}: "
        f"{most[0] / most[1]:.1f} times as many"
    )
    free = manager.capacity.num_free + manager.capacity.num_cached
    yield f"the search is over, and {free} of {manager.capacity.num_blocks} blocks can be had again"


def work() -> Work:
    """A chunk of 64 tokens beside 8 decodes: written to scattered pages, attended to among 2,000 more."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable
    from tiny_llm.paged_kernel import Span, pack_batch, write_and_attend

    allocator = BlockAllocator(192)
    tables = [BlockTable(allocator, 16) for _ in range(9)]
    for row, table in ((i % 9, tables[i % 9]) for i in range(16 * 9)):
        table.append_tokens(16 if row else 14)
    tables[0].append_tokens(64)
    spans = [
        Span(table, table.num_tokens - (1 if row else 64), table.num_tokens)
        for row, table in enumerate(tables)
    ]
    batch = pack_batch(spans)
    q, k, v = random_array(1, 9, 72, 64), random_array(1, 3, 72, 64), 2 * random_array(1, 3, 72, 64)
    past = random_array(192, 3, 16, 64)

    def work() -> mx.array:
        written = write_and_attend(q, k, v, past + 0, 2 * past, batch, 0.125)
        return mx.concatenate([written.out.flatten(), written.keys[::16].flatten()])

    return work
