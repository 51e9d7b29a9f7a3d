"""Day 3.2: what `pdm run try` shows for the day and its parts, and what `pdm run compare` times."""

import time
from collections import Counter
from typing import Any

import mlx.core as mx

from .shared import Lines, Work, random_array

STORY = "In the far hills there lived a dragon who was afraid of the dark. Every evening it asked the moon"


def show() -> Lines:
    """Search with four beams on the real model, and print their scores and the blocks that they share."""
    from tiny_llm.beam_search import BeamSearchParams
    from tiny_llm.llm import LLM

    size, width = 8, 4
    llm = LLM(block_size=size, num_blocks=96, max_num_seqs=width)
    manager = llm.core.manager
    tokens = llm.tokenizer.encode(STORY)
    params = BeamSearchParams(beam_width=width, max_tokens=32)
    start = time.perf_counter()
    search = llm.core.add_beam_search("one", tokens, params)
    most = (0, 0)
    while search.beams:
        llm.core.step()
        held = Counter(block for one in manager.running for block in one.table.physical_indices())
        most = max(most, (held.total(), len(held)))
    seconds = time.perf_counter() - start
    yield f"the real model, a prompt of {len(tokens)} tokens, {width} beams: {seconds:.1f} s"
    yield "each line: log-probability per token, tokens, why it ended, text"
    yield f"{STORY} ..."
    for ended in search.ended:
        said, count = llm.tokenizer.decode(list(ended.hypothesis.tokens)), len(ended.hypothesis.tokens)
        shown = " ".join(said.split())
        yield f"  {ended.score:6.3f}, {count:2} tokens, {ended.finish_reason:6}: ... {shown}"
    yield (
        f"peak: {most[1]} blocks of {size} tokens for all beams; without sharing, {most[0]}: "
        f"{most[0] / most[1]:.1f} times as many"
    )
    free = manager.capacity.num_free + manager.capacity.num_cached
    yield f"after the search, {free} of {manager.capacity.num_blocks} blocks are available again"


def show_a() -> Lines:
    """Print a packed step: each token's sequence, position and slot, and the blocks that it reads."""
    from tiny_llm.paged_kernel import Span, pack_batch, write_and_attend

    size = 4
    long, short, decode = _tables(size, 9, 3, 6)
    spans = [Span(long, 5, 9), Span(short, 0, 3), Span(decode, 5, 6)]
    batch = pack_batch(spans)
    columns: Any = zip(*(x.tolist() for x in (batch.row_of_token, batch.positions, batch.slots)), strict=True)
    yield f"one call for a chunk, a prompt and a decode: {batch.slots.size} tokens, blocks of {size}"
    for index, (row, position, slot) in enumerate(columns):
        read = spans[row].table.physical_indices()[: position // size + 1]
        yield (
            f"  token {index}: sequence {row}, position {position}, written to block {slot // size} "
            f"at offset {slot % size}; reads blocks {', '.join(map(str, read))}"
        )
    q, k, v = random_array(1, 4, 8, 16), random_array(1, 2, 8, 16), 2 * random_array(1, 2, 8, 16)
    pool = random_array(12, 2, size, 16)
    together, start = write_and_attend(q, k, v, pool + 0, 2 * pool, batch, 0.25).out, 0
    difference = 0.0
    for span in spans:
        tokens = slice(start, start := start + span.stop - span.start)
        parts = (x[:, :, tokens] for x in (q, k, v))
        separate = write_and_attend(*parts, pool + 0, 2 * pool, pack_batch([span]), 0.25).out
        difference = max(difference, float(mx.abs(together[:, :, tokens] - separate).max()))
    yield f"with a separate call for each sequence, the outputs differ by at most {difference:.1g}"


def show_b() -> Lines:
    """Print how pages with arbitrary ids become a small pool, and what a query attends to there."""
    from tiny_llm.page_block import PageBlock, copy_block, pack_last_tokens, paged_attention_kernel

    size = 4
    parent, child = _tables(size, 6, 6)
    parent.blocks, child.blocks = [4711, 42], [4711, 7]
    pages = {block: PageBlock(mx.zeros((1, size, 2)), mx.zeros((1, size, 2))) for block in (7, 42, 4711)}
    for block, words in ((4711, [1.0, 2.0, 3.0, 4.0]), (42, [5.0, 6.0, 0.0, 0.0])):
        pages[block].values[0] = mx.array([words, words]).T
    copy_block(pages[42], pages[7], 0, 0, 1)
    pages[7].values[0, 1] = mx.array([12.0, 12.0])
    yield "two sequences of 6 tokens share page 4711; token 4 was copied from page 42 to page 7"
    for name, table in (("parent", parent), ("child", child)):
        values = [pages[block].values[0, :, 0].tolist() for block in table.blocks]
        yield f"  {name}: pages {table.blocks}, values {[x for page in values for x in page][:6]}"
    batch = pack_last_tokens([parent, child], 1, {4711: 0, 42: 1, 7: 2})
    yield f"their tables as indices into a pool of {len(pages)} blocks: {batch.tables.tolist()}"
    out = paged_attention_kernel(mx.ones((2, 1, 1, 2)), [parent, child], pages, size)
    means = ", ".join(f"{x:.2f}" for x in out[:, 0, 0, 0].tolist())
    yield f"one call for the last token of each; all keys are equal, so it gives the mean values: {means}"


def show_c() -> Lines:
    """Run a beam search on the real model, without a cache; print the blocks that its beams would need."""
    from tiny_llm.beam_search import BeamSearch, BeamSearchPageManager, BeamSearchParams
    from tiny_llm.loader import load_model
    from tiny_llm.paged_attention import BlockAllocator

    size, width = 8, 4
    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY)
    search = BeamSearch(BeamSearchParams(beam_width=width, max_tokens=12), loaded.tokenizer.eos_token_ids)
    # Twice the width, because parents and children exist together until the parents are pruned.
    pages = BeamSearchPageManager(2 * width, BlockAllocator(96), size)
    pages.expand_beam(0, tokens)
    living = [0]
    yield f"the real model, a prompt of {len(tokens)} tokens, {width} beams, blocks of {size}"
    while search.beams:
        texts = [[*tokens, *beam.tokens] for beam in search.beams]
        choices = search.advance(_candidates(loaded.model, texts, search.num_candidates))
        if not choices:
            break
        parents, living = living, [pages.fork_beam(living[choice.parent]) for choice in choices]
        for beam_id, choice in zip(living, choices, strict=True):
            pages.expand_beam(beam_id, [choice.token])
        pages.prune(parents)
        if len(search.beams[0].tokens) % 4 == 0:
            continued = len({choice.parent for choice in choices})
            yield (
                f"after {len(search.beams[0].tokens):2} tokens: {len(living)} beams from {continued} parents"
                f"; {pages.num_physical_blocks} blocks; without sharing, {pages.num_logical_blocks}"
            )
    yield "each line: log-probability per token, why it ended, text"
    for ended in search.ended:
        said = " ".join(loaded.tokenizer.decode(list(ended.hypothesis.tokens)).split())
        yield f"  {ended.score:6.3f}, {ended.finish_reason:6}: ... {said}"


def show_d() -> Lines:
    """Print a pool before and after compaction."""
    from tiny_llm.compaction import compact_pages

    tables = _tables(4, *(9, 20, 6, 30, 13, 8, 25, 17, 5, 40), num_blocks=64)
    for table in tables[::2]:
        table.release()
    kept = tables[1::2]
    fork, allocator = kept[0].fork(), kept[0].allocator
    yield "o: a block in use; .: a free block"
    yield f"five of ten sequences have ended:  {_picture(allocator)}"
    copies = compact_pages(allocator, [*kept, fork])
    yield f"after compaction:                  {_picture(allocator)}"
    in_use = allocator.num_blocks - allocator.num_free
    moved = ", ".join(f"{copy.src} to {copy.dst}" for copy in copies[:4])
    yield f"{in_use} blocks are in use; {len(copies)} of them have moved: {moved}, ..."
    allocator.resize(allocator.num_blocks // 2)
    yield f"half of the pool is released:      {_picture(allocator)}"


def show_e() -> Lines:
    """Print how the pool grows and shrinks while requests run and wait."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(block_size=8, num_blocks=64, min_num_blocks=4, max_num_seqs=3)
    manager, core = llm.core.manager, llm.core
    seen: tuple[object, ...] = ()
    tokens = llm.tokenizer.encode(STORY)
    lengths = {"a": 60, "b": 24, "c": 12, "d": 30, "e": 8}
    for name, length in lengths.items():
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        core.add_request(name, tokens, params)
    yield f"the real model, five requests of {len(tokens)} tokens, at most 3 at once, blocks of 8"
    yield "idle: no request uses the block, but the prefix cache keeps it until its memory is needed"
    steps, start = 0, time.perf_counter()
    while core.has_work:
        core.step()
        steps += 1
        queues = (manager.running, manager.waiting)
        runs, waits = (" ".join(one.seq_id for one in queue) or "-" for queue in queues)
        if (manager.allocator.num_blocks, runs, waits) != seen:
            yield f"  after step {steps:2}: {_pool(manager)}; running {runs:5}; waiting {waits}"
        seen = (manager.allocator.num_blocks, runs, waits)
    yield f"{sum(lengths.values())} tokens in {steps} steps, {time.perf_counter() - start:.1f} s"
    yield "nothing is in use now; each step, even without work, halves the pool, down to its 4 initial blocks"
    for number in (1, 2):
        core.step()
        yield f"  empty step {number}:   {_pool(manager)}"


def _pool(manager: Any) -> str:
    """The usage of a manager's pool."""
    free, size = manager.allocator.num_free, manager.allocator.num_blocks
    return f"{free:2} free and {manager.prefix.num_idle:2} idle of {size:2} blocks"


def _tables(size: int, *lengths: int, num_blocks: int = 12) -> list[Any]:
    """Tables on one allocator, with these numbers of tokens."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable

    allocator = BlockAllocator(num_blocks)
    tables = [BlockTable(allocator, size) for _ in lengths]
    for step in range(max(lengths)):  # token by token, so that their blocks alternate
        for table, length in zip(tables, lengths, strict=True):
            table.append_tokens(int(step < length))
    return tables


def _candidates(model: Any, texts: list[list[int]], count: int) -> list[list[tuple[int, float]]]:
    """The likeliest next tokens of texts of equal length, with log-probabilities, without a cache."""
    from tiny_llm.grouped_attention import NoCacheContext

    context = NoCacheContext(len(texts[0]), model.config.attention_scale)
    context.logit_rows = mx.array([len(texts[0]) - 1], mx.int32)
    rows = model(mx.array(texts, mx.int32), context)[:, -1].astype(mx.float32)
    logprobs = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    best = mx.argsort(-logprobs)[:, :count]
    tokens: Any = best.tolist()
    values: Any = mx.take_along_axis(logprobs, best, axis=-1).tolist()
    return [list(zip(*row, strict=True)) for row in zip(tokens, values, strict=True)]


def _picture(allocator: Any) -> str:
    """A character for each block."""
    return "".join("o" if allocator.ref_count(block) else "." for block in range(allocator.num_blocks))


def work() -> Work:
    """A chunk of 64 tokens and 8 decodes, written to scattered pages that hold 2,000 more tokens."""
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
