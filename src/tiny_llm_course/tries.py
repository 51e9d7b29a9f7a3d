"""`pdm run try`: each day's one thing to look at, through whatever modules are the learner's.

Every function here belongs to one day and yields lines as they come: the real model wherever it can show it,
or else what it is instead, and the number that the day is about.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from inspect import iscoroutine
from itertools import islice
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

CAPITAL = "The capital of France is"
STORY = "Once upon a time"
TRY_SECONDS = 120  # a guard: an engine that is not right yet may leave its clients waiting
Lines = Iterator[str]


def attention() -> Lines:
    """1.1: where the last word looks."""
    from tiny_llm.attention import causal_mask, softmax
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    text = "Mrs Dursley had never liked Harry Potter. That evening she went out to look for Harry"
    tokens = loaded.tokenizer.encode(text)
    length, scale = len(tokens), loaded.model.config.attention_scale
    seen: list[mx.array] = []

    def watch(layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        shared = mx.repeat(k, q.shape[1] // k.shape[1], axis=1)
        scores = (q @ shared.swapaxes(-1, -2)) * scale
        seen.append(softmax(scores + causal_mask(length, length))[0])
        output: mx.array = context.attend(layer, q, k, v)
        return output

    context = NoCacheContext(length, scale)
    watching = SimpleNamespace(positions=context.positions, logit_rows=None, attend=watch)
    loaded.model(mx.array([tokens], mx.int32), watching)
    weights = mx.stack(seen)  # [layers, H, L, L]
    after_last_time = tokens.index(tokens[-1]) + 1
    layer, head = divmod(int(mx.argmax(weights[:, :, -1, after_last_time])), weights.shape[1])
    yield f"layer {layer}, head {head}: what the last word looks at, to know what may follow it"
    for position, token in enumerate(tokens):
        weight = float(weights[layer, head, -1, position])
        yield f"  {loaded.tokenizer.token_text(token):>10}  {weight:6.3f}  {'#' * round(40 * weight)}"
    error = float(mx.max(mx.abs(mx.sum(weights, axis=-1) - 1)))
    yield f"{weights.size // length:,} rows of attention; each sums to 1 within {error:.1e}"


def rotary() -> Lines:
    """1.2: only distances matter."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    text = "Monday, Tuesday, Wednesday, Thursday, Friday,"
    tokens = loaded.tokenizer.encode(text)
    inputs, places = mx.array([tokens], mx.int32), mx.arange(len(tokens), dtype=mx.int32)
    rows = []
    for name, positions in (
        ("0, 1, 2, ...", places),
        ("1000, 1001, 1002, ...", places + 1000),
        ("0, 0, 0, ...", places * 0),
    ):
        context = NoCacheContext(len(tokens), loaded.model.config.attention_scale)
        context.positions = positions
        rows.append(loaded.model(inputs, context)[0, -1])
        best = loaded.tokenizer.token_text(int(mx.argmax(rows[-1])))
        difference = float(mx.max(mx.abs(rows[-1] - rows[0])))
        yield f"positions {name:22} {text!r} goes on with {best!r}; logits differ by {difference:.4f}"
    yield "moved together, tokens keep their distances; without positions, words are a heap"


def heads_in_groups() -> Lines:
    """1.3: three heads of keys and values serve nine of queries."""
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    config = loaded.model.config
    shared = config.kv_bytes_per_token(2)
    own = shared * config.num_attention_heads // config.num_key_value_heads
    yield (
        f"{config.num_attention_heads} query heads share {config.num_key_value_heads} heads of keys and "
        f"values: {shared:,} bytes a token in float16 instead of {own:,}"
    )
    yield from _likeliest(CAPITAL)


def norm_and_mlp() -> Lines:
    """1.4: the stream grows from layer to layer, and every layer sees it at one size."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model
    from tiny_llm.norm import rms_norm

    loaded = load_model(None)
    model, tokens = loaded.model, loaded.tokenizer.encode(CAPITAL)
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    x = model.embed_tokens.rows(mx.array([tokens], mx.int32))
    ones = mx.ones(x.shape[-1])
    yield "root mean square of the stream: as it comes to the layer, and normalised"
    for layer, block in enumerate(model.layers):
        if layer % 5 == 0 or layer == len(model.layers) - 1:
            normed = rms_norm(x, ones, model.config.rms_norm_eps)
            yield f"  layer {layer:2}   {_size(x):10.2f}   {_size(normed):6.3f}"
        x = block(x, context)
    config = model.config
    mlp = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    share = mlp / config.num_parameters
    yield f"the MLPs hold {mlp:,} of the model's {config.num_parameters:,} parameters: {share:.0%}"


def a_real_model() -> Lines:
    """1.5: logits of a checkpoint, as words."""
    for text in (CAPITAL, "Water boils at a temperature of 100 degrees", "def fibonacci("):
        yield from _likeliest(text)


def text_streamed() -> Lines:
    """1.6: text, and what each token cost."""
    from tiny_llm.generate import generate, stream_text
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY)
    times: list[float] = []

    def timed() -> Iterator[int]:
        start = time.perf_counter()
        for token in generate(loaded.model, tokens, 48, loaded.model.config.eos_token_ids):
            times.append(time.perf_counter() - start)
            yield token
            start = time.perf_counter()

    yield STORY + "".join(stream_text(timed(), loaded.tokenizer))
    first, last = (sum(part) / len(part) * 1000 for part in (times[:8], times[-8:]))
    yield (
        f"{len(times)} tokens; the first eight took {first:.1f} ms each, the last eight {last:.1f} ms: every "
        "token computes all before it again (day 2.1 ends that)"
    )


def sampling() -> Lines:
    """1.7: one prompt, many continuations, and how many words were possible."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampler import keep_top_p
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(num_blocks=256)
    text = "My favourite thing about the rain is"
    row = llm.logits(llm.tokenizer.encode(text))[-1]
    for temperature in (0.0, 0.7, 1.3):
        possible = int(mx.sum(keep_top_p(row / temperature, 0.9) > -mx.inf)) if temperature else 1
        yield f"temperature {temperature}: {possible:,} of {row.size:,} tokens make up 90% of the next one"
        for seed in (1, 2):
            params = SamplingParams(temperature=temperature, top_p=0.9, seed=seed, max_tokens=14)
            [output] = llm.generate(text, params, use_tqdm=False)
            yield f"  seed {seed}: {text}{output.outputs[0].text.splitlines()[0]}"


def the_quadratic_trap() -> Lines:
    """2.1: counted, then gone."""
    from tiny_llm.generate import generate
    from tiny_llm.kv_cache import attention_with_cache, attention_without_cache, generate_with_cache
    from tiny_llm.loader import load_model

    for prompt_len, gen_len in ((128, 100), (128, 1000)):
        without, kept = (
            attention_without_cache(prompt_len, gen_len),
            attention_with_cache(prompt_len, gen_len),
        )
        yield f"{prompt_len} + {gen_len} tokens: {without:,} keys computed without a cache, {kept:,} with one"
    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY * 16)
    answers = []
    for name, function in (("without", generate), ("with", generate_with_cache)):
        start = time.perf_counter()
        answers.append(list(islice(function(loaded.model, tokens, 24, ()), 24)))
        yield f"{name:7} a cache, {len(tokens)} + 24 tokens: {time.perf_counter() - start:.2f} s"
    yield "the same tokens" if answers[0] == answers[1] else "other tokens: rounding met a near-tie"


def a_contiguous_cache() -> Lines:
    """2.2: what sixteen users reserve, and what they use."""
    from tiny_llm.loader import load_model
    from tiny_llm.naive_cache import NaiveKVCache

    config = load_model(None).model.config
    lengths = [random.Random(user).randint(100, 500) for user in range(16)]
    shape = (config.num_key_value_heads, config.head_dim)
    yield f"a simulation: caches of the real model for 16 users of {min(lengths)} to {max(lengths)} tokens"
    for reserved in (512, 2048, config.max_position_embeddings):
        allocated = used = 0
        for length in lengths:
            cache = NaiveKVCache(reserved, *shape)
            cache.update(mx.zeros((length, *shape)), mx.zeros((length, *shape)))
            allocated += config.num_hidden_layers * cache.allocated_bytes()
            used += config.num_hidden_layers * cache.used_bytes()
        yield (
            f"  room for {reserved:5,} tokens each: {allocated / 2**20:7,.0f} MiB taken, "
            f"{used / 2**20:4,.0f} MiB used, {1 - used / allocated:.0%} wasted"
        )


def blocks_on_demand() -> Lines:
    """2.3: enough is free, and nothing fits."""
    from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator
    from tiny_llm.errors import OutOfBlocksError

    pool, wanted, rounds = 96, 20, 100
    refused = {"side by side": 0, "anywhere": 0}
    free = longest = 0
    for seed in range(rounds):
        draw = random.Random(seed)
        allocator = GlobalAllocator(pool, 16, 1, 4)
        users: list[DynamicKVCache] = []
        while len(allocator.free_blocks) >= 6:
            users.append(DynamicKVCache(allocator, str(len(users))))
            users[-1].blocks += allocator.alloc_contiguous(draw.randint(1, 6))
        for user in draw.sample(users, len(users) // 2):
            user.free()
        free += len(allocator.free_blocks)
        longest += allocator.longest_run()
        ways = {"side by side": allocator.alloc_contiguous, "anywhere": allocator.alloc_blocks}
        for name, take in ways.items():
            try:
                allocator.free_blocks_ids(take(wanted))
            except OutOfBlocksError:
                refused[name] += 1
    yield f"a simulation, without the model: {rounds} pools of {pool} blocks"
    yield "  users come until all are full, half of them go, one more comes"
    yield f"  free on average: {free / rounds:.0f} blocks; longest run of them: {longest / rounds:.0f}"
    for name, count in refused.items():
        yield f"  {wanted} blocks {name}: refused {count} times of {rounds}"
    yield "blocks that may lie anywhere are never wasted by gaps: that is what pages are for (week 3)"


def four_bits() -> Lines:
    """2.4: bytes and errors, and a model that still knows the answer."""
    from tiny_llm.loader import load_model
    from tiny_llm.quantize import dequantize, quantize

    rows = load_model(None).model.embed_tokens.rows(mx.arange(4096))
    size = float(mx.sqrt(mx.mean(rows * rows)))
    yield f"{rows.shape[0]:,} rows of the embedding, {rows.nbytes / 2**20:.1f} MiB in float32, groups of 32"
    for bits in (8, 4, 3, 2):
        stored = quantize(rows.astype(mx.float16), 32, bits)
        nbytes = sum(array.nbytes for array in stored[:3])
        error = dequantize(*stored) - rows
        yield (
            f"  {bits} bits: {8 * nbytes / rows.size:4.1f} bits a value with scales and biases, error "
            f"{float(mx.sqrt(mx.mean(error * error))) / size:.1%} of a value's size"
        )
    yield from _likeliest(CAPITAL)


def attention_in_tiles() -> Lines:
    """2.5: the memory that scores take, and the same numbers without it."""
    from tiny_llm.attention import causal_mask
    from tiny_llm.flash_attention import flash_attention
    from tiny_llm.grouped_attention import grouped_query_attention

    H, Hkv, D = 9, 3, 64
    yield "without the model: random queries, keys and values, with as many heads as the real one's"
    for length in (256, 768):
        q, k, v = (
            mx.random.normal((1, heads, length, D), key=mx.random.key(seed))
            for seed, heads in enumerate((H, Hkv, Hkv))
        )
        found = []
        for tile in (length, 64):
            start = time.perf_counter()
            if tile == length:
                found.append(grouped_query_attention(q, k, v, D**-0.5, causal_mask(length, length)))
            else:
                found.append(flash_attention(q, k, v, D**-0.5, causal=True, tile=tile))
            mx.eval(found[-1])
            seconds = time.perf_counter() - start
            how = "all at once" if tile == length else f"in tiles of {tile}"
            scores = H * length * tile * 4 / 2**20
            yield f"{length:4} tokens {how:14}: scores take {scores:5.1f} MiB; {1000 * seconds:6.1f} ms"
        yield f"     largest difference {float(mx.max(mx.abs(found[0] - found[1]))):.1e}"


def a_steps_budget() -> Lines:
    """2.6: how long others wait while a long prompt is computed."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    for budget in (2048, 128):
        llm = LLM(max_num_batched_tokens=budget, max_num_seqs=8, num_blocks=256)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        llm.core.add_request("short", llm.tokenizer.encode(STORY), params)
        for _ in range(8):
            llm.core.step()
        llm.core.add_request("long", llm.tokenizer.encode(STORY * 400)[:1600], params)
        gaps: list[float] = []
        last = time.perf_counter()
        while len(gaps) < 20:
            if any(output.request_id == "short" for output in llm.core.step()):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
        yield (
            f"the real model, {budget:5,} tokens a step: while a prompt of 1,600 tokens comes in, one that "
            f"is answering waits up to {1000 * max(gaps):5,.0f} ms for its next token"
        )


def continuous_batching() -> Lines:
    """2.7: eight requests together, from contiguous caches."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(batching="dense", max_model_len=256, max_num_seqs=8)
    capacity = llm.core.manager.capacity
    size = capacity.nbytes / 2**20
    yield f"{capacity.num_blocks} slots of {capacity.block_size} tokens take {size:,.0f} MiB"
    animals = ("cat", "dog", "fox", "owl", "bear", "wolf", "mouse", "frog")
    prompts = [f"{STORY}, there was a {animal}" for animal in animals]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    answers = []
    for name, batches in (("one after the other", [[p] for p in prompts]), ("together", [prompts])):
        start = time.perf_counter()
        answers.append([o.outputs[0].text for b in batches for o in llm.generate(b, params, use_tqdm=False)])
        speed = 24 * len(prompts) / (time.perf_counter() - start)
        yield f"8 requests {name:19}: {speed:5.0f} tokens/s"
    yield f"the same texts: {answers[0] == answers[1]}; the first: {prompts[0]}{answers[1][0]!r}"


def one_prompt_three_ways() -> Lines:
    """3.1: which blocks three completions hold, and what was copied."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    size, n = 8, 3
    llm = LLM(block_size=size, num_blocks=64, max_num_seqs=n)
    manager, copies = llm.core.manager, []
    copy_blocks = manager.pool.copy_blocks

    def watched(made: list[Any]) -> None:
        copies.extend(made)
        copy_blocks(made)

    manager.pool.copy_blocks = watched
    end = "On the third night"
    text = f"In the far hills a dragon feared the dark, so every evening it asked the old moon to stay. {end}"
    tokens = llm.tokenizer.encode(text)
    full, rest = divmod(len(tokens), size)
    yield f"the real model, a prompt of {len(tokens)} tokens: {full} full blocks of {size}, {rest} in another"
    params = SamplingParams(n=n, temperature=0.8, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True)
    llm.core.add_request("one", tokens, params)
    for what, steps in (("computed once, and forked", 1), ("a token later", 1), ("17 tokens later", 17)):
        for _ in range(steps):
            llm.core.step()
        yield from _who_holds_what(what, [sequence.table for sequence in manager.running])
    lengths = ", ".join(str(copy.length) for copy in copies) or "none"
    yield f"* another holds it too; copied on write: {len(copies)} blocks, tokens in them: {lengths}"
    for sequence in manager.running:
        yield f"  {end}{llm.tokenizer.decode(sequence.outputs).splitlines()[0]}"


def beams_on_shared_pages() -> Lines:
    """3.2: four beams, what they are worth, and the pages that they share."""
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


def slots_of_a_running_engine() -> Lines:
    """3.3: a view on the engine's own pages: addresses, a window, and what a batch's slots save."""
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
    yield f"the real model, {steps} steps of three stories: layer 7, seen through PagedKVCache"
    batch = [(seq_id, table.num_tokens) for seq_id, table in cache.tables.items()]
    for seq_id, length in batch:
        slots = cache.build_flat_slot_mapping([(seq_id, length)])[::size].tolist()
        yield f"  {seq_id}: {length} tokens; every {size}th is in slot {', '.join(map(str, slots[:8]))}, ..."
    seq_id, length = batch[0]
    whole, _ = cache.read_blocks(seq_id, 0, length)
    window, _ = cache.read_sparse(seq_id, length - 1, 4)
    yield (
        f"the last token of {seq_id!r} with a window of 4 blocks: {window.shape[1]} of {length} tokens, "
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
        f"all {sum(length for _, length in batch)} tokens of the batch, read one by one: "
        f"{1000 * one_by_one:.1f} ms; by one array of slots: {1000 * at_once:.1f} ms"
    )


def one_long_system_prompt() -> Lines:
    """3.4: three questions behind one long system prompt: what is computed, how soon an answer begins."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    subjects = ("sea", "moon", "weather", "rocks", "birds", "ships", "lamp", "stories", "harbour", "tides")
    rules = (f"Rule {i}: when somebody asks about the {it}, be brief." for i, it in enumerate(subjects, 1))
    system = {"role": "system", "content": f"You keep a lighthouse. {' '.join(rules)}"}
    questions = ("Who are you?", "What is the moon?", "Why are there tides?")
    chats = [[system, {"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    yield f"the real model: the same system prompt of {len(system['content']):,} characters, three questions"
    answers = []
    for name, enabled in (("without prefix caching", False), ("with prefix caching", True)):
        llm = LLM(num_blocks=256, max_num_seqs=4, enable_prefix_caching=enabled)
        llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
        outputs = [llm.chat(chat, params, use_tqdm=False)[0] for chat in chats]
        answers.append([output.outputs[0].text for output in outputs])
        yield f"{name}, one after the other:"
        for question, output in zip(questions, outputs, strict=True):
            total, ttft = len(output.prompt_token_ids), output.metrics.ttft
            count = total - output.num_cached_tokens
            yield f"  {question:20} {count:3} of {total} tokens computed; first token: {1000 * ttft:4.0f} ms"
        llm.core.manager.prefix.evict(256)
        together = llm.chat(chats, params, use_tqdm=False)
        answers.append([output.outputs[0].text for output in together])
        count = sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in together)
        yield f"  all three at once, from an empty cache: {count} tokens computed"
    yield f"the same answers every time: {all(answer == answers[0] for answer in answers)}; {answers[0][0]!r}"


def old_pages_go_back() -> Lines:
    """3.5: the pages of a long text with windows and without, what one token reads, and what a hit needs."""
    from tiny_llm.layer_groups import LayerGroup, group_layers
    from tiny_llm.paged_batch import PagedBatchManager
    from tiny_llm.policies import Policies
    from tiny_llm.sampling_params import SamplingParams
    from tiny_llm.windowed_prefix import WindowedPrefixSharing

    size, length, window = 16, 4096, 512
    groups = group_layers((*[window] * 5, None) * 3)
    yield (
        f"a simulation, without the model: 18 layers as in Gemma 3's 270M, in {len(groups)} groups; all "
        f"but the first group see {window} tokens; blocks of {size} tokens"
    )
    params = SamplingParams(max_tokens=1)
    make = partial(PagedBatchManager, 1600, size, 1, max_batched_tokens=128, max_model_len=length + 1)
    whole, near = make(groups=[LayerGroup(group.layers) for group in groups]), make(groups=groups)
    for manager in (whole, near):
        manager.add_request([1] * length, "text", params)
    yield "   tokens | blocks, all layers see all | with windows: full + windowed | gone back"
    for tokens in (256, 512, 640, 1024, 2048, length):
        for manager in (whole, near):
            while manager.sequence("text").num_computed < tokens:
                manager.process_batch()
        all_blocks = sum(len(table.blocks) for table in whole.sequence("text").tables)
        full, *windowed = (len(table.blocks) for table in near.sequence("text").tables)
        gone = sum(table.start // size for table in near.sequence("text").tables[1:])
        yield f"  {tokens:7,} |{all_blocks:27,} |{full:19,} + {sum(windowed):7,} |{gone:10,}"
    kept = full + sum(windowed)
    yield f"{kept:,} of {all_blocks:,} blocks: {kept / all_blocks:.0%}, and the longer the text, the less"
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
        f"the same text again: {again.num_cached_tokens:,} of {length:,} tokens are found, in "
        f"{blocks:,} blocks; nobody asks for the {sum(table.start // size for table in again.tables[1:]):,} "
        "that no window reaches"
    )


def more_users_than_memory() -> Lines:
    """3.6: six stories in pages for two: who waits and when, what is computed again, what is copied."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    animals, length = ("cat", "dog", "fox", "owl", "bear", "wolf"), 64
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    yield f"the real model: {len(animals)} stories of {length} tokens, each of which fills 5 blocks of 16"
    answers = []
    for blocks, mode in ((30, "recompute"), (10, "none"), (10, "recompute"), (10, "swap")):
        llm = LLM(num_blocks=blocks, max_num_seqs=6, preemption_mode=mode, enable_prefix_caching=False)
        llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
        core, manager = llm.core, llm.core.manager
        for animal in animals:
            core.add_request(animal, llm.tokenizer.encode(f"{STORY}, there was a {animal}"), params)
        start, again, copied = time.perf_counter(), 0, 0
        said: dict[str, list[int]] = {animal: [] for animal in animals}
        shown = dict.fromkeys(animals, "")
        while core.has_work:
            had = {one.seq_id: one.num_computed for one in manager.running}
            for output in core.step():
                said[output.seq_id].append(output.token)
            marks = dict.fromkeys(animals, " ") | {one.seq_id: "#" for one in manager.running}
            for one in manager.waiting:
                marks[one.seq_id] = "." if one.swapped is None else "o"
                again += 0 if one.swapped else had.get(one.seq_id, 0)
                copied += len(one.swapped.tables[0].host_blocks) if one.swapped and one.seq_id in had else 0
            shown = {animal: line + marks[animal] for animal, line in shown.items()}
        steps, seconds = len(shown[animals[0]]), time.perf_counter() - start
        answers.append(said)
        yield (
            f"{blocks} blocks, preemption_mode {mode!r}: {steps} steps, {seconds:.1f} s; gave way "
            f"{manager.num_preemptions} times; computed again: {again} tokens; copied out: {copied} blocks"
        )
        every = -(-steps // 80)
        yield from (f"  {animal:4} {line[::every].rstrip()}" for animal, line in shown.items())
    yield f"  #: runs. .: waits. o: waits with its keys and values on the host. A sign is {every} steps"
    yield f"the same answers every time: {all(said == answers[0] for said in answers)}"


def five_clients_at_once() -> Lines:
    """3.7: five clients of one engine with two seats: who waits, who overtakes, and who is cancelled."""
    from tiny_llm.errors import EngineDeadError
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(num_blocks=32, max_num_seqs=2, enable_prefix_caching=False)
    llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
    watched = _Watched(llm.core, ("cat", "dog", "fox", "owl", "wolf"))
    yield "the real model, 2 seats: five clients ask at the same moment, the wolf last, with priority -1"
    yield "and the owl with 1; the client of the cat cancels when it has read 12 tokens"
    start = time.perf_counter()
    try:
        clients = asyncio.run(_five_clients(llm.engine, watched))
    except EngineDeadError as error:  # what it has died of says more
        raise error.__cause__ or error from None
    for name, events, first in clients:
        tokens, said = sum(len(event.token_ids) for event in events), "".join(event.text for event in events)
        yield (
            f"  {name:4} first token after {1000 * first:5.0f} ms, {tokens:2} tokens, "
            f"{events[-1].finish_reason:6}: ...{' '.join(said.split())[:40]}"
        )
    seconds, steps = time.perf_counter() - start, len(watched.steps)
    yield f"all of it took {steps} steps, {seconds:.1f} s"
    yield from (f"  {name:4} {line.rstrip()}" for name, line in watched.lines())
    yield "  #: runs. .: waits"
    held, more = watched.after_the_cancel("cat")
    yield f"the cat held {held} blocks when it was cancelled; further steps that computed it: {more}"
    yield f"a client that comes while the engine drains: {watched.refused}"


TRIES: dict[str, Callable[[], Lines]] = {
    "1.1": attention,
    "1.2": rotary,
    "1.3": heads_in_groups,
    "1.4": norm_and_mlp,
    "1.5": a_real_model,
    "1.6": text_streamed,
    "1.7": sampling,
    "2.1": the_quadratic_trap,
    "2.2": a_contiguous_cache,
    "2.3": blocks_on_demand,
    "2.4": four_bits,
    "2.5": attention_in_tiles,
    "2.6": a_steps_budget,
    "2.7": continuous_batching,
    "3.1": one_prompt_three_ways,
    "3.2": beams_on_shared_pages,
    "3.3": slots_of_a_running_engine,
    "3.4": one_long_system_prompt,
    "3.5": old_pages_go_back,
    "3.6": more_users_than_memory,
    "3.7": five_clients_at_once,
}


def _likeliest(text: str) -> Lines:
    """The five likeliest next tokens of a text, computed without a cache."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(text)
    context = NoCacheContext(len(tokens), loaded.model.config.attention_scale)
    start = time.perf_counter()
    row = loaded.model(mx.array([tokens], mx.int32), context)[0, -1]
    probabilities = mx.softmax(row)
    best = mx.argsort(-probabilities)[:5]
    mx.eval(best)
    seconds = time.perf_counter() - start
    words = ", ".join(
        f"{loaded.tokenizer.token_text(int(token))!r} {float(probabilities[token]):.0%}" for token in best
    )
    yield f"{text!r}: {words} ({1000 * seconds:.0f} ms)"


def _who_holds_what(what: str, tables: list[Any]) -> Lines:
    """The blocks of each table; a star where another table holds the block too."""
    held = Counter(block for table in tables for block in table.physical_indices())
    yield f"{what}: {len(held)} blocks of the pool; without sharing it would be {held.total()}"
    for table in tables:
        blocks = (f"{block:2}{'*' if held[block] > 1 else ' '}" for block in table.physical_indices())
        yield f"  {table.num_tokens} tokens in blocks {' '.join(blocks)}"


def _what_one_token_reads(table: Any, position: int, window: int) -> Lines:
    """The next token of a windowed table: its blocks, and its output when all others hold NaN."""
    from tiny_llm.paged_kernel import Span, pack_batch
    from tiny_llm.sliding_window import NOWHERE, first_visible, windowed_attention

    table.append_tokens(1)
    indices = table.physical_indices()
    first, holes = first_visible(position, window), indices.count(NOWHERE)
    yield (
        f"token {position:,} sees positions {first:,} to {position:,}: {len(indices) - holes} blocks of "
        f"{len(indices)}; the {holes} before are nowhere"
    )
    num_blocks, batch = table.allocator.num_blocks, pack_batch([Span(table, position, position + 1)])
    q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(0))
    pool = mx.random.normal((2, num_blocks, 1, table.block_size, 64), key=mx.random.key(1))
    is_held = mx.array([[[[block in table.blocks]]] for block in range(num_blocks)])
    outputs = [
        windowed_attention(q, keys, values, batch, 0.125, window)
        for keys, values in (pool, mx.where(is_held, pool, mx.nan))
    ]
    yield f"  with NaN in all other blocks of the pool: the same output, {mx.array_equal(*outputs).item()}"


class _Watched:
    """Who runs and who waits in each step of a core, seen from within its thread."""

    def __init__(self, core: Any, names: tuple[str, ...]) -> None:
        self.names = names
        self.steps: list[dict[str, str]] = []
        self.blocks: dict[str, int] = {}
        self.asked_at = 0
        self.refused = ""
        self._core, self._step = core, core.step
        core.step = self._watch

    def _watch(self) -> Any:
        self.steps.append({})  # it has begun
        outputs, manager = self._step(), self._core.manager
        marks = {one.request_id: "." for one in manager.waiting}
        marks |= {one.request_id: "#" for one in (*manager.running, *outputs)}
        self.blocks |= {one.request_id: len(one.table.blocks) for one in manager.running}
        self.steps[-1] = marks
        return outputs

    def lines(self) -> Iterator[tuple[str, str]]:
        """A line of signs for each name."""
        every = -(-len(self.steps) // 80)
        for name in self.names:
            yield name, "".join(marks.get(name, " ") for marks in self.steps[::every])

    def after_the_cancel(self, name: str) -> tuple[int, int]:
        """How many blocks it had, and how many steps that began after it was cancelled computed it."""
        return self.blocks[name], sum(name in marks for marks in self.steps[self.asked_at :])


async def _five_clients(engine: Any, watched: _Watched) -> list[tuple[str, list[Any], float]]:
    """Each client's name, events and seconds to its first token; at the end the engine is drained."""
    from tiny_llm.errors import EngineStoppingError
    from tiny_llm.sampling_params import SamplingParams

    async def client(name: str, priority: int) -> tuple[str, list[Any], float]:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, priority=priority)
        events, first, start = list[Any](), 0.0, time.perf_counter()
        stream = engine.generate(f"{STORY}, there was a {name}", params, request_id=name)
        if iscoroutine(stream):  # without a yield it is no iterator yet, and says what is missing
            await stream
        async for event in stream:
            first = first or time.perf_counter() - start
            events.append(event)
            if name == "cat" and len(events) == 12:
                watched.asked_at = len(watched.steps)
                engine.cancel(name)
        return name, events, first

    async with asyncio.timeout(TRY_SECONDS):
        tasks = [
            asyncio.create_task(client(name, {"wolf": -1, "owl": 1}.get(name, 0))) for name in watched.names
        ]
        await tasks[-1]
        drain = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        try:
            await client("late", 0)
        except EngineStoppingError as error:
            watched.refused = str(error)
        await drain
        return await asyncio.gather(*tasks)


def _size(x: mx.array) -> float:
    return float(mx.sqrt(mx.mean(x * x)))
