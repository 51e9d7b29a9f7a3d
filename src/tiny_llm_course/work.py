"""The same work for a learner's modules and for the reference's: what `pdm run compare` times.

    python -m tiny_llm_course.work 1.1 result.npz

runs a day's work in this process, on whatever overlay it has, and writes what came out, the seconds of each
repetition and the most memory that MLX held. Inputs are the same every time.
"""

import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

REPEAT_SECONDS = 1.0
MOST_REPETITIONS = 50
Work = Callable[[], mx.array]


def _random(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def _attention() -> Work:
    """Causal attention of 128 tokens, 9 heads of 64."""
    from tiny_llm.attention import causal_mask, scaled_dot_product_attention

    q, k, v = _random(1, 9, 128, 64), _random(1, 9, 129, 64)[:, :, 1:], _random(1, 9, 130, 64)[:, :, 2:]
    return lambda: scaled_dot_product_attention(q, k, v, 0.125, causal_mask(128, 128))


def _rope() -> Work:
    """512 positions of 9 heads of 64, turned."""
    from tiny_llm.rope import inverse_frequencies, rope

    x, positions = _random(1, 9, 512, 64), mx.arange(512, dtype=mx.int32)
    return lambda: rope(x, positions, inverse_frequencies(64, 10_000.0))


def _grouped() -> Work:
    """64 queries of 9 heads over 256 keys of 3 heads."""
    from tiny_llm.grouped_attention import grouped_query_attention

    q, k, v = _random(1, 9, 64, 64), _random(1, 3, 256, 64), _random(1, 3, 257, 64)[:, :, 1:]
    return lambda: grouped_query_attention(q, k, v, 0.125)


def _norm_and_mlp() -> Work:
    """RMSNorm and SwiGLU of 512 tokens, 576 wide."""
    from tiny_llm.mlp import swiglu
    from tiny_llm.norm import rms_norm

    x, weight = _random(1, 512, 576), _random(576)
    return lambda: swiglu(rms_norm(x, weight, 1e-5), x)


def _model() -> Work:
    """A forward pass of the real model over a short text."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("The capital of France is")
    scale = loaded.model.config.attention_scale
    return lambda: loaded.model(mx.array([tokens], mx.int32), NoCacheContext(len(tokens), scale))[0, -1]


def _generate() -> Work:
    """Eight tokens of the real model, everything computed anew for each."""
    from tiny_llm.generate import generate
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate(loaded.model, tokens, 8, ())))


def _sampler() -> Work:
    """Min-p, top-k and top-p over 49,152 logits, four draws, and their log-probabilities."""
    from tiny_llm.sampler import draw, keep_min_p, keep_top_k, keep_top_p, log_probabilities

    logits = 3 * _random(49_152)

    def work() -> mx.array:
        kept = keep_top_p(keep_top_k(keep_min_p(logits, 0.001), 200), 0.9)
        tokens = mx.stack([draw(kept, 7, index) for index in range(4)])
        return mx.concatenate([log_probabilities(logits), tokens.astype(mx.float32)])

    return work


def _cached() -> Work:
    """Sixteen tokens of the real model, with a cache."""
    from tiny_llm.kv_cache import generate_with_cache
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate_with_cache(loaded.model, tokens, 16, ())))


def _naive_cache() -> Work:
    """256 tokens stored one by one in a contiguous cache with room for 512."""
    from tiny_llm.naive_cache import NaiveKVCache

    tokens = _random(256, 3, 64)

    def work() -> mx.array:
        cache = NaiveKVCache(512, 3, 64, mx.float32)
        for token in tokens:
            stored = cache.update(token, 2 * token)
        return mx.concatenate(list(stored))

    return work


def _dynamic_cache() -> Work:
    """256 tokens stored one by one in blocks of 16, then read as one."""
    from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator

    tokens = _random(256, 3, 64)

    def work() -> mx.array:
        cache = DynamicKVCache(GlobalAllocator(64, 16, 3, 64, mx.float32), "one")
        for token in tokens:
            cache.append_token(token, 2 * token)
        return mx.concatenate(list(cache.read()))

    return work


def _quantize() -> Work:
    """A matrix [512, 576] stored in four bits, unpacked and multiplied with 4 rows."""
    from tiny_llm.quantize import quantize, quantized_matmul

    x, w = _random(4, 576), _random(512, 576)
    return lambda: quantized_matmul(x, *quantize(w, 32, 4))


def _flash() -> Work:
    """Attention of 64 queries of 9 heads over 512 keys, in tiles of 64."""
    from tiny_llm.flash_attention import flash_attention

    q, k, v = _random(1, 9, 64, 64), _random(1, 3, 512, 64), _random(1, 3, 513, 64)[:, :, 1:]
    return lambda: flash_attention(q, k, v, 0.125, True, 64)


def _share_budget() -> Work:
    """64 budgets, each shared among 256 sequences that want tokens."""
    from tiny_llm.chunked_prefill import share_budget

    wants = [1 if i % 3 else 200 + i for i in range(256)]
    return lambda: mx.array([share_budget(wants, budget) for budget in range(0, 4096, 64)])


def _dense_batch() -> Work:
    """Four prompts together, eight tokens each, through your batch manager on the real model."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(batching="dense", max_model_len=128, max_num_seqs=4)
    prompts = [f"The best thing about {what} is" for what in ("rain", "snow", "wind", "sun")]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return lambda: mx.array(
        [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    )


def _block_tables() -> Work:
    """Pages for 32 prompts, each forked into four that go on for 64 tokens: the bookkeeping alone."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable

    def work() -> mx.array:
        allocator = BlockAllocator(2048)
        leaders = [BlockTable(allocator, 16) for _ in range(32)]
        for i, leader in enumerate(leaders):
            leader.append_tokens(100 + i)
        tables = [table for leader in leaders for table in (leader, *(leader.fork() for _ in range(3)))]
        figures = []
        for _ in range(64):
            figures.append(sum(len(table.append_tokens(1)) for table in tables))
            figures.append(allocator.num_free)
        figures.append(len({slot for table in tables for slot in table.slots(0, table.num_tokens)}))
        for table in tables:
            table.release()
        return mx.array([*figures, allocator.num_free])

    return work


def _paged_step() -> Work:
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
    q, k, v = _random(1, 9, 72, 64), _random(1, 3, 72, 64), 2 * _random(1, 3, 72, 64)
    past = _random(192, 3, 16, 64)

    def work() -> mx.array:
        written = write_and_attend(q, k, v, past + 0, 2 * past, batch, 0.125)
        return mx.concatenate([written.out.flatten(), written.keys[::16].flatten()])

    return work


def _paged_cache() -> Work:
    """256 tokens of 4 sequences stored in pages one by one; then read by range, by window and by slot."""
    from tiny_llm.paged_cache import PagedKVCache

    tokens = _random(256, 3, 64)

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


def _prefix_cache() -> Work:
    """400 prompts of 96 tokens that begin in eight ways, in a pool that fills up: the bookkeeping alone."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable
    from tiny_llm.prefix_cache import PrefixCache, TokenBlocks

    prompts = [[*range(i % 8, i % 8 + 64), *range(1000 + i % 150, 1032 + i % 150)] for i in range(400)]

    def work() -> mx.array:
        allocator = BlockAllocator(256)
        cache = PrefixCache(allocator, 16)
        found = []
        for prompt in prompts:
            stream, table = TokenBlocks(16), BlockTable(allocator, 16)
            stream.extend(prompt)
            for block in cache.match(stream, 0, 5):
                cache.share(table, block, 16)
            found.append(table.num_tokens)
            missing = 6 - len(table.blocks)
            cache.evict(missing - allocator.num_free)
            table.append_tokens(96 - table.num_tokens)
            cache.keep(table, stream, 6 - missing, 6)
            blocks = list(table.blocks)
            table.release()
            cache.released(blocks)
        return mx.array([*found, len(cache), cache.num_idle, allocator.num_free])

    return work


def _windowed() -> Work:
    """16 tokens of a prompt and a decode of 9 heads at the end of 2,048, of which each sees 512."""
    from tiny_llm.paged_attention import BlockAllocator
    from tiny_llm.paged_kernel import Span, pack_batch
    from tiny_llm.sliding_window import WindowedTable, first_visible, windowed_attention

    table = WindowedTable(BlockAllocator(128), 16)
    table.append_tokens(2048)
    table.let_go(first_visible(2031, 512))
    batch = pack_batch([Span(table, 2031, 2047), Span(table, 2047, 2048)])
    q, keys, values = _random(1, 9, 17, 64), _random(128, 3, 16, 64), _random(129, 3, 16, 64)[1:]
    return lambda: windowed_attention(q, keys, values, batch, 0.125, 512)


def _swap() -> Work:
    """32 prompts with four completions each, out to the host and back, three times: the bookkeeping alone."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable
    from tiny_llm.prefix_cache import TokenBlocks
    from tiny_llm.sampling_params import SamplingParams
    from tiny_llm.sequence import PagedSequence
    from tiny_llm.swap import SwapSpace

    def work() -> mx.array:
        allocator, space = BlockAllocator(1600), SwapSpace(1200, 16)
        pool, host, figures = [0] * 1600, [0] * 1200, []
        for i in range(32):
            leader = PagedSequence(
                seq_id=str(i),
                request_id=str(i),
                prompt=tuple(range(i, i + 100)),
                params=SamplingParams(),
                seed=0,
                max_len=300,
                tables=[BlockTable(allocator, 16)],
                streams=[TokenBlocks(16)],
            )
            leader.append_tokens(100)
            leader.num_computed = 100
            family = [leader, *(leader.fork(f"{i}/{fork}", fork) for fork in range(1, 4))]
            for turn in range(3):
                for fork, one in enumerate(family):
                    one.outputs += [1000 + fork] * 20
                    one.append_tokens(20)
                    one.num_computed += 20
                    for place, block in enumerate(one.table.blocks):
                        pool[block] = 1000 * i + 100 * turn + 10 * fork * (place > 5) + place
                for one in family:
                    copies = space.swap_out(one) or []
                    for block, host_block in copies:
                        host[host_block] = pool[block]
                    one.give_up_pages()
                    figures += [len(copies), space.allocator.num_free]
                at_hand: dict[bytes, int] = {}
                for one in family:
                    figures.append(space.blocks_to_swap_in(one))
                    for block, host_block in space.swap_in(one, at_hand):
                        pool[block] = host[host_block]
                    at_hand |= zip(one.stream.hashes, one.table.blocks, strict=False)
                    figures += [pool[block] for block in one.table.blocks]
                    figures.append(allocator.num_free)
                for one in family:
                    space.forget(one)
                figures.append(space.allocator.num_free)
        return mx.array(figures)

    return work


def _serving() -> Work:
    """64 clients at once, 32 tokens each, through the thread and back: what serving costs, no model."""
    import asyncio
    from types import SimpleNamespace

    from tiny_llm.engine import Engine
    from tiny_llm.engine_config import EngineConfig
    from tiny_llm.gguf_tokenizer import byte_level_bpe
    from tiny_llm.sampling_params import SamplingParams
    from tiny_llm.token_output import TokenOutput
    from tiny_llm.tokenizer import Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    served: dict[str, list[int]] = {}

    def add_request(request_id: str, tokens: list[int], params: SamplingParams) -> bool:
        served[request_id] = [tokens[-1], params.max_tokens or 1]
        return True

    def step() -> list[TokenOutput]:
        outputs = []
        for request_id, (last, before) in list(served.items()):
            token, left = (last + 1) % len(letters), before - 1
            served[request_id] = [token, left]
            reason = None if left else "length"
            outputs.append(TokenOutput(request_id, request_id, token, None, reason, None))
            if not left:
                del served[request_id]
        return outputs

    core = SimpleNamespace(
        manager=SimpleNamespace(waiting=[], running=[]),
        stats=None,
        has_work=True,
        add_request=add_request,
        step=step,
        take_failures=list,
        cancel=lambda request_id: served.pop(request_id, None),
        finish=served.pop,
    )
    tokenizer = Tokenizer(byte_level_bpe(list(letters), [], "smollm"))
    engine = Engine(lambda: core, tokenizer, len(letters), EngineConfig(max_num_seqs=64))
    params = SamplingParams(max_tokens=32)

    async def client(first: int) -> list[int]:
        stream = engine.generate([first % len(letters)], params)
        return [token async for event in stream for token in event.token_ids]

    async def clients() -> list[list[int]]:
        return await asyncio.gather(*(client(number) for number in range(64)))

    return lambda: mx.array(asyncio.run(clients()))


WORK: dict[str, Callable[[], Work]] = {
    "1.1": _attention,
    "1.2": _rope,
    "1.3": _grouped,
    "1.4": _norm_and_mlp,
    "1.5": _model,
    "1.6": _generate,
    "1.7": _sampler,
    "2.1": _cached,
    "2.2": _naive_cache,
    "2.3": _dynamic_cache,
    "2.4": _quantize,
    "2.5": _flash,
    "2.6": _share_budget,
    "2.7": _dense_batch,
    "3.1": _block_tables,
    "3.2": _paged_step,
    "3.3": _paged_cache,
    "3.4": _prefix_cache,
    "3.5": _windowed,
    "3.6": _swap,
    "3.7": _serving,
}


def main() -> None:
    """Run the work named on the command line and store what came of it."""
    day, target = sys.argv[1:]
    work = WORK[day]()
    out = work()
    mx.eval(out)  # the first run pays for what is made once
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < REPEAT_SECONDS and len(seconds) < MOST_REPETITIONS):
        start = time.perf_counter()
        out = work()
        mx.eval(out)
        seconds.append(time.perf_counter() - start)
    peak = mx.get_peak_memory() - before
    np.savez(target, out=np.array(out.astype(mx.float32)), seconds=np.array(seconds), peak=np.array(peak))


if __name__ == "__main__":
    main()
