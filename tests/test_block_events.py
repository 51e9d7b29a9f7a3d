"""A listener sees every change of a block: the pool's state can be reconstructed from the events."""

import asyncio
from collections import Counter

import mlx.core as mx
import pytest
from tiny_llm.block_events import MAX_WAITING_SHOWN, BlockEventKind, BlockWatch, PoolChange
from tiny_llm.engine import Engine
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams

from mirror import Mirror
from promises import policies
from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer
from tiny_model import VOCAB, random_prompt, tiny_model

Kind = BlockEventKind
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]


def serve(manager: PagedBatchManager, watch: BlockWatch) -> Counter[Kind]:
    """Run requests that share, fork, are preempted and swapped; returns how often each event occurred."""
    counts: Counter[Kind] = Counter()
    mirror = Mirror()
    for i in range(7):
        prompt = [*random_prompt(9, 0), *random_prompt(3 + i, i)]
        manager.add_request(prompt, f"r{i}", SamplingParams(n=1 + i % 2, max_tokens=12))
    for step in range(400):
        if step == 20:
            manager.cancel("r3")
        logits = manager.process_batch()
        manager.commit(dict.fromkeys(logits, 9 + step % 50))
        for seq_id in list(logits):
            if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
                manager.finish(seq_id)
        change = watch.poll()
        counts.update(event.kind for event in change.events)
        mirror.apply(change)
        mirror.check(manager)
        late = Mirror()
        late.apply(watch.snapshot())
        late.check(manager)
        if not manager.has_work:
            break
    return counts


@pytest.mark.parametrize("swap_blocks", [0, 60])
def test_the_pool_can_be_reconstructed_from_the_events(swap_blocks: int) -> None:
    """Oracle: the tables and the prefix cache themselves."""
    manager = PagedBatchManager(
        20, 3, 6, max_batched_tokens=16, policies=policies(True, prefix=True, swap_blocks=swap_blocks)
    )
    counts = serve(manager, BlockWatch(manager))
    expected = set(Kind) - (set() if swap_blocks else {Kind.SWAPPED_OUT, Kind.SWAPPED_IN})
    assert set(counts) == expected


def test_a_copy_event_names_both_blocks() -> None:
    manager = PagedBatchManager(20, 4, 4)
    watch = BlockWatch(manager)
    manager.add_request(random_prompt(6, 0), "r", SamplingParams(n=2, max_tokens=4))
    logits = manager.process_batch()
    manager.commit(dict.fromkeys(logits, 9))
    watch.poll()
    manager.process_batch()
    copies = [event for event in watch.poll().events if event.kind is Kind.COPIED]
    assert len(copies) == 1
    (copy,) = copies
    assert copy.other is not None
    assert copy.other != copy.block
    assert {copy.block, copy.other} <= {b for sequence in manager.running for b in sequence.blocks}


def test_there_are_no_events_between_two_polls_without_a_step() -> None:
    manager = PagedBatchManager(20, 4, 4)
    watch = BlockWatch(manager)
    manager.add_request([9, 9, 9], "r", SamplingParams(max_tokens=4))
    manager.process_batch()
    assert not watch.poll().is_empty
    assert watch.poll().is_empty


def test_a_poll_lists_only_the_first_of_many_waiting_requests() -> None:
    manager = PagedBatchManager(20, 4, 4)
    for number in range(3 * MAX_WAITING_SHOWN):
        manager.add_request([9, 9, 9], str(number), SamplingParams(priority=-number))
    shown = [view.seq_id for view in BlockWatch(manager).snapshot().sequences]
    assert shown == [sequence.seq_id for sequence in manager.waiting[:MAX_WAITING_SHOWN]]


def test_an_engine_sends_events_to_its_listeners_and_records_none_without_a_listener() -> None:
    """Oracle: the pool, after all requests have finished."""
    model = tiny_model()
    mx.eval([layer.self_attn.inv_freq for layer in model.layers])
    tokenizer = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))

    def core() -> EngineCore:
        return EngineCore(PagedBatchManager(40, 4, 4, model=model, policies=policies(True, prefix=True)), ())

    engine = Engine(core, tokenizer, VOCAB, EngineConfig(max_num_seqs=4))
    mirror, changes = Mirror(), []

    def record(change: PoolChange) -> None:
        changes.append(change)
        assert not change.is_empty or len(changes) == 1, "an event without a change"
        mirror.apply(change)

    def broken(change: PoolChange) -> None:
        if not change.is_empty:
            raise OSError

    def failing(change: PoolChange) -> None:
        raise OSError

    async def ask() -> None:
        async for _ in engine.generate(
            random_prompt(9, 1), SamplingParams(max_tokens=8, n=2, ignore_eos=True)
        ):
            pass

    try:
        stop_listening = engine.watch_blocks(record)
        engine.watch_blocks(broken)
        with pytest.raises(OSError):  # noqa: PT011
            engine.watch_blocks(failing)
        asyncio.run(ask())
        manager = engine.core.manager
        assert isinstance(manager, PagedBatchManager)
        engine.call(int)
        assert mirror.cached
        mirror.check(manager)
        late = Mirror()
        stop_late = engine.watch_blocks(late.apply)
        late.check(manager)
        stop_late()
        stop_listening()
        num_told = len(changes)
        asyncio.run(ask())
        assert len(changes) == num_told
        assert engine._loop._watch is None
    finally:
        engine.stop()
