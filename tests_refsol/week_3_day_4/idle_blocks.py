"""Day 3.4, tasks 5 to 8: idle cached blocks, their eviction, and the deduplication of equal blocks."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.prefix_cache import PrefixCache

from common.blocks import counts, filled, holders
from common.examples import quick
from week_3_day_4.blocks_by_content import cached, forged, make_cache, stream_of

# Task 5: PrefixCache.released


def release_table(cache: PrefixCache, table: BlockTable) -> None:
    """Release a table and call `released`, as the engine does when a sequence finishes."""
    blocks = list(table.blocks)
    table.release()
    cache.released(blocks)


def found(cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> list[int]:
    """The cached blocks of these tokens, up to the first that is missing."""
    stream = stream_of(tokens, cache.block_size, salt)
    return list(cache.match(stream, 0, len(stream)))


def shared(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int]) -> BlockTable:
    """A new table that shares the cached blocks of these tokens."""
    table = BlockTable(allocator, cache.block_size)
    for block in found(cache, tokens):
        cache.share(table, block, cache.block_size)
    return table


def test_task_5_cached_blocks_are_idle_after_their_table_is_released() -> None:
    """Oracle: by hand: the half-full third block is not cached, so it is free."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(10))
    assert cache.num_idle == 0
    release_table(cache, table)
    assert cache.num_idle == 2
    assert allocator.num_free == 12 - 2


def test_task_5_a_block_that_another_table_holds_is_not_idle() -> None:
    """Oracle: by hand: two tables share their first two blocks, and each has one more."""
    allocator, cache = make_cache()
    first = cached(allocator, cache, range(12))
    second = cached(allocator, cache, [*range(8), 9, 9, 9, 9])
    release_table(cache, first)
    assert cache.num_idle == 1
    release_table(cache, second)
    assert cache.num_idle == 4


def test_task_5_blocks_that_are_not_cached_are_ignored() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    release_table(cache, filled(allocator, 12))
    cache.released([])
    assert cache.num_idle == len(cache) == 0


def test_task_5_a_block_that_is_shared_again_is_not_idle() -> None:
    """Oracle: by hand: shared and released, twice."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, range(12)))
    for _ in range(2):
        table = shared(allocator, cache, range(8))
        assert cache.num_idle == 1
        assert holders(table) == [2, 2]
        release_table(cache, table)
        assert cache.num_idle == 3


def test_task_5_a_match_leaves_idle_blocks_in_the_queue() -> None:
    """Oracle: the docstring of `match` (task 4): it changes nothing; idle blocks stay idle, in order."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(12))
    blocks = list(table.blocks)
    release_table(cache, table)
    assert found(cache, range(12)) == blocks
    assert cache.idle == blocks[::-1], "the idle blocks after a call of `match` (task 4)"


def test_task_5_the_last_block_of_a_sequence_is_evicted_first() -> None:
    """Oracle: by hand: a prefix is useful without later blocks, but not the other way round."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(16))
    blocks = list(table.blocks)
    release_table(cache, table)
    assert cache.idle == blocks[::-1]


def test_task_5_blocks_released_first_are_evicted_first() -> None:
    """Oracle: by hand: they were cached in one order and released in another; the order of release counts."""
    allocator, cache = make_cache()
    tables = [cached(allocator, cache, tokens) for tokens in ([1] * 8, [2] * 4, [3] * 8)]
    blocks = [list(table.blocks) for table in tables]
    for row in (2, 0, 1):
        release_table(cache, tables[row])
    assert cache.idle == [*blocks[2][::-1], *blocks[0][::-1], *blocks[1]]


def test_task_5_a_block_that_was_used_again_moves_to_the_end_of_the_queue() -> None:
    """Oracle: by hand: the older of two sequences is shared by a table that is then released."""
    allocator, cache = make_cache()
    tables = [cached(allocator, cache, tokens) for tokens in ([1] * 8, [2] * 4)]
    older, newer = (list(table.blocks) for table in tables)
    for table in tables:
        release_table(cache, table)
    release_table(cache, shared(allocator, cache, [1] * 4))
    assert cache.idle == [older[1], *newer, older[0]]


# Task 6: PrefixCache.evict


@pytest.mark.parametrize(("asked", "evicted"), [(0, 0), (1, 1), (3, 3), (4, 3), (100, 3), (-2, 0)])
def test_task_6_eviction_frees_at_most_the_requested_number_of_idle_blocks(asked: int, evicted: int) -> None:
    """Oracle: by hand: three are idle."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, range(12)))
    assert cache.evict(asked) == evicted
    assert cache.num_idle == len(cache) == 3 - evicted
    assert allocator.num_free == 9 + evicted


def test_task_6_an_evicted_block_is_not_found_and_can_be_cached_again() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, range(12)))
    cache.evict(3)
    assert found(cache, range(12)) == []
    assert allocator.num_free == 12
    release_table(cache, cached(allocator, cache, range(12)))
    assert len(found(cache, range(12))) == 3


def test_task_6_a_block_that_a_table_holds_is_not_evicted() -> None:
    """Oracle: by hand: one of three cached blocks is idle."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, range(12)))
    table = shared(allocator, cache, range(8))
    assert cache.evict(12) == 1
    assert found(cache, range(12)) == table.blocks
    assert holders(table) == [2, 2]


def test_task_6_the_last_block_of_a_sequence_is_evicted_first() -> None:
    """Oracle: by hand: a prefix is useful without later blocks, but not the other way round."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, range(16)))
    left = []
    for _ in range(4):
        cache.evict(1)
        left.append(len(found(cache, range(16))))
    assert left == [3, 2, 1, 0], "how many of the prompt's 4 blocks `match` finds after each eviction"


def lost(cache: PrefixCache, texts: dict[str, Sequence[int]], number: int) -> list[str]:
    """Evict `number` blocks one by one; return the name of the sequence that lost each block."""
    names = []
    for _ in range(number):
        before = {name: len(found(cache, tokens)) for name, tokens in texts.items()}
        cache.evict(1)
        names += [name for name, tokens in texts.items() if len(found(cache, tokens)) < before[name]]
    return names


def test_task_6_the_least_recently_used_sequence_is_evicted_first() -> None:
    """Oracle: by hand: they were cached in one order and released in another; the order of release counts."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 4, "c": [3] * 8}
    tables = {name: cached(allocator, cache, tokens) for name, tokens in texts.items()}
    for name in ("c", "a", "b"):
        release_table(cache, tables[name])
    assert lost(cache, texts, 5) == ["c", "c", "a", "a", "b"]


def test_task_6_a_sequence_that_was_used_again_is_evicted_later() -> None:
    """Oracle: by hand: the oldest sequence is shared by a table that is then released."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 8, "c": [3] * 8}
    for tokens in texts.values():
        release_table(cache, cached(allocator, cache, tokens))
    release_table(cache, shared(allocator, cache, texts["a"]))
    assert lost(cache, texts, 6) == ["b", "b", "c", "c", "a", "a"]


def test_task_6_a_block_that_two_sequences_share_is_evicted_last() -> None:
    """Oracle: by hand: one shared block, followed by a different one in each sequence."""
    allocator, cache = make_cache()
    one, two = [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3, 3, 3]
    first, second = cached(allocator, cache, one), cached(allocator, cache, two)
    release_table(cache, first)
    release_table(cache, second)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 2)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 1)


# Task 7: PrefixCache.exchange


def test_task_7_the_cached_block_replaces_the_block_of_the_table() -> None:
    """Oracle: by hand: two tables have computed the same two blocks; the first table's are cached."""
    allocator, cache = make_cache()
    first, second = cached(allocator, cache, range(8)), filled(allocator, 8)
    own = list(second.blocks)
    cache.exchange(second, 1, first.blocks[1])
    assert second.blocks == [own[0], first.blocks[1]]
    assert holders(first) == [2, 3]
    assert [allocator.ref_count(block) for block in own] == [1, 0]
    assert allocator.num_free == 12 - 3


def test_task_7_an_exchanged_block_is_not_idle() -> None:
    """Oracle: by hand. A block that stays in the eviction queue could be evicted while a table reads it."""
    allocator, cache = make_cache()
    second, first = filled(allocator, 8), cached(allocator, cache, range(8))
    blocks = list(first.blocks)
    release_table(cache, first)
    for index, num_idle in ((0, 1), (1, 0)):
        cache.exchange(second, index, blocks[index])
        assert cache.num_idle == num_idle
    assert second.blocks == blocks
    assert holders(second) == [2, 2]


def test_task_7_exchanging_a_block_with_itself_changes_nothing() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(8))
    blocks = list(table.blocks)
    cache.exchange(table, 1, blocks[1])
    assert (table.blocks, holders(table), allocator.num_free) == (blocks, [2, 2], 12 - 2)


def test_task_7_a_replaced_block_stays_with_its_other_holders() -> None:
    """Oracle: by hand: the table's own block is shared with a fork, which keeps it."""
    allocator, cache = make_cache()
    first, second = cached(allocator, cache, range(4)), filled(allocator, 4)
    fork = second.fork()
    cache.exchange(second, 0, first.blocks[0])
    assert second.blocks == first.blocks
    assert holders(fork) == [1]
    assert holders(first) == [3]


# Task 8: PrefixCache.keep


def computed(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int]) -> BlockTable:
    """A table that computed these tokens and passed its full blocks to `keep`."""
    table, stream = filled(allocator, len(tokens), cache.block_size), stream_of(tokens, cache.block_size)
    cache.keep(table, stream, 0, len(stream))
    return table


def test_task_8_full_blocks_are_cached() -> None:
    """Oracle: by hand: two full blocks, and one that is half full."""
    allocator, cache = make_cache()
    table = computed(allocator, cache, range(10))
    assert sorted(cache.blocks) == sorted(table.blocks[:2])
    assert len(cache) == 2
    assert holders(table) == [2, 2, 1]
    assert allocator.num_free == 12 - 3


def test_task_8_blocks_are_cached_as_a_table_grows() -> None:
    """Oracle: by hand: each block once it is full; repeated calls change nothing."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), filled(allocator, 12)
    for first, stop in ((0, 1), (1, 1), (1, 3), (0, 3)):
        cache.keep(table, stream, first, stop)
        assert sorted(cache.blocks) == sorted(table.blocks[:stop])
    assert holders(table) == [2, 2, 2]
    assert len(set(table.blocks)) == 3


def test_task_8_blocks_that_two_tables_computed_are_stored_once() -> None:
    """Oracle: by hand: two of three blocks are equal. The cache has those of the first table.

    Common mistake: freeing a block that stays in the table.
    """
    allocator, cache = make_cache()
    first, second = filled(allocator, 12), filled(allocator, 12)
    held, own = list(first.blocks), list(second.blocks)
    cache.keep(first, stream_of(range(12)), 0, 3)
    cache.keep(second, stream_of([*range(8), 0, 0, 0, 0]), 0, 3)
    assert first.blocks == held
    assert second.blocks == [*held[:2], own[2]]
    assert [allocator.ref_count(block) for block in held] == [3, 3, 2]
    assert [allocator.ref_count(block) for block in own] == [0, 0, 2]
    assert len(cache) == 4
    assert allocator.num_free == 12 - 4


def test_task_8_equal_tokens_at_different_positions_are_different_blocks() -> None:
    """Oracle: by hand: the prefixes differ, so keys and values differ."""
    allocator, cache = make_cache()
    table = computed(allocator, cache, [7] * 12)
    assert len(cache) == len(set(table.blocks)) == 3


def test_task_8_a_hash_collision_and_all_later_blocks_are_not_cached() -> None:
    """Oracle: the docstring: the table keeps its own block, and later blocks are not cached."""
    allocator, cache = make_cache()
    first = computed(allocator, cache, range(8))
    second = filled(allocator, 8)
    own = list(second.blocks)
    cache.keep(second, forged([9, 9, 9, 9, 1, 1, 1, 1], stream_of(range(4)).hashes), 0, 2)
    assert second.blocks == own
    assert [allocator.ref_count(block) for block in own] == [1, 1]
    assert sorted(cache.blocks) == sorted(first.blocks)
    assert holders(first) == [2, 2]


def test_task_8_an_equal_hash_with_a_different_parent_is_a_collision() -> None:
    """Oracle: the docstring: tokens and parent must be equal. Here the parent differs."""
    allocator, cache = make_cache()
    first, second = computed(allocator, cache, range(8)), filled(allocator, 4)
    cache.keep(second, forged([4, 5, 6, 7], stream_of(range(8)).hashes[1:]), 0, 1)
    assert set(second.blocks).isdisjoint(first.blocks)
    assert holders(second) == [1]


def test_task_8_blocks_after_a_missing_block_are_not_cached() -> None:
    """Oracle: the docstring: the cache is cleared before the table's third block is full."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), filled(allocator, 12)
    cache.keep(table, stream, 0, 2)
    cache.clear()
    cache.keep(table, stream, 2, 3)
    assert len(cache) == 0
    assert holders(table) == [1, 1, 1]


def test_task_8_a_block_after_a_block_of_another_text_is_not_cached() -> None:
    """Oracle: the docstring: the table's previous block is kept, but under the hash of another text.

    Common mistake: checking only that the previous block is kept.
    """
    allocator, cache = make_cache()
    table = filled(allocator, 8)
    cache.keep(table, stream_of(range(8)), 0, 1)
    cache.keep(table, stream_of([9] * 8), 1, 2)
    assert cache.blocks == table.blocks[:1]
    assert holders(table) == [2, 1]


def test_task_8_keeping_a_block_that_equals_an_idle_one_takes_the_idle_one_into_use() -> None:
    """Oracle: by hand: `keep` puts the idle block into the table, so it is no longer idle."""
    allocator, cache = make_cache()
    table = filled(allocator, 8)
    release_table(cache, cached(allocator, cache, range(8)))
    assert cache.num_idle == 2
    cache.keep(table, stream_of(range(8)), 0, 1)
    assert cache.num_idle == 1
    cache.keep(table, stream_of(range(8)), 1, 2)
    assert cache.num_idle == 0
    assert holders(table) == [2, 2]
    release_table(cache, table)
    assert cache.num_idle == 2


class Prefixes(RuleBasedStateMachine):
    """Sequences start, finish and are evicted from the cache, on a pool that is often too small."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 3))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.cache = make_cache(num_blocks, block_size)
        self.texts: list[tuple[BlockTable, list[int]]] = []
        self.holds: dict[int, tuple[int, ...]] = {}  # the prefix that was computed into each block

    @rule(same=st.integers(0, 8), own=st.lists(st.integers(2, 3), max_size=4), shares=st.booleans())
    def start(self, same: int, own: list[int], shares: bool) -> None:
        """A sequence shares cached blocks (if `shares`) or computes all of its tokens, and is cached."""
        tokens = [1] * same + own
        size, stream = self.cache.block_size, stream_of(tokens, self.cache.block_size)
        table = shared(self.allocator, self.cache, tokens) if shares else BlockTable(self.allocator, size)
        self.check_reads_its_own(table, tokens)
        missing = table.blocks_to_append(len(tokens) - table.num_tokens)
        self.evict(missing - self.allocator.num_free)
        if missing > self.allocator.num_free:
            release_table(self.cache, table)
            return
        first = len(table.blocks)
        table.append_tokens(len(tokens) - table.num_tokens)
        self.holds |= {
            table.blocks[i]: tuple(tokens[: (i + 1) * size]) for i in range(first, len(table.blocks))
        }
        self.cache.keep(table, stream, first, len(stream))
        self.texts.append((table, tokens))

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        table, _ = self.texts.pop(which % len(self.texts))
        release_table(self.cache, table)

    @rule(number=st.integers(0, 3))
    def evict(self, number: int) -> None:
        kept = {block: self.holds[block] for block in self.cache.blocks}
        idle, free = self.cache.num_idle, self.allocator.num_free
        assert self.cache.evict(number) == min(max(number, 0), idle), f"evict({number}), {idle} blocks idle"
        assert self.allocator.num_free == free + min(max(number, 0), idle), "free blocks after an eviction"
        left = {kept[block] for block in self.cache.blocks}
        gone = set(kept.values()) - left
        size = self.cache.block_size
        assert all(text[:-size] in left for text in left if len(text) > size), "a block lost its prefix"
        in_use = {self.holds[block] for table, _ in self.texts for block in table.blocks}
        assert gone.isdisjoint(in_use), "a block was evicted while a table reads it"

    @invariant()
    def check(self) -> None:
        kept = self.cache.blocks
        held = Counter(block for table, _ in self.texts for block in table.blocks)
        assert self.cache.num_idle == len(set(kept) - set(held)), "kept blocks that no table holds are idle"
        held.update(kept)
        expected = [held[block] for block in range(self.allocator.num_blocks)]
        assert counts(self.allocator) == expected, "a reference for each table, and one if the block is kept"
        assert self.allocator.num_free + len(held) == self.allocator.num_blocks, "free and held blocks"
        assert len({self.holds[block] for block in kept}) == len(kept), "a prefix is cached twice"
        for table, tokens in self.texts:
            self.check_reads_its_own(table, tokens)

    def check_reads_its_own(self, table: BlockTable, tokens: list[int]) -> None:
        size = table.block_size
        for i, block in enumerate(table.blocks):
            assert self.holds[block] == tuple(tokens[: (i + 1) * size]), "a table reads the tokens of another"


def test_task_8_blocks_are_conserved_and_every_table_reads_its_own_tokens() -> None:
    """Oracle: a count of all references, and the tokens that were computed into each block.

    Free and held blocks make up the whole pool; a block's reference count is the number of tables and caches
    that hold it; a prefix is cached once; only idle blocks can be evicted, and no block stays cached without
    its prefix.
    """
    run_state_machine_as_test(Prefixes, settings=settings(quick, max_examples=80, stateful_step_count=25))
