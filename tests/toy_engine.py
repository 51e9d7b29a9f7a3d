"""An engine on the tiny model, clients for it, and the oracle of their results.

`by_core` is the oracle: an `EngineCore`, stepped in the test's thread. With a `Held` core a test decides when
each step starts. Tests import the fixtures `engine` and `held` by name.
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

SECONDS = 60  # a limit against hanging, not a required speed
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
TOKENIZER = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))
POISON = 1  # a token that no other prompt contains and no request generates
LONG = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)


class Said(NamedTuple):
    """The result of one completion."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str | None


def make_core(model: Model | None = None, blocks: int = 60) -> EngineCore:
    """A core so small that many requests cause preemption, chunks and shared prefixes."""
    mx.eval([layer.self_attn.inv_freq for layer in tiny_model().layers])
    manager = PagedBatchManager(
        blocks, 4, 8, model=model or tiny_model(), max_batched_tokens=24, policies=policies(True, prefix=True)
    )
    return EngineCore(manager, (EOS,))


def make_engine(core: Callable[[], EngineCore] = make_core, **options: Any) -> Engine:
    mx.eval(
        [layer.self_attn.inv_freq for layer in tiny_model().layers]
    )  # only evaluated arrays may cross threads
    return Engine(core, TOKENIZER, VOCAB, EngineConfig(**{"max_num_seqs": 8, **options}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine. After the test, all requests must have ended and all pages must be free."""
    engine = make_engine()
    yield engine
    engine.stop()
    check_all_returned(engine.core.manager)


class Held:
    """Makes a core wait before each step. `step()` allows one step, `let_go()` allows all."""

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
        """Wait until the core is about to make a step."""
        assert self.begun.acquire(timeout=SECONDS)

    def step(self) -> None:
        """Allow one step."""
        self._permits.release()

    def let_go(self) -> None:
        """Allow all further steps."""
        self._free = True
        self._permits.release()


@pytest.fixture
def held(engine: Engine) -> Iterator[Held]:
    held = Held(engine)
    yield held
    held.let_go()


def crowd(size: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, some with a common prefix, with parameters of every kind."""
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
    """The oracle: a separate core, stepped here; stop strings are searched in the text of all tokens."""
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
    """The result of each completion."""
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
    """Submit a request from this thread, and wait for all of its events."""
    request, deliveries = engine.request(prompt, params), SimpleQueue[list[Item]]()
    engine.submit([request], deliveries.put).result(SECONDS)
    heard = []
    while not heard or heard[-1].usage is None:
        heard += events_of(deliveries.get(timeout=SECONDS))
    return heard


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a new event loop, with a time limit."""

    async def guarded() -> Any:
        async with asyncio.timeout(SECONDS):
            return await main

    return asyncio.run(guarded())


async def begun(engine: Engine, held: Held, **more: Any) -> tuple[Any, RequestEvent]:
    """A request's stream and its first event; the next step has started, and is held."""
    events = engine.generate(random_prompt(5, 1), LONG, **more)
    first = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await asyncio.to_thread(held.wait)
    held.step()
    await asyncio.to_thread(held.wait)
    return events, await first


class Poisoned:
    """The tiny model, but it fails in any forward pass with the token `POISON`."""

    def __init__(self) -> None:
        self.config = tiny_model().config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        if POISON in tokens[0].tolist():
            raise ArithmeticError("poison")
        return tiny_model()(tokens, context)


class Listening:
    """A listener that records what it receives."""

    def __init__(self) -> None:
        self.heard: list[Item] = []
        self.ended = threading.Event()

    def __call__(self, items: list[Item]) -> None:
        self.heard += items
        if any(isinstance(item, Exception) or item.usage is not None for item in items):
            self.ended.set()
