"""An engine with the tiny model, clients that send it requests, and the oracle for their results.

The oracle is `results_from_core`: an `EngineCore` that is stepped by hand in the test's thread. `HeldCore`
lets a test decide when a step starts. Test files import the fixtures `engine` and `held_core` by name.
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

SECONDS = 60  # a timeout against hanging, not a requirement on speed
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
TOKENIZER = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))
POISON = 1  # a token that is in no other prompt and is never generated
LONG = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)


class CompletionResult(NamedTuple):
    """The tokens, log-probabilities and finish reason of one completion."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str | None


def make_core(model: Model | None = None, blocks: int = 60) -> EngineCore:
    """Return a core so small that many requests cause preemption, chunked prefill and shared prefixes."""
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
    """An engine; after the test it must have no requests and no used pages."""
    engine = make_engine()
    yield engine
    engine.stop()
    check_all_returned(engine.core.manager)


class HeldCore:
    """Stops a core before each step; `step()` allows one step, `allow_all_steps()` allows all."""

    def __init__(self, engine: Engine) -> None:
        self._permits, self.step_started = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        core, step = engine.core, engine.core.step

        def held_step() -> Any:
            self.step_started.release()
            if not self._free:
                assert self._permits.acquire(timeout=SECONDS)
            return step()

        core.step = held_step  # type: ignore[method-assign]

    def wait(self) -> None:
        """Return when the core is about to run a step."""
        assert self.step_started.acquire(timeout=SECONDS)

    def step(self) -> None:
        """Allow one step."""
        self._permits.release()

    def allow_all_steps(self) -> None:
        """Hold no further step."""
        self._free = True
        self._permits.release()


@pytest.fixture
def held_core(engine: Engine) -> Iterator[HeldCore]:
    held_core = HeldCore(engine)
    yield held_core
    held_core.allow_all_steps()


def many_requests(size: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Return prompts of many lengths, some with a shared prefix, with all kinds of parameters."""
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


def results_from_core(prompt: list[int], params: SamplingParams) -> list[CompletionResult]:
    """Run a request alone in a new core, stepped here (the oracle); find stop strings in the whole text."""
    core = make_core()
    core.add_request("alone", prompt, params)
    outputs: dict[str, list[Any]] = {}
    reasons: dict[str, str | None] = {}
    while core.has_work:
        for output in core.step():
            if output.seq_id in reasons:
                continue
            outputs.setdefault(output.seq_id, []).append(output)
            text = TOKENIZER.decode([one.token for one in outputs[output.seq_id]])
            reason = "stop" if any(stop in text for stop in params.stop_strings) else output.finish_reason
            if reason is not None:
                reasons[output.seq_id] = reason
    return [
        CompletionResult(
            tuple(one.token for one in outputs[seq_id]),
            tuple(one.logprobs.logprob for one in outputs[seq_id] if one.logprobs is not None),
            reasons[seq_id],
        )
        for seq_id in sorted(outputs)
    ]


def results_of(events: list[RequestEvent]) -> list[CompletionResult]:
    """Return the result of each completion of one request, in the order of their indices."""
    results = []
    for index in range(1 + max(event.index for event in events)):
        own = [event for event in events if event.index == index]
        logprobs = [
            entry[token].logprob
            for event in own
            for token, entry in zip(event.token_ids, event.logprobs or (), strict=False)
        ]
        tokens = tuple(token for event in own for token in event.token_ids)
        results.append(CompletionResult(tokens, tuple(logprobs), own[-1].finish_reason))
    return results


async def collect_events(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> list[RequestEvent]:
    """Send a request with `Engine.generate`; return all its events."""
    return [event async for event in engine.generate(prompt, params, **more)]


def collect_events_in_thread(
    engine: Engine, prompt: Any, params: SamplingParams = LONG
) -> list[RequestEvent]:
    """Send a request with `Engine.submit`, without an event loop; return all its events."""
    request, deliveries = engine.request(prompt, params), SimpleQueue[list[Item]]()
    engine.submit([request], deliveries.put).result(SECONDS)
    events: list[RequestEvent] = []
    while not events or events[-1].usage is None:
        events += events_of(deliveries.get(timeout=SECONDS))
    return events


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a new event loop; raise TimeoutError if it hangs."""

    async def guarded() -> Any:
        async with asyncio.timeout(SECONDS):
            return await main

    return asyncio.run(guarded())


async def started_request(engine: Engine, held_core: HeldCore, **more: Any) -> tuple[Any, RequestEvent]:
    """Return a request's event iterator and its first event; the next step is held."""
    events = engine.generate(random_prompt(5, 1), LONG, **more)
    first = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await asyncio.to_thread(held_core.wait)
    held_core.step()
    await asyncio.to_thread(held_core.wait)
    return events, await first


class FailingModel:
    """The tiny model, but a forward pass over a step that contains the token `POISON` raises."""

    def __init__(self) -> None:
        self.config = tiny_model().config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        if POISON in tokens[0].tolist():
            raise ArithmeticError("poison")
        return tiny_model()(tokens, context)


class RecordingListener:
    """A listener that records all items it gets; `finished` is set after the last one."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.finished = threading.Event()

    def __call__(self, items: list[Item]) -> None:
        self.items += items
        if any(isinstance(item, Exception) or item.usage is not None for item in items):
            self.finished.set()
