"""Day 3.4, tasks 5 to 8: blocks that wait for the next text, blocks that are evicted, one copy of each."""

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
from week_3_day_4.blocks_by_content import forged, kept, make_cache, stream_of

# Task 5: PrefixCache.released


def end(cache: PrefixCache, table: BlockTable) -> None:
    """Release a table and tell the cache, as the engine does when a sequence ends."""
    blocks = list(table.blocks)
    table.release()
    cache.released(blocks)


def found(cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> list[int]:
    """The kept blocks of a text, up to the first that is missing."""
    stream = stream_of(tokens, cache.block_size, salt)
    return list(cache.match(stream, 0, len(stream)))


def shared(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int]) -> BlockTable:
    """A new table that shares what is kept of a text."""
    table = BlockTable(allocator, cache.block_size)
    for block in found(cache, tokens):
        cache.share(table, block, cache.block_size)
    return table


def test_task_5_kept_blocks_are_idle_when_their_table_has_gone() -> None:
    """Oracle: by hand: the half-full third block is not kept, and is free."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, range(10))
    assert cache.num_idle == 0
    end(cache, table)
    assert cache.num_idle == 2
    assert allocator.num_free == 12 - 2


def test_task_5_a_block_that_another_table_holds_is_not_idle() -> None:
    """Oracle: by hand: two tables begin alike: two blocks are shared, and each has one of its own."""
    allocator, cache = make_cache()
    first = kept(allocator, cache, range(12))
    second = kept(allocator, cache, [*range(8), 9, 9, 9, 9])
    end(cache, first)
    assert cache.num_idle == 1
    end(cache, second)
    assert cache.num_idle == 4


def test_task_5_blocks_that_are_not_kept_are_ignored() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    end(cache, filled(allocator, 12))
    cache.released([])
    assert cache.num_idle == len(cache) == 0


def test_task_5_a_block_that_is_shared_again_is_not_idle() -> None:
    """Oracle: by hand: there and back, twice."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, range(12)))
    for _ in range(2):
        table = shared(allocator, cache, range(8))
        assert cache.num_idle == 1
        assert holders(table) == [2, 2]
        end(cache, table)
        assert cache.num_idle == 3


def test_task_5_of_one_text_the_last_block_is_the_next_to_go() -> None:
    """Oracle: by hand: a beginning is of use without its end, an end never without its beginning."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, range(16))
    blocks = list(table.blocks)
    end(cache, table)
    assert cache.idle == blocks[::-1]


def test_task_5_what_was_released_first_is_the_next_to_go() -> None:
    """Oracle: by hand: they were kept in one order and released in another, which counts."""
    allocator, cache = make_cache()
    tables = [kept(allocator, cache, tokens) for tokens in ([1] * 8, [2] * 4, [3] * 8)]
    blocks = [list(table.blocks) for table in tables]
    for row in (2, 0, 1):
        end(cache, tables[row])
    assert cache.idle == [*blocks[2][::-1], *blocks[0][::-1], *blocks[1]]


def test_task_5_a_block_that_was_used_again_goes_to_the_end() -> None:
    """Oracle: by hand: the older of two texts is shared by a table, which goes again."""
    allocator, cache = make_cache()
    tables = [kept(allocator, cache, tokens) for tokens in ([1] * 8, [2] * 4)]
    older, newer = (list(table.blocks) for table in tables)
    for table in tables:
        end(cache, table)
    end(cache, shared(allocator, cache, [1] * 4))
    assert cache.idle == [older[1], *newer, older[0]]


# Task 6: PrefixCache.evict


@pytest.mark.parametrize(("asked", "evicted"), [(0, 0), (1, 1), (3, 3), (4, 3), (100, 3), (-2, 0)])
def test_task_6_no_more_is_evicted_than_is_asked_for_and_idle(asked: int, evicted: int) -> None:
    """Oracle: by hand: three are idle."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, range(12)))
    assert cache.evict(asked) == evicted
    assert cache.num_idle == len(cache) == 3 - evicted
    assert allocator.num_free == 9 + evicted


def test_task_6_what_was_evicted_is_not_found_and_can_be_kept_again() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, range(12)))
    cache.evict(3)
    assert found(cache, range(12)) == []
    assert allocator.num_free == 12
    end(cache, kept(allocator, cache, range(12)))
    assert len(found(cache, range(12))) == 3


def test_task_6_what_a_table_holds_is_not_evicted() -> None:
    """Oracle: by hand: of three kept blocks one is idle."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, range(12)))
    table = shared(allocator, cache, range(8))
    assert cache.evict(12) == 1
    assert found(cache, range(12)) == table.blocks
    assert holders(table) == [2, 2]


def test_task_6_of_one_text_the_last_block_goes_first() -> None:
    """Oracle: by hand: a beginning is of use without its end, and an end never without its beginning."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, range(16)))
    left = []
    for _ in range(4):
        cache.evict(1)
        left.append(len(found(cache, range(16))))
    assert left == [3, 2, 1, 0]


def lost(cache: PrefixCache, texts: dict[str, Sequence[int]], number: int) -> list[str]:
    """Evict so many blocks one by one; the text that each eviction cut short."""
    names = []
    for _ in range(number):
        before = {name: len(found(cache, tokens)) for name, tokens in texts.items()}
        cache.evict(1)
        names += [name for name, tokens in texts.items() if len(found(cache, tokens)) < before[name]]
    return names


def test_task_6_the_least_recently_used_text_goes_first() -> None:
    """Oracle: by hand: they were kept in one order and released in another, which counts."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 4, "c": [3] * 8}
    tables = {name: kept(allocator, cache, tokens) for name, tokens in texts.items()}
    for name in ("c", "a", "b"):
        end(cache, tables[name])
    assert lost(cache, texts, 5) == ["c", "c", "a", "a", "b"]


def test_task_6_a_text_that_was_used_again_goes_later() -> None:
    """Oracle: by hand: the oldest text is shared by a table, which goes again."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 8, "c": [3] * 8}
    for tokens in texts.values():
        end(cache, kept(allocator, cache, tokens))
    end(cache, shared(allocator, cache, texts["a"]))
    assert lost(cache, texts, 6) == ["b", "b", "c", "c", "a", "a"]


def test_task_6_what_two_texts_share_goes_after_both() -> None:
    """Oracle: by hand: one shared block; each text has another behind it."""
    allocator, cache = make_cache()
    one, two = [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3, 3, 3]
    first, second = kept(allocator, cache, one), kept(allocator, cache, two)
    end(cache, first)
    end(cache, second)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 2)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 1)


# Task 7: PrefixCache.exchange


def test_task_7_the_table_holds_the_kept_block_instead_of_its_own() -> None:
    """Oracle: by hand: two tables have computed the same two blocks; the first table's are kept."""
    allocator, cache = make_cache()
    first, second = kept(allocator, cache, range(8)), filled(allocator, 8)
    own = list(second.blocks)
    cache.exchange(second, 1, first.blocks[1])
    assert second.blocks == [own[0], first.blocks[1]]
    assert holders(first) == [2, 3]
    assert [allocator.ref_count(block) for block in own] == [1, 0]
    assert allocator.num_free == 12 - 3


def test_task_7_a_block_that_was_idle_is_in_use() -> None:
    """Oracle: by hand. Common mistake: a block that stays in the queue is evicted while a table reads it."""
    allocator, cache = make_cache()
    second, first = filled(allocator, 8), kept(allocator, cache, range(8))
    blocks = list(first.blocks)
    end(cache, first)
    for index, num_idle in ((0, 1), (1, 0)):
        cache.exchange(second, index, blocks[index])
        assert cache.num_idle == num_idle
    assert second.blocks == blocks
    assert holders(second) == [2, 2]


def test_task_7_a_table_that_holds_the_kept_block_already_is_left_as_it_is() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, range(8))
    blocks = list(table.blocks)
    cache.exchange(table, 1, blocks[1])
    assert (table.blocks, holders(table), allocator.num_free) == (blocks, [2, 2], 12 - 2)


def test_task_7_a_block_that_others_hold_too_stays_with_them() -> None:
    """Oracle: by hand: the table's own block is shared with a fork, which goes on with it."""
    allocator, cache = make_cache()
    first, second = kept(allocator, cache, range(4)), filled(allocator, 4)
    fork = second.fork()
    cache.exchange(second, 0, first.blocks[0])
    assert second.blocks == first.blocks
    assert holders(fork) == [1]
    assert holders(first) == [3]


# Task 8: PrefixCache.keep


def computed(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int]) -> BlockTable:
    """A table that has computed all of these tokens, its full blocks given to `keep`."""
    table, stream = filled(allocator, len(tokens), cache.block_size), stream_of(tokens, cache.block_size)
    cache.keep(table, stream, 0, len(stream))
    return table


def test_task_8_full_blocks_are_kept() -> None:
    """Oracle: by hand: two full blocks, and one that is half full."""
    allocator, cache = make_cache()
    table = computed(allocator, cache, range(10))
    assert sorted(cache.blocks) == sorted(table.blocks[:2])
    assert len(cache) == 2
    assert holders(table) == [2, 2, 1]
    assert allocator.num_free == 12 - 3


def test_task_8_a_table_is_kept_as_it_grows() -> None:
    """Oracle: by hand: each block once it is full, and again without any change."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), filled(allocator, 12)
    for first, stop in ((0, 1), (1, 1), (1, 3), (0, 3)):
        cache.keep(table, stream, first, stop)
        assert sorted(cache.blocks) == sorted(table.blocks[:stop])
    assert holders(table) == [2, 2, 2]
    assert len(set(table.blocks)) == 3


def test_task_8_what_two_have_computed_is_in_the_pool_once() -> None:
    """Oracle: by hand: two equal blocks of three. The cache has those of the first table.

    Common mistake: a block that goes back and still stands in the table is another table's soon.
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


def test_task_8_the_same_tokens_in_another_place_are_another_block() -> None:
    """Oracle: by hand: what comes before is different, so keys and values are."""
    allocator, cache = make_cache()
    table = computed(allocator, cache, [7] * 12)
    assert len(cache) == len(set(table.blocks)) == 3


def test_task_8_a_collision_is_not_kept_and_nothing_behind_it() -> None:
    """Oracle: the docstring: the table keeps its own block, and nothing behind it is kept."""
    allocator, cache = make_cache()
    first = computed(allocator, cache, range(8))
    second = filled(allocator, 8)
    own = list(second.blocks)
    cache.keep(second, forged([9, 9, 9, 9, 1, 1, 1, 1], stream_of(range(4)).hashes), 0, 2)
    assert second.blocks == own
    assert [allocator.ref_count(block) for block in own] == [1, 1]
    assert sorted(cache.blocks) == sorted(first.blocks)
    assert holders(first) == [2, 2]


def test_task_8_the_same_tokens_with_another_parent_under_the_same_hash_are_a_collision() -> None:
    """Oracle: the docstring: the same tokens behind the same parent. Here the parent is another."""
    allocator, cache = make_cache()
    first, second = computed(allocator, cache, range(8)), filled(allocator, 4)
    cache.keep(second, forged([4, 5, 6, 7], stream_of(range(8)).hashes[1:]), 0, 1)
    assert set(second.blocks).isdisjoint(first.blocks)
    assert holders(second) == [1]


def test_task_8_behind_a_gap_nothing_is_kept() -> None:
    """Oracle: the docstring: the cache is cleared while a table is at its third block."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), filled(allocator, 12)
    cache.keep(table, stream, 0, 2)
    cache.clear()
    cache.keep(table, stream, 2, 3)
    assert len(cache) == 0
    assert holders(table) == [1, 1, 1]


def test_task_8_what_is_computed_again_while_it_is_idle_is_in_use() -> None:
    """Oracle: by hand: `keep` puts the idle block into the table, and it is not idle any more."""
    allocator, cache = make_cache()
    table = filled(allocator, 8)
    end(cache, kept(allocator, cache, range(8)))
    assert cache.num_idle == 2
    cache.keep(table, stream_of(range(8)), 0, 1)
    assert cache.num_idle == 1
    cache.keep(table, stream_of(range(8)), 1, 2)
    assert cache.num_idle == 0
    assert holders(table) == [2, 2]
    end(cache, table)
    assert cache.num_idle == 2


class Prefixes(RuleBasedStateMachine):
    """Texts are begun, go on, end, and are given up, on a pool that is often too small for them."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 3))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.cache = make_cache(num_blocks, block_size)
        self.texts: list[tuple[BlockTable, list[int]]] = []
        self.holds: dict[int, tuple[int, ...]] = {}  # the text that was computed into each block

    @rule(same=st.integers(0, 8), own=st.lists(st.integers(2, 3), max_size=4), looks=st.booleans())
    def begin(self, same: int, own: list[int], looks: bool) -> None:
        """A text that begins as others do shares what is there, or computes all of it, and is kept."""
        tokens = [1] * same + own
        size, stream = self.cache.block_size, stream_of(tokens, self.cache.block_size)
        table = shared(self.allocator, self.cache, tokens) if looks else BlockTable(self.allocator, size)
        self.check_reads_its_own(table, tokens)
        missing = table.blocks_to_append(len(tokens) - table.num_tokens)
        self.give_up(missing - self.allocator.num_free)
        if missing > self.allocator.num_free:
            end(self.cache, table)
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
        end(self.cache, table)

    @rule(number=st.integers(0, 3))
    def give_up(self, number: int) -> None:
        kept = {block: self.holds[block] for block in self.cache.blocks}
        idle, free = self.cache.num_idle, self.allocator.num_free
        assert self.cache.evict(number) == min(max(number, 0), idle)
        assert self.allocator.num_free == free + min(max(number, 0), idle)
        left = {kept[block] for block in self.cache.blocks}
        gone = set(kept.values()) - left
        size = self.cache.block_size
        assert all(text[:-size] in left for text in left if len(text) > size), "an end without its beginning"
        in_use = {self.holds[block] for table, _ in self.texts for block in table.blocks}
        assert gone.isdisjoint(in_use), "evicted while a table reads it"

    @invariant()
    def check(self) -> None:
        kept = self.cache.blocks
        held = Counter(block for table, _ in self.texts for block in table.blocks)
        assert self.cache.num_idle == len(set(kept) - set(held))
        held.update(kept)
        assert counts(self.allocator) == [held[block] for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free + len(held) == self.allocator.num_blocks
        assert len({self.holds[block] for block in kept}) == len(kept), "a prefix is in the pool twice"
        for table, tokens in self.texts:
            self.check_reads_its_own(table, tokens)

    def check_reads_its_own(self, table: BlockTable, tokens: list[int]) -> None:
        size = table.block_size
        for i, block in enumerate(table.blocks):
            assert self.holds[block] == tuple(tokens[: (i + 1) * size]), "a table reads another text"


def test_task_8_blocks_are_conserved_and_no_table_reads_another_text() -> None:
    """Oracle: a count of all holders, and the text that was computed into each block, as a tuple.

    Free blocks and held ones are the whole pool; a block has as many holders as tables and the cache name it;
    a prefix is there once; idle blocks can be evicted, others cannot, and no end stays without its beginning.
    """
    run_state_machine_as_test(Prefixes, settings=settings(quick, max_examples=80, stateful_step_count=25))
