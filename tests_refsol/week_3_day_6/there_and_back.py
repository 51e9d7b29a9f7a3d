"""Task 7, with all before it: sequences go out and come back, in any order and under a model."""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence, completion_ids

from common.blocks import counts
from common.examples import quick
from common.toy_models import tiny_model
from week_3_day_6.two_pools import SIZE, TEXT, Setup, in_use

# Task 7: out and back together; `forget`, which is given, releases what is on the host


def test_task_7_host_blocks_go_back() -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.out(sequence)
    setup.space.forget(sequence)
    assert sequence.swapped is None
    assert in_use(setup.space.allocator) == 0, "blocks in use"


def test_task_7_without_host_blocks_there_is_nothing_to_release() -> None:
    """Oracle: by hand: a second time is nothing too: the blocks are another's by then."""
    setup = Setup()
    sequence, other = setup.sequence(TEXT[:10], 10), setup.sequence(TEXT[:10], 10)
    setup.space.forget(other)
    setup.out(sequence)
    setup.space.forget(sequence)
    setup.out(other)
    setup.space.forget(sequence)
    setup.check(waiting=[other])
    assert in_use(setup.space.allocator) == 3, "blocks in use"


def test_task_7_in_the_pool_nothing_changes() -> None:
    """Oracle: symbolic contents: a sequence is back, and reads its own blocks."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.out(sequence)
    setup.back(sequence)
    setup.space.forget(sequence)
    setup.check(sequence)
    assert (sequence.num_computed, sequence.table.num_tokens) == (10, 10)


def test_task_7_out_and_in_again_with_what_came_since() -> None:
    """Oracle: symbolic contents: it comes back, goes on for a block, and goes out again."""
    setup = Setup()
    sequence = setup.sequence(TEXT, 6)
    for count in (3, 4, 1, 9):
        assert setup.out(sequence) is not None
        setup.check(waiting=[sequence])
        setup.back(sequence)
        setup.space.forget(sequence)
        setup.compute(sequence, count)
        setup.check(sequence)


@pytest.mark.parametrize("first", [0, 1])
def test_task_7_what_another_sequence_waits_for_stays(first: int) -> None:
    """Oracle: by hand: two sequences share 2 blocks and have one each of their own; either goes first.

    What stays is still found: a third one with the same beginning shares it.
    """
    setup = Setup()
    pair = [setup.sequence((*TEXT[:8], i), 9) for i in range(2)]
    assert [setup.out(one) for one in pair] == [3, 1], "copies made when going out"
    setup.space.forget(pair[first])
    assert in_use(setup.space.allocator) == 3, "blocks in use"
    left = pair[1 - first]
    setup.check(waiting=[left])
    third = setup.sequence(TEXT[:8], 8)
    assert setup.out(third) == 0, "copies made when going out"
    setup.check(waiting=[left, third])
    setup.back(left)
    setup.check(left, waiting=[left, third])


def test_task_7_a_released_block_is_not_found_any_more() -> None:
    """Oracle: by hand: its host blocks are others' by now; a hash that is left would lead to their keys."""
    setup = Setup(host_blocks=3)
    sequence, other, again = (setup.sequence(tokens, 10) for tokens in (TEXT[:10], range(10), TEXT[:10]))
    assert setup.out(sequence) == 3, "copies made when going out"
    setup.space.forget(sequence)
    assert setup.out(other) == 3, "copies made when going out"
    setup.space.forget(other)
    assert setup.out(again) == 3, "copies made when going out"
    setup.check(waiting=[again])


def test_task_7_windowed_tables_release_too() -> None:
    """Oracle: by hand."""
    setup = Setup(windows=(None, 6, 3))
    sequence = setup.sequence(TEXT, 18)
    setup.out(sequence)
    setup.space.forget(sequence)
    assert in_use(setup.space.allocator) == 0, "blocks in use"


class Crowd:
    """Sequences that begin alike, fork, grow, wait on the host, come back and end, in any order."""

    def __init__(self, windows: tuple[int | None, ...], host_blocks: int) -> None:
        self.setup = Setup(windows, num_blocks=120, host_blocks=host_blocks)
        self.running: list[PagedSequence] = []
        self.waiting: list[PagedSequence] = []
        self.happened: Counter[str] = Counter()
        self.fresh = 1000

    def new(self, number: int) -> None:
        """A new sequence, with 0 to 20 tokens in common with others and up to 3 of its own."""
        common, own = (20, 8, 15, 3)[number % 4], 1 + number % 3
        tokens = (*TEXT[:common], *range(self.fresh, self.fresh + own))
        self.fresh += own
        self.running.append(self.setup.sequence(tokens, len(tokens)))

    def fork(self, number: int) -> None:
        """A running sequence is forked."""
        if self.running:
            self.running.append(self.running[number % len(self.running)].fork(str(number), number))

    def grow(self, number: int) -> None:
        """A running sequence computes 1 to 6 new tokens: its own, or the same as others."""
        if self.running:
            one, count = self.running[number % len(self.running)], 1 + number % 6
            one.outputs += [0] * count if number % 2 else range(self.fresh, self.fresh + count)
            self.fresh += count
            self.setup.compute(one, count)

    def out(self, number: int) -> None:
        """A running sequence is swapped out, if the host has enough free blocks."""
        if not self.running:
            return
        one = self.running[number % len(self.running)]
        there, needed = self.texts_on_host(), 0
        for text in self.texts(one, one.num_computed, [getattr(t, "start", 0) // SIZE for t in one.tables]):
            needed += text is None or text not in there
            there.add(text)
        free, before = self.setup.space.allocator.num_free, counts(self.setup.space.allocator)
        copied = self.setup.out(one)
        assert copied == (needed if needed <= free else None)
        self.happened["host full" if copied is None else "swapped out"] += 1
        if copied is None:
            assert counts(self.setup.space.allocator) == before
        else:
            self.running.remove(one)
            self.waiting.append(one)

    def back(self, number: int) -> None:
        """A swapped sequence comes back, with what others hold: adopted, at hand, or neither.

        Every third time it is preempted again before a copy is made.
        """
        if not self.waiting:
            return
        one, setup = self.waiting[number % len(self.waiting)], self.setup
        assert one.swapped is not None
        for donor in self.running if number % 2 else ():
            known = min(one.swapped.num_computed - 1, donor.num_computed) // SIZE
            found = [n for n in range(1, known + 1) if one.tokens(0, n * SIZE) == donor.tokens(0, n * SIZE)]
            if found and setup.adopt(one, donor, found[number % len(found)]):
                self.happened["adopted"] += 1
                break
        at_hand = setup.at_hand(*self.running) if number % 5 < 3 else {}
        free, starts = setup.allocator.num_free, [getattr(table, "start", 0) for table in one.tables]
        most = setup.space.blocks_to_swap_in(one)
        if number % 3 == 0:
            assert len(setup.space.swap_in(one, at_hand)) <= most
            one.release_pages()
            setup.spoil()
            self.happened["preempted again"] += 1
            return
        copied = setup.back(one, at_hand)
        assert copied == most if not at_hand else copied <= most
        assert free - setup.allocator.num_free <= copied, "a block was taken that nothing is copied to"
        self.happened["shared"] += most - copied
        self.happened["skipped"] += starts != [getattr(table, "start", 0) for table in one.tables]
        setup.space.forget(one)
        self.waiting.remove(one)
        self.running.append(one)

    def end(self, number: int) -> None:
        """A sequence ends, running or waiting."""
        everybody = [*self.running, *self.waiting]
        if everybody:
            one = everybody[number % len(everybody)]
            one.release_pages()
            self.setup.spoil()
            self.setup.space.forget(one)
            (self.running if one in self.running else self.waiting).remove(one)

    def texts(self, one: PagedSequence, computed: int, firsts: Sequence[int]) -> list[object]:
        """What each block from the first on holds: a group and a text; None for one that is not full."""
        return [
            (group, *one.tokens(0, (place + 1) * SIZE)) if (place + 1) * SIZE <= computed else None
            for group, first in enumerate(firsts)
            for place in range(first, -(-computed // SIZE))
        ]

    def texts_on_host(self) -> set[object]:
        """What the full host blocks hold."""
        found: set[object] = set()
        for one in self.waiting:
            assert one.swapped is not None
            tables, computed, _ = one.swapped
            found.update(self.texts(one, computed, [table.first for table in tables]))
        return found - {None}

    def check(self) -> None:
        """Each sequence has its own content, and the host has each full block once."""
        self.setup.check(*self.running, waiting=self.waiting)
        partial = 0
        for one in self.waiting:
            assert one.swapped is not None
            partial += len(one.swapped.tables) * (one.swapped.num_computed % SIZE > 0)
        assert in_use(self.setup.space.allocator) == len(self.texts_on_host()) + partial, "blocks in use"


def test_task_7_host_blocks_are_conserved_and_each_sequence_gets_its_own() -> None:
    """Oracle: symbolic contents, a set of texts, and a count of all references, after each event."""
    happened: Counter[str] = Counter()
    names = ["out", "back", "grow", "out", "back", "new", "fork", "end"]

    @settings(quick, max_examples=70)
    @given(
        windows=st.sampled_from([(None,), (None, 6), (5,), (None, 1, 9)]),
        host_blocks=st.sampled_from([80, 9]),
        events=st.lists(st.tuples(st.sampled_from(names), st.integers(0, 99)), min_size=20, max_size=50),
    )
    def run(windows: tuple[int | None, ...], host_blocks: int, events: list[tuple[str, int]]) -> None:
        crowd = Crowd(windows, host_blocks)
        for name, number in (("new", 0), ("new", 1), ("new", 2), ("fork", 0), ("grow", 3), *events):
            getattr(crowd, name)(number)
            crowd.check()
        while crowd.running or crowd.waiting:
            crowd.end(0)
        assert in_use(crowd.setup.space.allocator) == in_use(crowd.setup.allocator) == 0, "blocks in use"
        happened.update(crowd.happened)

    run()
    expected = {"swapped out", "host full", "adopted", "skipped", "shared", "preempted again"}
    assert all(happened[name] > 20 for name in expected), f"too little happened: {happened}"


def answers(
    window: int | None, num_blocks: int, policies: Policies
) -> tuple[dict[str, np.ndarray], PagedBatchManager, int]:
    """The logits of five requests, two of them with three completions, and how many waited on the host.

    Whatever the logits say, each gets tokens that were drawn beforehand, so that runs can be compared.
    """
    manager = PagedBatchManager(
        num_blocks,
        SIZE,
        6,
        model=tiny_model((window, None)),
        max_batched_tokens=16,
        kv_dtype=mx.float32,
        policies=policies,
    )
    rng = np.random.default_rng(3)
    common, rows, forced = rng.integers(0, 50, 9).tolist(), dict[str, list[np.ndarray]](), {}
    for index, (length, n) in enumerate(((3, 1), (5, 3), (1, 1), (8, 3), (2, 1))):
        name = str(index)
        manager.add_request(
            [*common, *rng.integers(0, 50, length).tolist()], name, SamplingParams(max_tokens=30, n=n)
        )
        for seq_id in completion_ids(name, n):
            rows[seq_id], forced[seq_id] = [], rng.integers(0, 50, 30).tolist()
    most_on_host = steps = 0
    while manager.has_work:
        steps += 1
        assert steps < 600, "no sequence advances"
        for seq_id, row in manager.process_batch().items():
            manager.commit({seq_id: forced[seq_id][len(rows[seq_id])]})
            rows[seq_id].append(np.array(row))
            if len(rows[seq_id]) == 30:
                manager.finish(seq_id)
        most_on_host = max(most_on_host, manager.num_swapped)
    return {seq_id: np.stack(found) for seq_id, found in rows.items()}, manager, most_on_host


@pytest.fixture
def pools_that_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that a pool has not got is a mistake that is told, not memory that is overwritten."""
    fill_from = KVPool.fill_from

    def looking(self: KVPool, source: KVPool, pairs: Sequence[tuple[int, int]]) -> None:
        for block, target in pairs:
            assert 0 <= block < source.num_blocks, f"a copy from block {block} of {source.num_blocks}"
            assert 0 <= target < self.num_blocks, f"a copy to block {target} of {self.num_blocks}"
        fill_from(self, source, pairs)

    monkeypatch.setattr(KVPool, "fill_from", looking)


@pytest.mark.usefixtures("pools_that_look")
@pytest.mark.parametrize("swap_blocks", [60, 10])
@pytest.mark.parametrize("window", [None, 6])
def test_task_7_preempted_sequences_answer_as_in_a_large_pool(window: int | None, swap_blocks: int) -> None:
    """Oracle: the same requests in a pool without preemption; the host has blocks for all, or for few.

    The numbers are those of the same keys, summed in another order at most: others would be far off.
    """
    num_blocks = 17 if window is None else 34
    roomy, manager, _ = answers(window, 400, Policies())
    assert manager.num_preemptions == 0
    squeezed, manager, most_on_host = answers(
        window, num_blocks, Policies(NewestFirst(), swap_blocks=swap_blocks)
    )
    assert manager.num_preemptions > 3, "no sequence was preempted"
    assert most_on_host > 0, "no sequence waited on the host"
    for seq_id, expected in roomy.items():
        np.testing.assert_allclose(squeezed[seq_id], expected, rtol=0, atol=2e-3)
    assert manager.allocator.num_free == num_blocks
