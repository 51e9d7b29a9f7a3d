"""What a replica reports to a router: the hashes of its cached blocks, and the tokens that wait.

Oracle of the hashes: a watcher that replays the events of the pool. No model runs.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.block_events import BlockEventKind, BlockWatch
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.layer_groups import group_layers
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.sequence import SequenceState

from promises import policies
from tiny_llm import SamplingParams
from tiny_llm_routing.reports import ReplicaReport, read_report
from tiny_model import examples, random_prompt, tiny_model

Windows = tuple[int | None, ...]


def make_manager(
    windows: Windows = (None,), blocks: int = 24, *, budget: int = 16, swap_blocks: int = 0
) -> PagedBatchManager:
    groups = group_layers(windows)
    return PagedBatchManager(
        blocks,
        3,
        6,
        max_batched_tokens=budget,
        policies=policies(True, prefix=True, groups=groups, swap_blocks=swap_blocks),
        groups=groups,
    )


def step(manager: PagedBatchManager, token: int = 9) -> None:
    """Run a step; every ready sequence gets this token, and ends if it is its last."""
    ready = list(manager.process_batch())
    manager.commit(dict.fromkeys(ready, token))
    for seq_id in ready:
        if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
            manager.finish(seq_id)


# ---- the hashes ----


@settings(max_examples=examples(200), deadline=None)
@given(
    seed=st.integers(0, 2**32),
    windows=st.sampled_from([(None,), (None, 5), (4,), (None, 4, 7)]),
    swap_blocks=st.sampled_from([0, 60]),
)
def test_the_hashes_are_those_that_a_watcher_of_the_pool_knows(
    seed: int, windows: Windows, swap_blocks: int
) -> None:
    """After every step of random traffic, with cancelled requests and compaction."""
    draw = random.Random(seed)
    manager = make_manager(windows, 24 * len(group_layers(windows)), swap_blocks=swap_blocks)
    watch = BlockWatch(manager)
    known: set[bytes] = set()
    for number in range(40):
        if draw.random() < 0.4:
            prompt = random_prompt(draw.randint(0, 12), draw.randint(0, 1)) + random_prompt(3, number)
            params = SamplingParams(n=draw.choice([1, 1, 2]), max_tokens=draw.randint(1, 9))
            manager.add_request(prompt, str(number), params)
        if draw.random() < 0.1:
            manager.cancel(str(draw.randrange(number + 1)))
        step(manager, draw.choice([9, 10]))
        if draw.random() < 0.1:
            manager.compact()
        for event in watch.poll().events:
            if event.kind is BlockEventKind.CACHED:
                assert event.hash is not None
                assert event.hash not in known
                known.add(event.hash)
            elif event.kind is BlockEventKind.EVICTED:
                assert event.hash is not None
                known.remove(event.hash)
            else:
                assert event.hash is None
        hashes = manager.prefix.hashes()
        assert len(hashes) == len(set(hashes))
        assert set(hashes) == known


def test_a_block_that_is_reused_for_other_tokens_within_a_step_is_evicted_and_cached_again() -> None:
    """Oracle: by hand: in a pool of 3 blocks the second prompt must take the first one's blocks."""
    manager = make_manager(blocks=3)
    watch = BlockWatch(manager)
    for number, prompt in enumerate(([1] * 8, [2] * 8)):
        manager.add_request(prompt, str(number), SamplingParams(max_tokens=1))
        step(manager)
        if number == 0:
            first = {event.hash for event in watch.poll().events if event.kind is BlockEventKind.CACHED}
    events = watch.poll().events
    evicted = [event.hash for event in events if event.kind is BlockEventKind.EVICTED]
    cached = [event.hash for event in events if event.kind is BlockEventKind.CACHED]
    assert len(first) == 2
    assert set(evicted) == first
    assert set(cached) == set(manager.prefix.hashes())
    assert set(cached).isdisjoint(first)


@pytest.mark.parametrize("num_steps", [1, 4, 9, 30])
def test_a_limit_never_leaves_out_a_block_before_a_reported_one(num_steps: int) -> None:
    """Oracle: the texts' own hashes; in the first steps all requests run, at the end all blocks are idle."""
    manager = make_manager(blocks=60)
    texts = [random_prompt(9, 0) + random_prompt(9, i) for i in range(6)]
    for number, text in enumerate(texts):
        manager.add_request(text, str(number), SamplingParams(max_tokens=3 + 4 * number))
    for _ in range(num_steps):
        step(manager)
    kept = manager.prefix.hashes()
    assert kept
    for limit in range(len(kept) + 2):
        hashes = manager.prefix.hashes(limit)
        assert len(hashes) == min(limit, len(kept))
        assert set(hashes) <= set(kept)
        for text in texts:
            stream = TokenBlocks(3)
            stream.extend(text)
            found = [digest in hashes for digest in stream.hashes]
            assert found == sorted(found, reverse=True), "a block is reported without the blocks before it"


def test_a_limit_leaves_out_the_blocks_that_will_be_evicted_first() -> None:
    """Oracle: eviction itself."""
    manager = make_manager(blocks=60)
    for number in range(5):
        manager.add_request(random_prompt(10, number), str(number), SamplingParams(max_tokens=2))
    while manager.has_work:
        step(manager)
    assert len(manager.prefix.hashes()) == manager.prefix.num_idle == 15
    limited = {limit: manager.prefix.hashes(limit) for limit in range(0, 15, 2)}
    manager.prefix.evict(1)
    for _, hashes in sorted(limited.items(), reverse=True):
        assert set(manager.prefix.hashes()) == set(hashes)
        manager.prefix.evict(2)


def test_without_a_prefix_cache_there_are_no_hashes() -> None:
    paged = PagedBatchManager(20, 4, 4)
    dense = DenseBatchManager(4, 40, model=tiny_model())
    for manager in (paged, dense):
        manager.add_request([1] * 9, "a", SamplingParams(max_tokens=4))
        assert read_report(manager, 5.0) == ReplicaReport(5.0, frozenset(), 9, 0, 1, False)


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32), windows=st.sampled_from([(None,), (None, 5)]))
def test_a_report_changes_no_step_and_no_page(seed: int, windows: Windows) -> None:
    """Oracle: the same traffic without reports; and at every step free + held blocks are all blocks."""
    draw, num_blocks = random.Random(seed), 24 * len(group_layers(windows))
    asked, quiet = (make_manager(windows, num_blocks, swap_blocks=60) for _ in range(2))
    for number in range(30):
        prompt = random_prompt(draw.randint(0, 12), draw.randint(0, 1)) + random_prompt(3, number)
        params = SamplingParams(max_tokens=draw.randint(1, 9))
        for manager in (asked, quiet):
            if number % 2:
                manager.add_request(prompt, str(number), params)
        read_report(asked, float(number))
        for manager in (asked, quiet):
            step(manager)
        read_report(asked, float(number))
        tables = [
            [(one.seq_id, one.num_computed, *one.blocks) for one in (*manager.running, *manager.waiting)]
            for manager in (asked, quiet)
        ]
        assert tables[0] == tables[1]
        assert asked.prefix.hashes() == quiet.prefix.hashes()
        held = {block for one in asked.running for block in one.blocks} | set(asked.prefix.blocks)
        assert asked.allocator.num_free + len(held) == num_blocks


# ---- the tokens that wait ----


def test_prompt_tokens_count_until_they_are_computed() -> None:
    """Oracle: by hand: 16 tokens in a step; a running sequence's last token and its outputs do not count."""
    manager = make_manager(blocks=60)
    manager.add_request(random_prompt(20, 1), "a", SamplingParams(max_tokens=9))
    manager.add_request(random_prompt(30, 2), "b", SamplingParams(max_tokens=9))
    counts = [read_report(manager, 0.0).queued_tokens]
    for _ in range(5):
        step(manager)
        counts.append(read_report(manager, 0.0).queued_tokens)
    assert counts == [50, 32, 17, 2, 0, 0]


def test_a_swapped_prompt_is_not_queued_again_but_a_recomputed_one_is() -> None:
    """Oracle: the state of each preempted sequence."""
    for swap_blocks, is_queued in ((0, True), (60, False)):
        manager = make_manager(blocks=16, swap_blocks=swap_blocks, budget=64)
        for number in range(3):
            manager.add_request(random_prompt(12, number), str(number), SamplingParams(max_tokens=12))
        while not manager.num_preemptions:
            step(manager)
        [waiting] = manager.waiting
        assert (waiting.state is SequenceState.SWAPPED) != is_queued
        stream = waiting.stream_of(0, waiting.num_tokens // 3)
        cached = 3 * len(manager.prefix.cache.match(stream, 0, (waiting.num_tokens - 1) // 3))
        expected = waiting.num_tokens - cached if is_queued else 0
        assert read_report(manager, 0.0).queued_tokens == expected
        assert (expected > 0) == is_queued
