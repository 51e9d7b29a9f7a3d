"""Compaction: blocks move and no sequence notices; the allocator and the pool change their size.

The oracle for the contents of a block is a pool of plain values: a slot remembers which token was written to
it.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.compaction import BlockHolder
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import OutOfBlocksError, UnknownBlockError
from tiny_llm.paged_attention import BlockCopy
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks
from tiny_llm.sampling_params import SamplingParams

from promises import Watched, check_all_returned, check_pages, policies
from tiny_llm import BlockAllocator, BlockTable, KVPool, PagedBatchManager, compact_memory, compact_pages
from tiny_model import EOS, examples, random_prompt, tiny_model


class Workload:
    """Tables, forks and a prefix cache on one allocator, and the contents of each of their slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.block_size = block_size
        self.cache = PrefixCache(self.allocator, block_size)
        self.texts: list[tuple[BlockTable, list[int]]] = []
        self.kept: list[TokenBlocks] = []
        self.held: dict[int, int] = {}
        self.fresh = count()

    @property
    def tables(self) -> list[BlockTable]:
        return [table for table, _ in self.texts]

    @property
    def holders(self) -> list[BlockHolder]:
        return [*self.tables, self.cache]

    def table(self, num_tokens: int) -> BlockTable:
        table = BlockTable(self.allocator, self.block_size)
        self.texts.append((table, []))
        self.append(len(self.texts) - 1, num_tokens)
        return table

    def fork(self, which: int) -> BlockTable:
        table, text = self.texts[which]
        self.texts.append((table.fork(), list(text)))
        return self.tables[-1]

    def append(self, which: int, num_tokens: int) -> None:
        """Extend a table, with its copies and writes."""
        table, text = self.texts[which]
        if table.blocks_to_append(num_tokens) > self.allocator.num_free:
            return
        copies = table.append_tokens(num_tokens)
        self.cache.released([copy.src for copy in copies])
        self.perform(copies)
        new = [next(self.fresh) for _ in range(num_tokens)]
        self.held |= dict(zip(table.slots(len(text), len(text) + num_tokens), new, strict=True))
        text += new

    def release(self, which: int) -> None:
        table, _ = self.texts.pop(which)
        blocks = list(table.blocks)
        table.release()
        self.cache.released(blocks)

    def keep(self, which: int) -> None:
        """Add all full blocks of a table to the cache."""
        table, text = self.texts[which]
        stream = TokenBlocks(self.block_size)
        stream.extend(text)
        self.cache.keep(table, stream, 0, len(stream))
        self.kept.append(stream)

    def perform(self, copies: Seq[BlockCopy]) -> None:
        """Make copies: all sources are read before any target is written."""
        assert len({copy.dst for copy in copies}) == len(copies), "two copies to one block"
        size = self.block_size
        read = [[self.held.get(src * size + i) for i in range(length)] for src, _, length in copies]
        for (_, dst, _), values in zip(copies, read, strict=True):
            self.held |= {dst * size + i: value for i, value in enumerate(values) if value is not None}

    def check(self) -> None:
        """Check that every table reads its own tokens, and that every reference has a holder."""
        for table, text in self.texts:
            assert [self.held.get(slot) for slot in table.slots(0, len(text))] == text, "another's token"
        for stream in self.kept:
            for block, tokens in zip(self.cache.match(stream, 0, len(stream)), stream.tokens, strict=False):
                at = block * self.block_size
                assert tuple(self.held.get(at + i) for i in range(self.block_size)) == tokens
        held = Counter(block for holder in self.holders for block in holder.blocks)
        assert self.counts == [held[block] for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free == self.counts.count(0)

    @property
    def counts(self) -> list[int]:
        return [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]

    @property
    def state(self) -> object:
        return self.counts, self.allocator.num_free, [list(holder.blocks) for holder in self.holders]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Tables that were created, extended, forked, cached and released."""
    workload = Workload(draw(st.integers(1, 24)), draw(st.integers(1, 4)))
    actions = st.sampled_from(["table", "table", "append", "fork", "release", "release", "keep", "evict"])
    for action in draw(st.lists(actions, max_size=24)):
        if action == "table" or not workload.texts:
            workload.table(0)
            workload.append(len(workload.texts) - 1, draw(st.integers(0, 9)))
        elif action == "evict":
            workload.cache.evict(draw(st.integers(0, 3)))
        else:
            which = draw(st.integers(0, len(workload.texts) - 1))
            if action == "append":
                workload.append(which, draw(st.integers(0, 5)))
            else:
                getattr(workload, action)(which)
    return workload


@settings(max_examples=examples(500))
@given(workloads(), st.randoms(use_true_random=False))
def test_blocks_move_and_every_table_reads_its_own_tokens(workload: Workload, random: object) -> None:
    before, in_use = workload.counts, workload.allocator.num_blocks - workload.allocator.num_free
    moved = sum(holders > 0 for holders in before[in_use:])
    holders = workload.holders
    random.shuffle(holders)  # type: ignore[attr-defined]
    copies = compact_pages(workload.allocator, iter(holders))
    num_free = workload.allocator.num_free
    assert [holders > 0 for holders in workload.counts] == [True] * in_use + [False] * num_free
    assert sorted(workload.counts) == sorted(before), "a shared block is still shared by the same holders"
    assert len(copies) == moved, "only blocks after the new end move"
    workload.perform(copies)
    workload.check()
    assert compact_pages(workload.allocator, workload.holders) == [], "a second compaction does nothing"
    workload.check()
    for _ in range(workload.allocator.num_free):
        workload.allocator.allocate()
    with pytest.raises(OutOfBlocksError):
        workload.allocator.allocate()


def test_holes_are_filled_from_the_end() -> None:
    workload = Workload(8, 2)
    for tokens in (2, 3, 1, 4):
        workload.table(tokens)
    workload.release(1)
    last = workload.tables[-1]
    assert workload.allocator.num_free == 4
    before = list(last.blocks)
    copies = compact_pages(workload.allocator, workload.holders)
    assert {copy.src for copy in copies} == set(before) - {0, 1, 2, 3}
    assert {copy.dst for copy in copies} <= {0, 1, 2, 3}
    assert all(copy.length == 2 for copy in copies), "whole blocks, and shared ones for all their holders"
    workload.perform(copies)
    workload.check()


def test_compact_blocks_do_not_move() -> None:
    workload = Workload(6, 2)
    workload.table(5)
    workload.fork(0)
    before = workload.state
    assert compact_pages(workload.allocator, workload.holders) == []
    assert workload.state == before
    assert compact_pages(BlockAllocator(4), []) == []


def test_a_block_with_many_holders_moves_once() -> None:
    workload = Workload(8, 2)
    workload.table(6)
    workload.table(4)
    workload.fork(1)
    workload.keep(1)
    workload.release(0)
    copies = compact_pages(workload.allocator, workload.holders)
    assert len(copies) == 2
    workload.perform(copies)
    workload.check()
    assert workload.counts == [3, 3, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_nothing_moves_if_a_holder_is_left_out_of_the_call(missing: int) -> None:
    """The holder left out is a table, one of two forks, or the prefix cache."""
    workload = Workload(9, 2)
    for tokens in (4, 3, 4):
        workload.table(tokens)
    workload.fork(1)
    workload.keep(2)
    workload.release(0)
    before, holders = workload.state, workload.holders
    del holders[missing]
    with pytest.raises(ValueError, match=r"block \d has \d holders, but \d were passed"):
        compact_pages(workload.allocator, holders)
    assert workload.state == before
    workload.check()


def test_a_holder_passed_twice_is_rejected() -> None:
    workload = Workload(4, 2)
    workload.table(3)
    before = workload.state
    with pytest.raises(ValueError, match="block 0 has 1 holders, but 2 were passed"):
        compact_pages(workload.allocator, [*workload.tables, *workload.tables])
    assert workload.state == before


def written(pool: KVPool, tables: Seq[BlockTable]) -> None:
    """Write each table's tokens: token i of table t is t + i / 100, and its value the negative of that."""
    for number, table in enumerate(tables):
        slots = mx.array(table.slots(0, table.num_tokens), mx.int32)
        keys = mx.broadcast_to((number + mx.arange(len(slots)) / 100)[:, None, None], (len(slots), 2, 4))
        for layer in range(2):
            pool.write(layer, slots, keys * (layer + 1), -keys * (layer + 1))


def read(pool: KVPool, tables: Seq[BlockTable]) -> list[np.ndarray]:
    """Keys and values of all layers, table by table."""
    return [
        np.array(mx.stack(pool.read(layer, mx.array(table.slots(0, table.num_tokens), mx.int32))))
        for table in tables
        for layer in range(2)
    ]


def test_compaction_moves_the_contents_of_blocks_in_the_pool() -> None:
    allocator, pool = BlockAllocator(12), KVPool(12, 4, 2, 4, num_layers=2)
    tables = [BlockTable(allocator, 4) for _ in range(4)]
    for table, tokens in zip(tables, (9, 4, 7, 5), strict=True):
        table.append_tokens(tokens)
    written(pool, tables)
    fork, first = tables[3].fork(), tables.pop(0)
    first.release()
    expected = read(pool, tables)
    assert compact_memory(allocator, [*tables, fork], pool) == 12 - 5
    assert {block for table in tables for block in table.blocks} == set(range(5))
    assert fork.blocks == tables[-1].blocks
    for found, want in zip(read(pool, tables), expected, strict=True):
        assert np.array_equal(found, want)
    allocator.resize(5)
    pool.resize(5)
    for found, want in zip(read(pool, tables), expected, strict=True):
        assert np.array_equal(found, want)


def test_without_a_pool_only_tables_and_counts_are_compacted() -> None:
    allocator = BlockAllocator(5)
    first, second = BlockTable(allocator, 2), BlockTable(allocator, 2)
    first.append_tokens(2)
    second.append_tokens(4)
    first.release()
    assert compact_memory(allocator, [second]) == 3
    assert sorted(second.blocks) == [0, 1]
    second.release()
    assert compact_memory(allocator, []) == 5


# ---- other sizes ----


def test_an_allocator_grows_by_free_blocks() -> None:
    allocator = BlockAllocator(2)
    held = [allocator.allocate(), allocator.allocate()]
    allocator.resize(5)
    assert (allocator.num_blocks, allocator.num_free) == (5, 3)
    assert [allocator.ref_count(block) for block in held] == [1, 1]
    assert {allocator.allocate() for _ in range(3)} == {2, 3, 4}


def test_an_allocator_shrinks_to_the_blocks_in_use() -> None:
    allocator = BlockAllocator(6)
    held = [allocator.allocate() for _ in range(6)]
    for block in held[2:]:
        allocator.free(block)
    allocator.resize(2)
    assert (allocator.num_blocks, allocator.num_free) == (2, 0)
    with pytest.raises(UnknownBlockError):
        allocator.ref_count(2)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate()
    allocator.resize(2)
    allocator.resize(4)
    assert {allocator.allocate(), allocator.allocate()} == {2, 3}


@pytest.mark.parametrize("num_blocks", [0, -1, 2, 3])
def test_a_held_block_cannot_be_cut_off(num_blocks: int) -> None:
    """Blocks 1 and 3 are held; blocks 0 and 2, before and between them, are free."""
    allocator = BlockAllocator(5)
    for _ in range(5):
        allocator.allocate()
    for block in (0, 2, 4):
        allocator.free(block)
    with pytest.raises(ValueError, match=f"5 blocks cannot be resized to {num_blocks}:"):
        allocator.resize(num_blocks)
    assert (allocator.num_blocks, allocator.num_free) == (5, 3)
    allocator.resize(4)
    assert {allocator.allocate(), allocator.allocate()} == {0, 2}


def test_blocks_keep_all_their_holders_under_new_ids() -> None:
    allocator = BlockAllocator(5)
    for _ in range(5):
        allocator.allocate()
    allocator.add_ref(4)
    for block in (0, 2):
        allocator.free(block)
    allocator.relocate({4: 0, 3: 2})
    assert [allocator.ref_count(block) for block in range(5)] == [2, 1, 1, 0, 0]
    assert {allocator.allocate(), allocator.allocate()} == {3, 4}


@pytest.mark.parametrize("sizes", [(9, 4, 4, 1), (3, 12)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_a_pool_keeps_its_contents_when_it_is_resized(sizes: tuple[int, ...], dtype: mx.Dtype) -> None:
    pool = KVPool(3, 4, 2, 4, num_layers=2, dtype=dtype)
    per_block = pool.nbytes // 3
    table = BlockTable(BlockAllocator(1), 4)
    table.append_tokens(4)
    written(pool, [table])
    expected = read(pool, [table])
    for size in sizes:
        pool.resize(size)
        assert (pool.num_blocks, pool.nbytes) == (size, size * per_block)
        assert [array.shape[0] for array in pool.lend(1)] == [size, size]
        assert {array.dtype for array in pool.lend(0)} == {dtype}
        for found, want in zip(read(pool, [table]), expected, strict=True):
            assert np.array_equal(found, want)


# ---- a pool that grows ----


def served(manager: PagedBatchManager, lengths: Seq[int]) -> dict[str, list[int]]:
    """The tokens of requests of several lengths, by sequence id."""
    engine, found = EngineCore(manager, (EOS,)), {}
    for seed, length in enumerate(lengths):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        engine.add_request(str(seed), random_prompt(6, seed), params)
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.seq_id, []).append(output.token)
        check_pages(manager)
    return found


@pytest.mark.parametrize("preempts", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_growing_pool_gives_the_same_answers_and_releases_memory(preempts: bool, prefix: bool) -> None:
    """Four requests need many blocks, then only the long one runs on few; at the end one block is left."""
    lengths = [8, 40, 9, 10]
    fixed = PagedBatchManager(64, 2, 4, model=tiny_model(), max_model_len=64)
    growing = Watched(
        64, 2, 4, model=tiny_model(), max_model_len=64, policies=policies(preempts, prefix), min_pages=1
    )
    assert growing.pool is not None
    assert (growing.allocator.num_blocks, growing.pool.num_blocks) == (1, 1)
    assert (growing.capacity.num_blocks, growing.capacity.num_free) == (64, 64)
    per_block, sizes = growing.pool.nbytes, []

    engine, found = EngineCore(growing, (EOS,)), {}
    for seed, length in enumerate(lengths):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        engine.add_request(str(seed), random_prompt(6, seed), params)
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.seq_id, []).append(output.token)
        check_pages(growing)
        assert growing.pool.num_blocks == growing.allocator.num_blocks
        assert growing.capacity.nbytes == growing.pool.num_blocks * per_block
        in_use = growing.allocator.num_blocks - growing.allocator.num_free - growing.prefix.num_idle
        assert growing.capacity.num_free + growing.capacity.num_cached + in_use == 64
        sizes.append(growing.allocator.num_blocks)
    assert found == served(fixed, lengths)
    most = sizes.index(max(sizes))
    assert growing.happened["pool growths"] > 2
    assert min(sizes[most:]) <= max(sizes) // 2, f"no memory was released while requests ran: {sizes}"
    for _ in range(8):
        growing.process_batch()
    assert growing.allocator.num_blocks == 1, "an idle pool releases all that it had grown by"
    assert growing.pool.nbytes == per_block
    check_all_returned(growing)


def test_a_pool_does_not_shrink_below_its_initial_size() -> None:
    manager = PagedBatchManager(16, 2, 2, model=tiny_model(), min_pages=4)
    served(manager, [12, 3])
    for _ in range(8):
        manager.process_batch()
    assert manager.allocator.num_blocks == 4


def test_a_pool_of_fixed_size_keeps_its_size() -> None:
    manager = PagedBatchManager(16, 2, 2, model=tiny_model())
    served(manager, [12, 3])
    manager.process_batch()
    assert manager.allocator.num_blocks == 16


def test_compaction_between_two_steps_changes_no_answer() -> None:
    prompts = {name: random_prompt(5 + i, i) for i, name in enumerate("abcd")}
    answers = []
    for compacts in (False, True):
        manager = PagedBatchManager(40, 2, 4, model=tiny_model(), policies=policies(True, prefix=True))
        engine, found, moved = EngineCore(manager, (EOS,)), {}, 0
        for name, prompt in prompts.items():
            n = 2 if name == "b" else 1
            params = SamplingParams(max_tokens=3 + 4 * len(prompt), n=n, seed=1, ignore_eos=True)
            engine.add_request(name, prompt, params)
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.seq_id, []).append(output.token)
            if compacts:
                held = [list(sequence.table.blocks) for sequence in manager.running]
                assert manager.compact() == manager.allocator.num_free
                moved += held != [list(sequence.table.blocks) for sequence in manager.running]
                check_pages(manager)
        assert bool(moved) == compacts
        answers.append(found)
    assert answers[0] == answers[1]
