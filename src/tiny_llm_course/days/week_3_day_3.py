"""Day 3.3: what `pdm run try` shows and `pdm run compare` times."""

import time

import mlx.core as mx

from .shared import STORY, Lines, Work, random_array


def show() -> Lines:
    """Read the engine's own pages: slot numbers, a window, and the time that one array of slots saves."""
    from tiny_llm.llm import LLM
    from tiny_llm.paged_cache import PagedKVCache
    from tiny_llm.sampling_params import SamplingParams

    size, steps = 16, 204
    llm = LLM(block_size=size, num_blocks=96, max_num_seqs=3)
    manager, params = llm.core.manager, SamplingParams(temperature=0, max_tokens=2 * steps, ignore_eos=True)
    for animal in ("cat", "dog", "owl"):
        llm.core.add_request(animal, llm.tokenizer.encode(f"{STORY}, there was a {animal}"), params)
    for _ in range(steps):
        llm.core.step()
    cache = PagedKVCache.of(
        manager.pool, manager.allocator, {one.seq_id: one.table for one in manager.running}, layer=7
    )
    yield f"the real model after {steps} steps with three stories; layer 7, read through a PagedKVCache"
    batch = [(seq_id, table.num_tokens) for seq_id, table in cache.tables.items()]
    for seq_id, length in batch:
        slots = cache.build_flat_slot_mapping([(seq_id, length)])[::size].tolist()
        shown = ", ".join(map(str, slots[:8]))
        yield f"  {seq_id}: {length} tokens; slots of every {size}th token: {shown}, ..."
    seq_id, length = batch[0]
    whole, _ = cache.read_blocks(seq_id, 0, length)
    window, _ = cache.read_sparse(seq_id, length - 1, 4)
    yield (
        f"the last token of {seq_id!r} with a window of 4 blocks reads {window.shape[1]} of {length} tokens: "
        f"{window.nbytes / whole.nbytes:.0%} of the keys' {whole.nbytes:,} bytes"
    )
    start = time.perf_counter()
    for seq_id, length in batch:
        for position in range(length):
            cache.read_blocks(seq_id, position, 1)
    one_by_one = time.perf_counter() - start
    start = time.perf_counter()
    cache.pool.read(cache.layer, cache.build_flat_slot_mapping(batch))
    at_once = time.perf_counter() - start
    yield (
        f"reading all {sum(length for _, length in batch)} tokens of the batch: one by one "
        f"{1000 * one_by_one:.1f} ms, with one array of slots {1000 * at_once:.1f} ms"
    )


def work() -> Work:
    """256 tokens of 4 sequences, stored in pages one by one, then read by range, by window and by slot."""
    from tiny_llm.paged_cache import PagedKVCache

    tokens = random_array(256, 3, 64)

    def work() -> mx.array:
        cache = PagedKVCache(32, 16, 3, 64, mx.float32)
        for i, token in enumerate(tokens):
            cache.allocate(str(i % 4), 1)
            cache.write_token(str(i % 4), i // 4, token, 2 * token)
        cache.tables["fork"] = cache.tables["0"].fork()
        cache.write_token("fork", 20, tokens[0], tokens[1])
        read = [
            *cache.read_blocks("0", 0, 64),
            *cache.read_blocks("fork", 3, 50),
            *cache.read_sparse("1", 55, 2),
        ]
        by_slot = cache.pool.read(0, cache.build_flat_slot_mapping([(str(i), 64) for i in range(4)]))
        return mx.concatenate([part.swapaxes(0, 1) for part in read] + list(by_slot))

    return work
