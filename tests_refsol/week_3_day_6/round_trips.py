"""Day 3.6, task 7 with all earlier tasks: swapping out and in, in any order and with a model."""

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

# Task 7: swapping out and in; `forget`, which is given, releases the host blocks


def test_task_7_forgetting_a_sequence_releases_its_host_blocks() -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.swap_out(sequence)
    setup.space.forget(sequence)
    assert sequence.swapped is None
    assert in_use(setup.space.allocator) == 0, "the number of blocks in use"


def test_task_7_forgetting_a_sequence_without_host_blocks_changes_nothing() -> None:
    """Oracle: by hand: at the second call the blocks belong to another sequence."""
    setup = Setup()
    sequence, other = setup.sequence(TEXT[:10], 10), setup.sequence(TEXT[:10], 10)
    setup.space.forget(other)
    setup.swap_out(sequence)
    setup.space.forget(sequence)
    setup.swap_out(other)
    setup.space.forget(sequence)
    setup.check(waiting=[other])
    assert in_use(setup.space.allocator) == 3, "the number of blocks in use"


def test_task_7_forgetting_a_sequence_does_not_change_the_pool() -> None:
    """Oracle: symbolic contents: the sequence is swapped in and reads its own blocks."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.swap_out(sequence)
    setup.swap_in(sequence)
    setup.space.forget(sequence)
    setup.check(sequence)
    assert (sequence.num_computed, sequence.table.num_tokens) == (10, 10)


def test_task_7_a_sequence_can_be_swapped_out_and_in_repeatedly() -> None:
    """Oracle: symbolic contents: it is swapped in, computes more tokens, and is swapped out again."""
    setup = Setup()
    sequence = setup.sequence(TEXT, 6)
    for count in (3, 4, 1, 9):
        assert setup.swap_out(sequence) is not None
        setup.check(waiting=[sequence])
        setup.swap_in(sequence)
        setup.space.forget(sequence)
        setup.compute(sequence, count)
        setup.check(sequence)


@pytest.mark.parametrize("first", [0, 1])
def test_task_7_forgetting_a_sequence_keeps_host_blocks_of_other_sequences(first: int) -> None:
    """Oracle: by hand: two sequences share 2 blocks and have one more each; either is forgotten first.

    The remaining blocks are still found: a third sequence with the same prefix shares them.
    """
    setup = Setup()
    pair = [setup.sequence((*TEXT[:8], i), 9) for i in range(2)]
    assert [setup.swap_out(one) for one in pair] == [3, 1], "the number of blocks copied to the host"
    setup.space.forget(pair[first])
    assert in_use(setup.space.allocator) == 3, "the number of blocks in use"
    left = pair[1 - first]
    setup.check(waiting=[left])
    third = setup.sequence(TEXT[:8], 8)
    assert setup.swap_out(third) == 0, "the number of blocks copied to the host"
    setup.check(waiting=[left, third])
    setup.swap_in(left)
    setup.check(left, waiting=[left, third])


def test_task_7_a_released_host_block_is_not_found() -> None:
    """Oracle: by hand: by now its host blocks belong to another sequence.

    An outdated hash would find them.
    """
    setup = Setup(host_blocks=3)
    sequence, other, again = (setup.sequence(tokens, 10) for tokens in (TEXT[:10], range(10), TEXT[:10]))
    assert setup.swap_out(sequence) == 3, "the number of blocks copied to the host"
    setup.space.forget(sequence)
    assert setup.swap_out(other) == 3, "the number of blocks copied to the host"
    setup.space.forget(other)
    assert setup.swap_out(again) == 3, "the number of blocks copied to the host"
    setup.check(waiting=[again])


def test_task_7_forgetting_a_sequence_releases_host_blocks_of_its_windowed_tables() -> None:
    """Oracle: by hand."""
    setup = Setup(windows=(None, 6, 3))
    sequence = setup.sequence(TEXT, 18)
    setup.swap_out(sequence)
    setup.space.forget(sequence)
    assert in_use(setup.space.allocator) == 0, "the number of blocks in use"


class SwapScenario:
    """Sequences with common prefixes fork, grow, are swapped out and in, and finish, in any order."""

    def __init__(self, windows: tuple[int | None, ...], host_blocks: int) -> None:
        self.setup = Setup(windows, num_blocks=120, host_blocks=host_blocks)
        self.running: list[PagedSequence] = []
        self.waiting: list[PagedSequence] = []
        self.happened: Counter[str] = Counter()
        self.fresh = 1000

    def new(self, number: int) -> None:
        """Add a sequence with 3 to 20 tokens in common with others and up to 3 more."""
        common, own = (20, 8, 15, 3)[number % 4], 1 + number % 3
        tokens = (*TEXT[:common], *range(self.fresh, self.fresh + own))
        self.fresh += own
        self.running.append(self.setup.sequence(tokens, len(tokens)))

    def fork(self, number: int) -> None:
        """Fork a running sequence."""
        if self.running:
            self.running.append(self.running[number % len(self.running)].fork(str(number), number))

    def grow(self, number: int) -> None:
        """Compute 1 to 6 new tokens of a running sequence, either unique or equal to those of others."""
        if self.running:
            one, count = self.running[number % len(self.running)], 1 + number % 6
            one.outputs += [0] * count if number % 2 else range(self.fresh, self.fresh + count)
            self.fresh += count
            self.setup.compute(one, count)

    def swap_out(self, number: int) -> None:
        """Swap out a running sequence if the host has enough free blocks."""
        if not self.running:
            return
        one = self.running[number % len(self.running)]
        on_host, needed = self.texts_on_host(), 0
        for text in self.texts(one, one.num_computed, [getattr(t, "start", 0) // SIZE for t in one.tables]):
            needed += text is None or text not in on_host
            on_host.add(text)
        free, before = self.setup.space.allocator.num_free, counts(self.setup.space.allocator)
        copied = self.setup.swap_out(one)
        assert copied == (needed if needed <= free else None)
        self.happened["host full" if copied is None else "swapped out"] += 1
        if copied is None:
            assert counts(self.setup.space.allocator) == before
        else:
            self.running.remove(one)
            self.waiting.append(one)

    def swap_in(self, number: int) -> None:
        """Swap in a sequence, with blocks of others that are adopted, at hand, or neither.

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
            setup.overwrite_free_blocks()
            self.happened["preempted again"] += 1
            return
        copied = setup.swap_in(one, at_hand)
        assert copied == most if not at_hand else copied <= most
        assert free - setup.allocator.num_free <= copied, "an allocated block gets no copy"
        self.happened["shared"] += most - copied
        self.happened["skipped"] += starts != [getattr(table, "start", 0) for table in one.tables]
        setup.space.forget(one)
        self.waiting.remove(one)
        self.running.append(one)

    def end(self, number: int) -> None:
        """Finish a sequence, running or waiting."""
        sequences = [*self.running, *self.waiting]
        if sequences:
            one = sequences[number % len(sequences)]
            one.release_pages()
            self.setup.overwrite_free_blocks()
            self.setup.space.forget(one)
            (self.running if one in self.running else self.waiting).remove(one)

    def texts(self, one: PagedSequence, computed: int, firsts: Sequence[int]) -> list[object]:
        """The content of each block from the first on: a group and its tokens; None if it is not full."""
        return [
            (group, *one.tokens(0, (place + 1) * SIZE)) if (place + 1) * SIZE <= computed else None
            for group, first in enumerate(firsts)
            for place in range(first, -(-computed // SIZE))
        ]

    def texts_on_host(self) -> set[object]:
        """The contents of the full host blocks."""
        found: set[object] = set()
        for one in self.waiting:
            assert one.swapped is not None
            tables, computed, _ = one.swapped
            found.update(self.texts(one, computed, [table.first for table in tables]))
        return found - {None}

    def check(self) -> None:
        """Assert that each sequence has its own content and that the host stores each full block once."""
        self.setup.check(*self.running, waiting=self.waiting)
        partial = 0
        for one in self.waiting:
            assert one.swapped is not None
            partial += len(one.swapped.tables) * (one.swapped.num_computed % SIZE > 0)
        assert in_use(self.setup.space.allocator) == len(self.texts_on_host()) + partial, (
            "the number of blocks in use"
        )


def test_task_7_host_blocks_are_conserved_and_every_sequence_reads_its_own_tokens() -> None:
    """Oracle: symbolic contents, a set of prefixes, and a count of all references after each event."""
    happened: Counter[str] = Counter()
    names = ["swap_out", "swap_in", "grow", "swap_out", "swap_in", "new", "fork", "end"]

    @settings(quick, max_examples=70)
    @given(
        windows=st.sampled_from([(None,), (None, 6), (5,), (None, 1, 9)]),
        host_blocks=st.sampled_from([80, 9]),
        events=st.lists(st.tuples(st.sampled_from(names), st.integers(0, 99)), min_size=20, max_size=50),
    )
    def run(windows: tuple[int | None, ...], host_blocks: int, events: list[tuple[str, int]]) -> None:
        scenario = SwapScenario(windows, host_blocks)
        for name, number in (("new", 0), ("new", 1), ("new", 2), ("fork", 0), ("grow", 3), *events):
            getattr(scenario, name)(number)
            scenario.check()
        while scenario.running or scenario.waiting:
            scenario.end(0)
        assert in_use(scenario.setup.space.allocator) == in_use(scenario.setup.allocator) == 0, (
            "the number of blocks in use"
        )
        happened.update(scenario.happened)

    run()
    expected = {"swapped out", "host full", "adopted", "skipped", "shared", "preempted again"}
    assert all(happened[name] > 20 for name in expected), f"the examples cover too little: {happened}"


def answers(
    window: int | None, num_blocks: int, policies: Policies
) -> tuple[dict[str, np.ndarray], PagedBatchManager, int]:
    """The logits of five requests, two with three completions, and the largest number of swapped sequences.

    All runs commit the same random tokens, whatever the logits, so that runs can be compared.
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
        assert steps < 600, "the sequences do not finish"
        for seq_id, row in manager.process_batch().items():
            manager.commit({seq_id: forced[seq_id][len(rows[seq_id])]})
            rows[seq_id].append(np.array(row))
            if len(rows[seq_id]) == 30:
                manager.finish(seq_id)
        most_on_host = max(most_on_host, manager.num_swapped)
    return {seq_id: np.stack(found) for seq_id, found in rows.items()}, manager, most_on_host


@pytest.fixture
def checked_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fill_from` fail for block ids outside a pool instead of overwriting memory."""
    fill_from = KVPool.fill_from

    def checked(self: KVPool, source: KVPool, pairs: Sequence[tuple[int, int]]) -> None:
        for block, target in pairs:
            assert 0 <= block < source.num_blocks, (
                f"a copy reads block {block} of a pool of {source.num_blocks}"
            )
            assert 0 <= target < self.num_blocks, (
                f"a copy writes block {target} of a pool of {self.num_blocks}"
            )
        fill_from(self, source, pairs)

    monkeypatch.setattr(KVPool, "fill_from", checked)


@pytest.mark.usefixtures("checked_pools")
@pytest.mark.parametrize("swap_blocks", [60, 10])
@pytest.mark.parametrize("window", [None, 6])
def test_task_7_preempted_sequences_get_the_same_logits_as_in_a_large_pool(
    window: int | None, swap_blocks: int
) -> None:
    """Oracle: the same requests in a pool without preemption; the host has blocks for all, or for few.

    Equal keys give equal logits up to rounding; wrong keys would be far off.
    """
    num_blocks = 17 if window is None else 34
    expected_logits, manager, _ = answers(window, 400, Policies())
    assert manager.num_preemptions == 0
    logits, manager, most_on_host = answers(
        window, num_blocks, Policies(NewestFirst(), swap_blocks=swap_blocks)
    )
    assert manager.num_preemptions > 3, "too few preemptions to test anything"
    assert most_on_host > 0, "no sequence was swapped out"
    for seq_id, expected in expected_logits.items():
        np.testing.assert_allclose(logits[seq_id], expected, rtol=0, atol=2e-3)
    assert manager.allocator.num_free == num_blocks
