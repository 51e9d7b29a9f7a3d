"""An engine over the tiny model, the clients that ask it, and the oracle of what it must give them.

`by_core` is the oracle: `EngineCore`, stepped by hand in the thread of the test. A `Held` core lets a test
decide when a step begins. The fixtures `engine` and `held` are for tests that import them by name.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from tiny_llm.delivery import Item, events_of
from tiny_llm.engine_core import EngineCore
from tiny_llm.kv_context import KVContext
from tiny_llm.model import Model

from promises import check_all_returned, policies
from tiny_llm import Engine, EngineConfig, PagedBatchManager, RequestEvent, SamplingParams
from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer
from tiny_model import EOS, VOCAB, random_prompt, tiny_model

SECONDS = 60  # a guard against hanging, not a speed that is asked for
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
TOKENIZER = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))
POISON = 1  # a token that nobody else has, or ever gets
LONG = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)


class Said(NamedTuple):
    """What one completion was given."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str | None


def make_core(model: Model | None = None, blocks: int = 60) -> EngineCore:
    """Small enough for preemption, chunks and shared prefixes to happen in a crowd."""
    mx.eval([layer.self_attn.inv_freq for layer in tiny_model().layers])
    manager = PagedBatchManager(
        blocks, 4, 8, model=model or tiny_model(), max_batched_tokens=24, policies=policies(True, prefix=True)
    )
    return EngineCore(manager, (EOS,))


def make_engine(core: Callable[[], EngineCore] = make_core, **options: Any) -> Engine:
    mx.eval([layer.self_attn.inv_freq for layer in tiny_model().layers])  # evaluated arrays cross threads
    return Engine(core, TOKENIZER, VOCAB, EngineConfig(**{"max_num_seqs": 8, **options}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that every test leaves without a request and without a page."""
    engine = make_engine()
    yield engine
    engine.stop()
    check_all_returned(engine.core.manager)


class Held:
    """Makes a core wait before each step until it is let: `step()` lets one, `let_go()` all."""

    def __init__(self, engine: Engine) -> None:
        self._permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        core, step = engine.core, engine.core.step

        def held() -> Any:
            self.begun.release()
            if not self._free:
                assert self._permits.acquire(timeout=SECONDS)
            return step()

        core.step = held  # type: ignore[method-assign]

    def wait(self) -> None:
        """Return when the core is about to take a step."""
        assert self.begun.acquire(timeout=SECONDS)

    def step(self) -> None:
        """Let one step happen."""
        self._permits.release()

    def let_go(self) -> None:
        """Hold nobody any more."""
        self._free = True
        self._permits.release()


@pytest.fixture
def held(engine: Engine) -> Iterator[Held]:
    held = Held(engine)
    yield held
    held.let_go()


def crowd(size: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that partly begin alike, of many lengths, with parameters of every kind."""
    draw, common = random.Random(seed), random_prompt(13, seed)
    kinds = (
        {"temperature": 0.0},
        {"n": 2, "seed": 5},
        {"seed": 6, "logprobs": 0},
        {"seed": 7, "top_k": 9, "logprobs": 2},
        {"temperature": 0.0, "stop": [TOKENIZER.decode([50]), TOKENIZER.decode([60])]},
    )
    return [
        (
            common[: draw.randrange(14)] + random_prompt(draw.randint(1, 30), 100 * seed + i),
            SamplingParams(max_tokens=draw.randint(1, 20), **kinds[i % len(kinds)]),  # type: ignore[arg-type]
        )
        for i in range(size)
    ]


def by_core(prompt: list[int], params: SamplingParams) -> list[Said]:
    """The oracle: a core of its own, stepped here; stop strings are looked for in the text of all tokens."""
    core = make_core()
    core.add_request("alone", prompt, params)
    given: dict[str, list[Any]] = {}
    reasons: dict[str, str | None] = {}
    while core.has_work:
        for output in core.step():
            if output.seq_id in reasons:
                continue
            given.setdefault(output.seq_id, []).append(output)
            text = TOKENIZER.decode([one.token for one in given[output.seq_id]])
            reason = "stop" if any(stop in text for stop in params.stop_strings) else output.finish_reason
            if reason is not None:
                reasons[output.seq_id] = reason
    return [
        Said(
            tuple(one.token for one in given[seq_id]),
            tuple(one.logprobs.logprob for one in given[seq_id] if one.logprobs is not None),
            reasons[seq_id],
        )
        for seq_id in sorted(given)
    ]


def said(events: list[RequestEvent]) -> list[Said]:
    """What each completion was given."""
    found = []
    for index in range(1 + max(event.index for event in events)):
        own = [event for event in events if event.index == index]
        logprobs = [
            entry[token].logprob
            for event in own
            for token, entry in zip(event.token_ids, event.logprobs or (), strict=False)
        ]
        tokens = tuple(token for event in own for token in event.token_ids)
        found.append(Said(tokens, tuple(logprobs), own[-1].finish_reason))
    return found


async def heard(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> list[RequestEvent]:
    return [event async for event in engine.generate(prompt, params, **more)]


def hear(engine: Engine, prompt: Any, params: SamplingParams = LONG) -> list[RequestEvent]:
    """The same for a thread."""
    request, deliveries = engine.request(prompt, params), SimpleQueue[list[Item]]()
    engine.submit([request], deliveries.put).result(SECONDS)
    heard = []
    while not heard or heard[-1].usage is None:
        heard += events_of(deliveries.get(timeout=SECONDS))
    return heard


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in an event loop of its own; nothing may hang."""

    async def guarded() -> Any:
        async with asyncio.timeout(SECONDS):
            return await main

    return asyncio.run(guarded())


async def begun(engine: Engine, held: Held, **more: Any) -> tuple[Any, RequestEvent]:
    """A request that has given its first event; the next step has begun, and is held."""
    events = engine.generate(random_prompt(5, 1), LONG, **more)
    first = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await asyncio.to_thread(held.wait)
    held.step()
    await asyncio.to_thread(held.wait)
    return events, await first


class Poisoned:
    """The tiny model, which fails in any pass that has one token in it."""

    def __init__(self) -> None:
        self.config = tiny_model().config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        if POISON in tokens[0].tolist():
            raise ArithmeticError("poison")
        return tiny_model()(tokens, context)


class Listening:
    """Keeps what it hears, and is like every other in every other way."""

    def __init__(self) -> None:
        self.heard: list[Item] = []
        self.ended = threading.Event()

    def __call__(self, items: list[Item]) -> None:
        self.heard += items
        if any(isinstance(item, Exception) or item.usage is not None for item in items):
            self.ended.set()
