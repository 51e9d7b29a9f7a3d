"""Day 3.2, tasks 11 to 13: compaction moves the blocks in use to the front of the pool."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.compaction import compact_memory, compact_pages, moves_to_front
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable

from common.blocks import counts, filled
from common.examples import quick
from common.plain_pool import PlainPool

# Task 11: moves_to_front


def held(num_blocks: int, *blocks: int) -> BlockAllocator:
    """A pool in which exactly these blocks are allocated."""
    allocator = BlockAllocator(num_blocks)
    for block in [allocator.allocate() for _ in range(num_blocks)]:
        if block not in blocks:
            allocator.free(block)
    return allocator


def test_task_11_only_blocks_past_the_new_end_move_and_they_fill_the_free_ids_before_it() -> None:
    """Oracle: by hand: 4 blocks are in use, so 5 and 7 are past the new end, and 1 and 3 are free."""
    moved = moves_to_front(held(8, 0, 2, 5, 7))
    assert (set(moved), set(moved.values())) == ({5, 7}, {1, 3})


@pytest.mark.parametrize(
    "blocks", [(), (0, 1, 2), (0, 1, 2, 3, 4, 5)], ids=["empty_pool", "all_at_the_front", "full_pool"]
)
def test_task_11_nothing_moves_if_all_blocks_are_at_the_front(blocks: tuple[int, ...]) -> None:
    """Oracle: by hand."""
    assert moves_to_front(held(6, *blocks)) == {}


def test_task_11_planning_the_moves_changes_nothing() -> None:
    """Oracle: by hand: a shared block is one block; the allocator does not change."""
    allocator = held(6, 3, 4)
    allocator.add_ref(4)
    assert set(moves_to_front(allocator).values()) == {0, 1}
    assert counts(allocator) == [0, 0, 0, 1, 2, 0]
    assert allocator.num_free == 4


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_task_11_the_number_of_moves_is_minimal(in_use: list[bool]) -> None:
    """Oracle: counting: each block in use past the new end moves to a different id before it."""
    blocks = [block for block, used in enumerate(in_use) if used]
    moved = moves_to_front(held(len(in_use), *blocks))
    assert set(moved) == {block for block in blocks if block >= len(blocks)}
    assert {moved.get(block, block) for block in blocks} == set(range(len(blocks)))


# Task 12: compact_pages


@dataclass
class CachedBlocks:
    """A holder of blocks that is not a table, such as a prefix cache."""

    blocks: list[int]
    block_size: int = 4

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Use the new ids of moved blocks."""
        self.blocks = [moved.get(block, block) for block in self.blocks]


@dataclass
class Texts:
    """Tables and their tokens, on a pool of plain values."""

    allocator: BlockAllocator
    block_size: int = 4
    pages: PlainPool = field(default_factory=PlainPool)
    sequences: list[tuple[BlockTable, list[int]]] = field(default_factory=list)
    cached: list[tuple[CachedBlocks, list[list[object]]]] = field(default_factory=list)
    fresh: Iterator[int] = field(default_factory=count)

    @property
    def holders(self) -> list[BlockTable | CachedBlocks]:
        """Everything that holds a block."""
        return [*(table for table, _ in self.sequences), *(cached for cached, _ in self.cached)]

    def table(self, num_tokens: int) -> BlockTable:
        """A new table with `num_tokens` tokens."""
        self.sequences.append((BlockTable(self.allocator, self.block_size), []))
        self.append(len(self.sequences) - 1, num_tokens)
        return self.sequences[-1][0]

    def fork(self, which: int) -> None:
        """Fork a table."""
        table, text = self.sequences[which]
        self.sequences.append((table.fork(), list(text)))

    def append(self, which: int, num_tokens: int) -> None:
        """Append tokens to a table."""
        table, text = self.sequences[which]
        tokens = [next(self.fresh) for _ in range(num_tokens)]
        self.pages.copy(table.append_tokens(num_tokens), self.block_size)
        self.pages.write(table, tokens)
        text += tokens

    def release(self, which: int) -> None:
        """Release a table."""
        self.sequences.pop(which)[0].release()

    def keep(self, which: int) -> None:
        """Let a cache hold the full blocks of a table."""
        table, text = self.sequences[which]
        cached = CachedBlocks(table.blocks[: len(text) // self.block_size], self.block_size)
        for block in cached.blocks:
            self.allocator.add_ref(block)
        self.cached.append((cached, [self.slots_of(block) for block in cached.blocks]))

    def slots_of(self, block: int) -> list[object]:
        """The values in a block's slots."""
        return [self.pages.held.get(block * self.block_size + i) for i in range(self.block_size)]

    def compact(self) -> list[BlockCopy]:
        """Compact, make the copies, and check that every holder reads what it wrote."""
        copies = list(compact_pages(self.allocator, self.holders))
        self.pages.copy(copies, self.block_size)
        self.check()
        return copies

    def check(self) -> None:
        """Assert that every holder reads its own tokens and that every reference has a holder."""
        for table, text in self.sequences:
            assert self.pages.read(table) == text, "a table reads the tokens of another"
        for cached, blocks in self.cached:
            assert [self.slots_of(block) for block in cached.blocks] == blocks, (
                "a cached block holds other tokens than before"
            )
        held = Counter(block for holder in self.holders for block in holder.blocks)
        assert self.counts == [held[block] for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free == self.counts.count(0)

    @property
    def counts(self) -> list[int]:
        """The reference count of each block."""
        return [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]

    @property
    def state(self) -> tuple[object, ...]:
        """The complete state: reference counts, free blocks and the blocks of each holder."""
        return self.counts, self.allocator.num_free, [list(holder.blocks) for holder in self.holders]


def test_task_12_blocks_in_use_move_to_the_front() -> None:
    """Oracle: the tokens; by hand: 2 of the 5 blocks in use are past the new end, and only these move."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (4, 7, 4, 9):
        texts.table(num_tokens)
    texts.release(1)
    past_end = [block for block, holders in enumerate(texts.counts) if holders and block >= 5]
    copies = texts.compact()
    assert [holders > 0 for holders in texts.counts] == [True] * 5 + [False] * 4
    assert sorted(copy.src for copy in copies) == past_end
    assert all(copy.dst < 5 for copy in copies)
    assert texts.allocator.num_free == 4


def test_task_12_after_compaction_the_end_of_the_pool_can_be_removed() -> None:
    """Oracle: by hand: the four free blocks are the last four, so the pool can shrink to five."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (4, 7, 4, 9):
        texts.table(num_tokens)
    texts.release(1)
    texts.compact()
    assert sorted(texts.allocator.allocate() for _ in range(4)) == [5, 6, 7, 8]
    for block in (5, 6, 7, 8):
        texts.allocator.free(block)
    texts.allocator.resize(5)
    texts.check()


def test_task_12_a_compact_pool_does_not_change() -> None:
    """Oracle: by hand: nothing is copied, the first time or again."""
    texts = Texts(BlockAllocator(2))
    texts.table(5)
    texts.fork(0)
    before = texts.state
    assert texts.compact() == []
    assert texts.state == before
    assert list(compact_pages(BlockAllocator(3), [])) == []


def test_task_12_a_shared_block_moves_once_and_all_holders_follow() -> None:
    """Oracle: the tokens; by hand: two tables and a cache hold the second sequence."""
    texts = Texts(BlockAllocator(8))
    texts.table(12)
    texts.table(8)
    texts.fork(1)
    texts.keep(1)
    texts.release(0)
    assert len(texts.compact()) == 2
    assert texts.counts == [3, 3, 0, 0, 0, 0, 0, 0]


def test_task_12_a_cached_block_that_no_table_holds_moves_too() -> None:
    """Oracle: the block's content. A block is in use while any holder has it."""
    texts = Texts(BlockAllocator(8))
    for num_tokens in (8, 9):
        texts.table(num_tokens)
    texts.keep(1)
    texts.release(1)
    texts.release(0)
    assert len(texts.compact()) == 2
    assert texts.counts == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "missing",
    [0, 1, 2, 3],
    ids=["without_the_forked_table", "without_the_cached_table", "without_the_fork", "without_the_cache"],
)
def test_task_12_a_missing_holder_is_rejected(missing: int) -> None:
    """Oracle: the docstring: ValueError without a table, one of two forks, or the cache; nothing changes."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (8, 7, 8):
        texts.table(num_tokens)
    texts.fork(1)
    texts.keep(2)
    texts.release(0)
    before, holders = texts.state, texts.holders
    del holders[missing]
    with pytest.raises(ValueError):
        compact_pages(texts.allocator, holders)
    assert texts.state == before


def test_task_12_holders_may_be_an_iterator() -> None:
    """Oracle: the tokens. Common mistake: iterating over the holders twice."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (8, 7):
        texts.table(num_tokens)
    texts.release(0)
    texts.pages.copy(compact_pages(texts.allocator, iter(texts.holders)), 4)
    texts.check()


ACTIONS = st.sampled_from(["table", "table", "append", "fork", "release", "release", "keep"])


@settings(quick, max_examples=120)
@given(st.integers(1, 4), st.lists(st.tuples(ACTIONS, st.integers(0, 9)), max_size=20))
def test_task_12_every_holder_reads_its_own_tokens_afterwards(
    block_size: int, actions: list[tuple[str, int]]
) -> None:
    """Oracle: the tokens, in a pool of plain values. Only blocks past the new end move."""
    texts = Texts(BlockAllocator(60), block_size)
    for action, number in actions:
        if action == "table" or not texts.sequences:
            texts.table(number)
        elif action == "append":
            texts.append(number % len(texts.sequences), 3)
        else:
            getattr(texts, action)(number % len(texts.sequences))
        if texts.allocator.num_free < 10:
            break
    before, in_use = texts.counts, 60 - texts.allocator.num_free
    copies = texts.compact()
    assert [holders > 0 for holders in texts.counts] == [True] * in_use + [False] * (60 - in_use)
    assert sorted(texts.counts) == sorted(before)
    assert len(copies) == sum(holders > 0 for holders in before[in_use:])
    assert texts.compact() == []


# Task 13: compact_memory


def stored(pool: KVPool, tables: Sequence[BlockTable]) -> list[np.ndarray]:
    """The keys and values of each table's tokens in every layer of a pool."""
    return [
        np.array(mx.stack(pool.read(layer, mx.array(table.slots(0, table.num_tokens), mx.int32))))
        for table in tables
        for layer in range(2)
    ]


def test_task_13_keys_and_values_move_with_their_blocks() -> None:
    """Oracle: what the tables read before, in both layers; by hand: 5 of 12 blocks are used."""
    allocator, pool = BlockAllocator(12), KVPool(12, 4, 2, 4, num_layers=2, dtype=mx.float32)
    tables = [filled(allocator, num_tokens) for num_tokens in (9, 4, 7, 5)]
    for number, table in enumerate(tables):
        slots = mx.array(table.slots(0, table.num_tokens), mx.int32)
        for layer in range(2):
            tokens = mx.random.normal((2, slots.size, 2, 4), key=mx.random.key(2 * number + layer))
            pool.write(layer, slots, tokens[0], tokens[1])
    tables.pop(0).release()
    tables.append(tables[1].fork())
    expected = stored(pool, tables)
    assert compact_memory(allocator, tables, pool) == 7
    assert {block for table in tables for block in table.blocks} == set(range(5))
    for found, want in zip(stored(pool, tables), expected, strict=True):
        np.testing.assert_array_equal(
            found, want, err_msg="a table reads different keys or values than before"
        )
    allocator.resize(5)
    pool.resize(5)
    for found, want in zip(stored(pool, tables), expected, strict=True):
        np.testing.assert_array_equal(
            found, want, err_msg="a table reads different keys or values than before"
        )


def test_task_13_without_a_pool_only_the_ids_are_compacted() -> None:
    """Oracle: by hand: the number of free blocks at the end, not the number of moves."""
    allocator = BlockAllocator(6)
    first, second = filled(allocator, 4), filled(allocator, 8)
    assert compact_memory(allocator, [first, second]) == 3
    first.release()
    assert compact_memory(allocator, iter([second])) == 4
    assert sorted(second.blocks) == [0, 1]
    second.release()
    assert compact_memory(allocator, []) == 6


def test_task_13_a_missing_holder_is_rejected() -> None:
    """Oracle: the docstring: nothing is copied either."""
    allocator, pool = BlockAllocator(6), KVPool(6, 4, 1, 2)
    tables = [filled(allocator, num_tokens) for num_tokens in (4, 8)]
    tables.pop(0).release()
    with pytest.raises(ValueError):
        compact_memory(allocator, [], pool)
    assert allocator.num_free == 4
