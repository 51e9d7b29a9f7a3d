"""Hundreds or thousands of mixed requests through the engine's thread, a third cancelled at random times.

No page is lost, memory use stays constant, and every other request gets the same tokens as when it runs
alone. Oracle: a new `EngineCore`.
"""

import asyncio
import gc
import random
from collections.abc import Callable
from contextlib import aclosing
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import pytest
from tiny_llm.engine import Engine
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore
from tiny_llm.layer_groups import group_layers
from tiny_llm.model import Model
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams

from promises import check_all_returned, check_pages, policies
from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer
from tiny_model import EOS, VOCAB, gemma_model, random_prompt, tiny_model

WAVES, AT_ONCE, KINDS = 4, 24, 40
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
TOKENIZER = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))

Answer = dict[int, tuple[int, ...]]  # tokens by completion


class Kind(NamedTuple):
    """A prompt and its parameters; all requests of a kind must get the same tokens."""

    prompt: list[int]
    params: SamplingParams


@cache
def kind(number: int) -> Kind:
    """Return a kind: with or without a shared prefix, short or long, greedy or sampled."""
    draw = random.Random(number)
    shared = random_prompt(24, seed=number % 3)[: draw.choice([0, 5, 16, 24])]
    own = random_prompt(draw.randint(1, 12), seed=number + 10)
    params = SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        temperature=draw.choice([0.0, 0.8, 1.2]),
        top_p=draw.choice([1.0, 0.9]),
        seed=number,
        max_tokens=draw.choice([1, 4, 10, 20]),
        ignore_eos=draw.choice([True, False]),
        logprobs=draw.choice([None, None, 1]),
        prompt_logprobs=draw.choice([None, None, None, 1]),
        cache_salt=draw.choice(["", "", "tenant"]),
        priority=draw.choice([0, 0, -1, 1]),
    )
    return Kind([*shared, *own], params)


def core_of(model: Model, blocks: int, swap_blocks: int) -> EngineCore:
    groups = group_layers(model.config.windows)
    manager = PagedBatchManager(
        blocks * len(groups),
        4,
        8,
        model=model,
        max_batched_tokens=24,
        policies=policies(True, prefix=True, groups=groups, swap_blocks=swap_blocks),
    )
    return EngineCore(manager, (EOS,))


def answer_alone(model: Model, number: int) -> Answer:
    """Return the answer to a kind from a new engine without other requests."""
    core = core_of(model, 60, 0)
    tokens: dict[int, list[int]] = {}
    core.add_request("alone", *kind(number))
    while core.has_work:
        for output in core.step():
            index = int(output.seq_id.partition("/")[2] or 0)
            tokens.setdefault(index, []).append(output.token)
    return {index: tuple(got) for index, got in tokens.items()}


async def ask(engine: Engine, number: int, leave_after: int | None) -> Answer | None:
    """Send a request; return its answer, or None if reading stopped after `leave_after` events."""
    tokens: dict[int, list[int]] = {}
    events = 0
    async with aclosing(engine.generate(*kind(number))) as stream:
        async for event in stream:
            tokens.setdefault(event.index, []).extend(event.token_ids)
            events += 1
            if leave_after is not None and events > leave_after:
                return None
    return {index: tuple(got) for index, got in tokens.items()}


async def wave(engine: Engine, draw: random.Random, requests: int) -> list[tuple[int, Answer | None]]:
    """Send requests, `AT_ONCE` at a time; a third of them stops reading or is cancelled at a random time."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, fate: str, moment: float) -> tuple[int, Answer | None]:
        async with slots:
            if fate == "left":
                return number, await ask(engine, number, leave_after=int(4 * moment))
            task = asyncio.create_task(ask(engine, number, leave_after=None))
            if fate == "cancelled":
                await asyncio.sleep(0.02 * moment)
                task.cancel()
            try:
                return number, await task
            except asyncio.CancelledError:
                return number, None

    fates = draw.choices(["served", "left", "cancelled"], weights=[4, 1, 1], k=requests)
    return await asyncio.gather(*(one(draw.randrange(KINDS), fate, draw.random()) for fate in fates))


@pytest.mark.parametrize(
    ("make", "blocks", "requests", "preemptions"),
    [
        pytest.param(tiny_model, 14, 200, 5, id="plain"),
        pytest.param(gemma_model, 13, 200, 0, id="windows"),
        pytest.param(tiny_model, 14, 2000, 5, id="plain, long", marks=pytest.mark.deep),
        pytest.param(gemma_model, 13, 2000, 5, id="windows, long", marks=pytest.mark.deep),
    ],
)
def test_a_soak_loses_no_page_leaks_no_memory_and_changes_no_answer(
    make: Callable[[], Model], blocks: int, requests: int, preemptions: int
) -> None:
    gc.collect()  # so that garbage of earlier tests is not freed during this one
    model, draw, bytes_in_use = make(), random.Random(0), []
    mx.eval([layer.self_attn.inv_freq for layer in model.layers])
    expected = {number: answer_alone(model, number) for number in range(KINDS)}
    config = EngineConfig(max_num_seqs=8)
    num_served = num_left = 0
    engine = Engine(lambda: core_of(model, blocks, 60), TOKENIZER, VOCAB, config)
    try:
        for _ in range(WAVES):
            for number, answer in asyncio.run(wave(engine, draw, requests // WAVES)):
                num_served += answer is not None
                num_left += answer is None
                assert answer is None or answer == expected[number], f"kind {number} got another answer"
            engine.call(lambda: check_pages(engine.core.manager))
            bytes_in_use.append(engine.call(mx.get_active_memory))
    finally:
        engine.stop()
    stats = engine.stats
    assert num_left >= requests // 5, "too few requests were cancelled"
    assert num_served >= requests // 2
    assert stats.num_preemptions >= preemptions, f"too few preemptions: {stats}"
    assert max(bytes_in_use[1:]) - min(bytes_in_use[1:]) <= 4096, f"memory in use grows: {bytes_in_use}"
    check_all_returned(engine.core.manager)
