"""The swap space on the host: what its blocks hold, which can be found, and the pools that copy from each
other.

Oracle: blocks as dicts of what they hold.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator, BlockCopy
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.step import Plan
from tiny_llm.swap import SwapSpace

from tiny_model import examples, tiny_model

# ---- the space, against the contents of its blocks ----

SIZE = 3


@dataclass
class Host:
    """A swap space next to dicts from blocks to texts, for sequences in layers with one window each."""

    windows: tuple[int | None, ...]
    num_blocks: int
    rng: random.Random
    running: list[PagedSequence] = field(default_factory=list)
    waiting: list[PagedSequence] = field(default_factory=list)
    held: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the pool: group, text up to its end
    on_host: dict[int, tuple[int, ...]] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.layout = PageLayout(
            tuple(LayerGroup((i,), window) for i, window in enumerate(self.windows)), SIZE, 8
        )
        self.allocator = BlockAllocator(500)
        self.space = SwapSpace(self.num_blocks, SIZE)

    def new(self) -> None:
        """A sequence of few different tokens, so that many share a prefix."""
        tokens = tuple(self.rng.choices((1, 2), weights=(6, 1), k=self.rng.randint(1, 14)))
        sequence = PagedSequence(
            seq_id="x",
            request_id="x",
            prompt=tokens,
            params=SamplingParams(),
            seed=0,
            max_len=999,
            tables=self.layout.tables(self.allocator),
            streams=self.layout.streams(""),
        )
        self.running.append(sequence)
        self.compute(sequence, len(tokens) - (len(tokens) > 1 and self.rng.random() < 0.3))

    def compute(self, sequence: PagedSequence, count: int) -> None:
        """Compute known tokens; what a copied block held need not be recorded, as all of it is written."""
        sequence.append_tokens(count)
        sequence.num_computed += count
        for group, table in enumerate(sequence.tables):
            first = getattr(table, "start", 0) // SIZE
            for place, block in enumerate(table.blocks, first):
                end = min((place + 1) * SIZE, sequence.num_computed)
                self.held[block] = (group, *sequence.tokens(0, end))
        self.layout.release_passed(sequence.tables, sequence.num_computed)

    def grow(self) -> None:
        if self.running:
            sequence = self.rng.choice(self.running)
            count = self.rng.randint(1, 5)
            sequence.outputs += self.rng.choices((1, 2), weights=(6, 1), k=count)
            self.compute(sequence, self.rng.randint(1, sequence.num_uncomputed))

    def fork(self) -> None:
        if self.running:
            self.running.append(self.rng.choice(self.running).fork("y", 1))

    def swap_out(self) -> None:
        """Swap a sequence out, sometimes with a planned step whose copies on write are not made."""
        if not self.running:
            return
        sequence, filled_from = self.rng.choice(self.running), {}
        if self.rng.random() < 0.4:
            filled_from = {copy.dst: copy.src for copy in sequence.append_tokens(self.rng.randint(1, 4))}
            for block in filled_from:
                self.held[block] = ()
        self.happened["pending copies"] += len(filled_from)
        before = [self.space.allocator.ref_count(block) for block in range(self.num_blocks)]
        copies = self.space.swap_out(sequence, filled_from)
        if copies is None:
            self.happened["host full"] += 1
            assert sequence.swapped is None
            assert before == [self.space.allocator.ref_count(block) for block in range(self.num_blocks)]
            sequence.release_pages()
            self.running.remove(sequence)
            return
        for block, host_block in copies:
            assert before[host_block] == 0, "a host block in use was overwritten"
            self.on_host[host_block] = self.held[block]
        self.happened["blocks swapped out"] += len(copies)
        assert sequence.swapped is not None
        shared = sum(len(table.host_blocks) for table in sequence.swapped.tables) - len(copies)
        self.happened["blocks found on the host"] += shared
        sequence.release_pages()
        self.running.remove(sequence)
        self.waiting.append(sequence)

    def swap_in(self) -> None:
        """Swap in a sequence, which may share blocks of the others; some are swapped out again at once."""
        if not self.waiting:
            return
        sequence, at_hand = self.rng.choice(self.waiting), dict[bytes, int]()
        for other in self.running if self.rng.random() < 0.6 else ():
            stop = other.num_computed // SIZE
            for group, table in enumerate(other.tables):
                hashes = other.stream_of(group, stop).hashes[getattr(table, "start", 0) // SIZE : stop]
                at_hand |= zip(hashes, table.blocks, strict=False)
        most, free = self.space.blocks_to_swap_in(sequence), self.allocator.num_free
        copies = self.space.swap_in(sequence, at_hand)
        assert free - self.allocator.num_free == len(copies) <= most
        self.happened["blocks shared"] += most - len(copies)
        if self.rng.random() < 0.3:
            self.happened["swapped out again"] += 1
            sequence.release_pages()
            return
        for block, host_block in copies:
            self.held[block] = self.on_host[host_block]
        self.space.forget(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def end(self) -> None:
        sequences = [*self.running, *self.waiting]
        if sequences:
            sequence = self.rng.choice(sequences)
            sequence.release_pages()
            self.space.forget(sequence)
            (self.running if sequence in self.running else self.waiting).remove(sequence)

    def check(self) -> None:
        for sequence in self.running:
            for group, table in enumerate(sequence.tables):
                first = getattr(table, "start", 0) // SIZE
                assert first * SIZE + table.num_tokens == sequence.num_computed
                for place, block in enumerate(table.blocks, first):
                    self.check_block(self.held[block], sequence, group, place)
        owed, full = Counter[int](), set[tuple[int, tuple[int, ...]]]()
        for sequence in self.waiting:
            assert sequence.swapped is not None
            for group, (first, host_blocks) in enumerate(sequence.swapped.tables):
                owed.update(host_blocks)
                for place, host_block in enumerate(host_blocks, first):
                    text = self.check_block(self.on_host[host_block], sequence, group, place)
                    full |= {(host_block, text)} if len(text) > (place + 1) * SIZE else set()
        counted = [self.space.allocator.ref_count(block) for block in range(self.num_blocks)]
        assert counted == [owed[block] for block in range(self.num_blocks)]
        assert len({block for block, _ in full}) == len({text for _, text in full}), (
            "the host has the same block twice"
        )
        assert self.space._hash_of.keys() == {block for block, _ in full}, (
            "the blocks that can be found are not the full blocks on the host"
        )
        assert {kept.block: digest for digest, kept in self.space._held.items()} == self.space._hash_of

    def check_block(
        self, held: tuple[int, ...], sequence: PagedSequence, group: int, place: int
    ) -> tuple[int, ...]:
        """Check that a block holds what the sequence has; returns it as far as the sequence needs it."""
        computed = sequence.num_computed if sequence.swapped is None else sequence.swapped.num_computed
        needed = (group, *sequence.tokens(0, min((place + 1) * SIZE, computed)))
        assert held[: len(needed)] == needed, "another's keys"
        return needed


@settings(max_examples=examples(120))
@given(
    windows=st.sampled_from([(None,), (4,), (None, 4), (None, 1, 7)]),
    num_blocks=st.sampled_from([4, 12, 300]),
    seed=st.integers(0, 2**32),
)
def test_a_swapped_in_sequence_has_its_contents_back_and_the_host_stored_them_only_once(
    windows: tuple[int | None, ...], num_blocks: int, seed: int
) -> None:
    host = Host(windows, num_blocks, random.Random(seed))
    for _ in range(60):
        host.rng.choice(
            [host.new, host.grow, host.grow, host.fork, host.swap_out, host.swap_out, host.swap_in, host.end]
        )()
        host.check()
    while host.running or host.waiting:
        host.end()
    host.check()
    assert host.space.allocator.num_free == num_blocks
    assert host.allocator.num_free == 500


def test_random_swap_events_cover_every_case() -> None:
    happened: Counter[str] = Counter()
    for seed in range(30):
        host = Host((None, 4), 12 if seed % 3 else 300, random.Random(seed))
        for _ in range(60):
            host.rng.choice(
                [host.new, host.grow, host.fork, host.swap_out, host.swap_out, host.swap_in, host.end]
            )()
        happened.update(host.happened)
    expected = {
        "blocks swapped out",
        "blocks found on the host",
        "blocks shared",
        "pending copies",
        "host full",
    }
    assert all(happened[name] > 20 for name in {*expected, "swapped out again"}), (
        f"hardly tests anything: {happened}"
    )


def on_their_own(tokens: Sequence[int], allocator: BlockAllocator) -> PagedSequence:
    """A sequence that has computed all its tokens, in blocks of 3."""
    layout = PageLayout((LayerGroup((0,)),), SIZE, 8)
    sequence = PagedSequence(
        seq_id="x",
        request_id="x",
        prompt=tuple(tokens),
        params=SamplingParams(),
        seed=0,
        max_len=99,
        tables=layout.tables(allocator),
        streams=layout.streams(""),
    )
    sequence.append_tokens(len(tokens))
    sequence.num_computed = len(tokens)
    return sequence


def test_an_equal_hash_without_equal_tokens_is_not_a_match() -> None:
    """Two texts have the same hashes, and both can be looked for: each is copied, and comes back."""
    allocator, space = BlockAllocator(20), SwapSpace(20, SIZE)
    first, second = on_their_own(range(6), allocator), on_their_own(range(10, 16), allocator)
    second.stream_of(0, 2).hashes[:] = first.stream_of(0, 2).hashes
    for sequence in (first, second):
        assert len(space.swap_out(sequence) or ()) == 2
    at_hand = dict(zip(first.stream.hashes, first.table.blocks, strict=True))
    second.release_pages()
    assert len(space.swap_in(second, at_hand)) == 2, "the other text's blocks do not help"
    space.forget(first)
    space.forget(second)
    assert space.allocator.num_free == 20
    assert not space._held


def test_the_same_tokens_after_another_parent_are_not_a_match() -> None:
    """Only the first blocks differ; the second has the right hash by forgery, and a wrong past."""
    allocator, space = BlockAllocator(20), SwapSpace(20, SIZE)
    first, second = on_their_own(range(6), allocator), on_their_own((7, 7, 7, 3, 4, 5), allocator)
    second.stream_of(0, 2).hashes[1] = first.stream_of(0, 2).hashes[1]
    assert [len(space.swap_out(sequence) or ()) for sequence in (first, second)] == [2, 2]


# ---- pools that copy from each other ----


def numbered(num_blocks: int, layers: int, dtype: mx.Dtype, offset: float) -> KVPool:
    """A pool whose block b holds `offset` + 10 b + layer everywhere as keys, and a half more as values."""
    pool = KVPool(num_blocks, SIZE, num_heads=2, head_dim=4, num_layers=layers, dtype=dtype)
    for layer in range(layers):
        numbers = (offset + 10 * mx.arange(num_blocks) + layer)[:, None, None, None]
        keys = mx.broadcast_to(numbers, (num_blocks, 2, SIZE, 4)).astype(dtype)
        pool.put_back(layer, keys + 0, keys + 0.5)
    pool.evaluate()
    return pool


def numbers(pool: KVPool, layer: int) -> list[float]:
    """The number that each block of such a pool holds, the same everywhere, values a half more."""
    keys, values = (part.astype(mx.float32) for part in pool.read_blocks(layer, range(pool.num_blocks)))
    assert mx.all(keys == keys[:, :1, :1, :1]).item()
    assert mx.array_equal(values, keys + 0.5).item()
    return [float(number) for number in keys[:, 0, 0, 0]]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_blocks_are_copied_from_one_pool_to_another(dtype: mx.Dtype, layers: int) -> None:
    """Copies are of all layers, keys and values, and of no other block; a source may serve twice."""
    fine = 2**-16 if dtype == mx.float32 else 0  # no shorter type could hold it
    pool, host = numbered(6, layers, dtype, fine), numbered(4, layers, dtype, 60 + fine)
    host.fill_from(pool, [(5, 0), (2, 3)])
    for layer in range(layers):
        here = layer + fine
        assert numbers(host, layer) == [50 + here, 70 + here, 80 + here, 20 + here]
    pool.fill_from(host, [(3, 1), (0, 4), (3, 5)])
    for layer in range(layers):
        here = layer + fine
        assert numbers(pool, layer) == [here, 20 + here, 20 + here, 30 + here, 50 + here, 20 + here]
        assert numbers(host, layer) == [50 + here, 70 + here, 80 + here, 20 + here]
        assert {array.dtype for array in (*pool.lend(layer), *host.lend(layer))} == {dtype}


def test_copies_within_one_pool_read_everything_before_writing() -> None:
    pool = numbered(4, 2, mx.float32, 0)
    pool.fill_from(pool, [(0, 1), (1, 0), (2, 3)])
    assert [numbers(pool, layer) for layer in range(2)] == [[10, 0, 20, 20], [11, 1, 21, 21]]


def test_an_empty_list_of_copies_does_nothing() -> None:
    pool, host = numbered(3, 1, mx.float32, 0), numbered(3, 1, mx.float32, 60)
    before = pool.lend(0)
    pool.fill_from(host, [])
    assert pool.lend(0)[0] is before[0]


def test_unevaluated_writes_are_copied_too() -> None:
    """A write that is in the graph and not computed is part of the source's contents."""
    pool, host = numbered(3, 1, mx.float32, 0), numbered(3, 1, mx.float32, 60)
    keys, values = pool.lend(0)
    pool.put_back(0, keys + 1, values + 1)
    host.fill_from(pool, [(2, 0)])
    assert numbers(host, 0) == [21, 70, 80]


@pytest.mark.parametrize("read_pool", ["target", "source"])
def test_a_lazy_read_from_before_a_copy_sees_the_old_contents(read_pool: str) -> None:
    """No caller should hold the arrays; one that does pays with a copy, and reads the old contents."""
    pool, host = numbered(3, 2, mx.float32, 0), numbered(3, 2, mx.float32, 60)
    reader = [2 * part for part in (host if read_pool == "target" else pool).lend(1)]
    expected = [2.0 * number for number in ([61, 71, 81] if read_pool == "target" else [1, 11, 21])]
    host.fill_from(pool, [(2, 0), (1, 1)])
    pool.fill_from(host, [(2, 0), (1, 2)])
    assert reader[0][:, 0, 0, 0].tolist() == expected
    assert reader[1][:, 0, 0, 0].tolist() == [number + 1 for number in expected]
    assert [numbers(host, layer) for layer in range(2)] == [[20, 10, 80], [21, 11, 81]]
    assert [numbers(pool, layer) for layer in range(2)] == [[80, 10, 10], [81, 11, 11]]


def test_both_pools_are_still_written_in_place_after_a_copy() -> None:
    """A copy of a block takes the memory of a few blocks, and so does every later write, in either pool."""
    pools = [KVPool(2000, 16, num_heads=2, head_dim=32, num_layers=2) for _ in range(2)]
    one_array = pools[0].nbytes // 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for round_number in range(3):
        pools[0].fill_from(pools[1], [(round_number, 5), (7, round_number)])
        pools[1].fill_from(pools[0], [(round_number, 9)])
        for pool in pools:
            ones = mx.ones((2, 2, 32))
            pool.write(1, mx.array([round_number, 40 + round_number]), ones, ones)
    assert mx.get_peak_memory() - before < one_array / 4, "an array of a pool was copied"


class Moves(Plan[PagedSequence]):
    """A plan with the given copies; nothing is computed."""

    copies: list[BlockCopy] = []  # type: ignore[assignment,misc]  # noqa: RUF012


def test_swap_out_comes_before_swap_in_and_swap_in_before_copies() -> None:
    """By hand: block 0 goes out to host block 2, gets other contents from host block 1, and is copied to 3.

    Any other order would swap out the new contents, or copy the old ones.
    """
    manager = PagedBatchManager(
        4, SIZE, 2, model=tiny_model(), policies=Policies(NewestFirst(), swap_blocks=3)
    )
    assert manager.pool is not None
    assert manager._swap_pool is not None
    for pool, offset in ((manager.pool, 0), (manager._swap_pool, 60)):
        for layer in range(2):
            keys, values = pool.lend(layer)
            filled = offset + 10 * mx.arange(pool.num_blocks)[:, None, None, None] + layer
            pool.put_back(
                layer, (0 * keys + filled).astype(pool.dtype), (0 * values + filled + 0.5).astype(pool.dtype)
            )
        pool.evaluate()
    plan = Moves(swapped_out=[(0, 2)], swapped_in={0: 1, 2: 0})
    plan.copies = [BlockCopy(0, 3, SIZE)]
    assert manager.run_plan(plan) is None
    for layer in range(2):
        assert numbers(manager.pool, layer) == [70 + layer, 10 + layer, 60 + layer, 70 + layer]
        assert numbers(manager._swap_pool, layer) == [60 + layer, 70 + layer, 0 + layer]
