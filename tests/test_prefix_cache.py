"""PrefixCache and TokenBlocks: what is cached, found, shared and evicted; the oracle compares whole prefixes.

The machines at the end create tables, fill blocks, share, release and move them in any order. Their oracle
keeps a plain dict from each prefix, as a tuple of tokens, to its block, and a pool of plain values knows the
contents of every slot: no hash is used.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise, product
from struct import pack
from types import FrameType

import pytest
from hypothesis import Phase, settings
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
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks, block_hash

from tiny_llm import prefix_cache
from tiny_model import examples

SIZE = 2  # tokens in a block, unless a test says otherwise

Prefix = tuple[object, ...]  # a salt, and the tokens of a stream from its first


def cache_of(num_blocks: int = 12, block_size: int = SIZE) -> PrefixCache:
    return PrefixCache(BlockAllocator(num_blocks), block_size)


def stream_of(tokens: str, salt: str = "", block_size: int = SIZE) -> TokenBlocks:
    """A stream with one token for each letter."""
    stream = TokenBlocks(block_size, salt)
    stream.extend([ord(letter) for letter in tokens])
    return stream


def filled(cache: PrefixCache, tokens: str) -> BlockTable:
    """A table with blocks for these tokens, which are computed."""
    table = BlockTable(cache._allocator, cache.block_size)
    table.append_tokens(len(tokens))
    return table


def cached_table(cache: PrefixCache, tokens: str, salt: str = "") -> BlockTable:
    """A table with these tokens, whose full blocks are cached."""
    table, stream = filled(cache, tokens), stream_of(tokens, salt, cache.block_size)
    cache.keep(table, stream, 0, len(stream))
    return table


def end(cache: PrefixCache, table: BlockTable) -> None:
    """Release a table, as the scheduler does."""
    blocks = list(table.blocks)
    table.release()
    cache.released(blocks)


def found(cache: PrefixCache, tokens: str, salt: str = "") -> list[int]:
    """The cached blocks that a new stream of these tokens would share."""
    stream = stream_of(tokens, salt, cache.block_size)
    return cache.match(stream, 0, len(stream))


def holders(cache: PrefixCache, blocks: list[int]) -> list[int]:
    return [cache._allocator.ref_count(block) for block in blocks]


# Hashes and streams.


def test_a_hash_is_sha_256_of_the_parent_and_the_tokens() -> None:
    parent = sha256(b"before").digest()
    assert block_hash(parent, [1, 70_000]) == sha256(parent + pack("=2q", 1, 70_000)).digest()
    assert block_hash(parent, (1, 70_000)) == block_hash(parent, [1, 70_000])


def test_a_hash_stands_for_the_block_and_all_blocks_before_it() -> None:
    hashes = [block_hash(stream_of(before).parent(1), [ord(x) for x in last]) for before, last in CHAINS]
    assert len(set(hashes)) == len(CHAINS)


CHAINS = [("".join(before), "".join(last)) for before, last in product(product("ab", repeat=2), repeat=2)]


def test_a_stream_extended_in_pieces_has_the_same_hashes() -> None:
    whole, pieces = stream_of("abcdefg"), TokenBlocks(SIZE)
    for piece in ("ab", "cdef", "g"):
        pieces.extend([ord(letter) for letter in piece])
    assert len(whole) == 3, "the rest is not a full block"
    assert (pieces.tokens, pieces.hashes) == (whole.tokens, whole.hashes)
    assert whole.tokens == [(97, 98), (99, 100), (101, 102)]


def test_a_copied_stream_grows_independently() -> None:
    stream = stream_of("abcd", "salt")
    other = stream.copy()
    other.extend([120, 121])
    assert (len(stream), len(other)) == (2, 3)
    assert other.hashes == stream_of("abcdxy", "salt").hashes
    assert stream.parent(0) == other.parent(0)


def test_another_salt_changes_the_hash_of_every_block() -> None:
    streams = [stream_of("abababab", salt) for salt in ("", "a", "b")]
    hashes = [digest for stream in streams for digest in stream.hashes]
    assert len(set(hashes)) == 3 * 4


# Adding and matching.


def test_a_cached_block_outlives_its_table_and_is_found_again() -> None:
    cache = cache_of()
    table = cached_table(cache, "abcdef")
    blocks = list(table.blocks)
    assert holders(cache, blocks) == [2, 2, 2]
    assert (len(cache), cache.num_idle) == (3, 0)
    end(cache, table)
    assert holders(cache, blocks) == [1, 1, 1]
    assert cache.num_idle == 3
    assert found(cache, "abcdefgh") == blocks
    assert holders(cache, blocks) == [1, 1, 1], "a lookup takes no reference"


def test_a_match_ends_at_the_first_missing_block() -> None:
    cache = cache_of()
    blocks = cached_table(cache, "abcdef").blocks
    assert found(cache, "abcdxxef") == blocks[:2]
    assert found(cache, "xxcdef") == [], "the same tokens in another place are another block"
    stream = stream_of("abcdef")
    assert cache.match(stream, 1, 3) == blocks[1:]
    assert cache.match(stream, 1, 2) == blocks[1:2]
    assert cache.match(stream, 2, 2) == []


def test_a_partly_filled_block_is_not_cached() -> None:
    cache = cache_of()
    table = cached_table(cache, "abc")
    assert cache.blocks == table.blocks[:1]
    assert holders(cache, table.blocks) == [2, 1]


def test_caching_a_block_again_changes_nothing() -> None:
    cache = cache_of()
    table = cached_table(cache, "abcd")
    before = list(table.blocks)
    cache.keep(table, stream_of("abcd"), 0, 2)
    assert table.blocks == before
    assert holders(cache, before) == [2, 2]
    assert len(cache) == 2


def test_a_prefix_that_was_computed_twice_is_in_the_pool_once() -> None:
    cache = cache_of(8)
    first, second = filled(cache, "abcdef"), filled(cache, "abcdxy")
    for table, tokens in ((first, "abcdef"), (second, "abcdxy")):
        cache.keep(table, stream_of(tokens), 0, 3)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert holders(cache, first.blocks) == [3, 3, 2]
    assert cache._allocator.num_free == 8 - 4, "the second copy is free again"


def test_an_idle_prefix_that_is_computed_again_is_in_use_again() -> None:
    cache = cache_of()
    table = filled(cache, "abcd")
    end(cache, cached_table(cache, "abcd"))
    assert cache.num_idle == 2
    cache.keep(table, stream_of("abcd"), 0, 1)
    assert cache.num_idle == 1
    cache.keep(table, stream_of("abcd"), 1, 2)
    assert cache.num_idle == 0
    assert cache.evict(9) == 0
    assert holders(cache, table.blocks) == [2, 2]


def test_streams_with_different_salts_share_no_blocks() -> None:
    cache = cache_of()
    one, other = cached_table(cache, "abcd", "one"), cached_table(cache, "abcd", "other")
    assert set(one.blocks).isdisjoint(other.blocks)
    assert found(cache, "abcd", "one") == one.blocks
    assert found(cache, "abcd", "other") == other.blocks
    assert found(cache, "abcd") == []


# An equal hash is not enough.


def forged(tokens: str, hashes: list[bytes]) -> TokenBlocks:
    """A stream whose tokens are not those of its hashes."""
    stream = stream_of(tokens)
    stream.hashes[: len(hashes)] = hashes
    return stream


def test_other_tokens_with_the_same_hash_do_not_match() -> None:
    cache = cache_of()
    cached_table(cache, "abcd")
    hashes = stream_of("abcd").hashes
    assert cache.match(forged("xycd", hashes), 0, 2) == []
    assert len(cache.match(forged("abxy", hashes), 0, 2)) == 1
    assert cache.match(forged("cdcd", [hashes[1]]), 0, 1) == [], "the same tokens after others"


def test_other_tokens_with_the_same_hash_are_not_cached_nor_is_anything_after_them() -> None:
    cache = cache_of()
    first = cached_table(cache, "abcd")
    second = filled(cache, "xyzz")
    own = list(second.blocks)
    cache.keep(second, forged("xyzz", stream_of("abcd").hashes[:1]), 0, 2)
    assert second.blocks == own
    assert holders(cache, own) == [1, 1]
    assert cache.blocks == first.blocks
    third = filled(cache, "cdcd")
    cache.keep(third, forged("cdcd", [stream_of("abcd").hashes[1]]), 0, 1)
    assert set(third.blocks).isdisjoint(first.blocks), "the same tokens after others"


# Eviction.


def test_idle_blocks_are_evicted_least_recently_used_first_and_deepest_first() -> None:
    cache = cache_of()
    first, second = cached_table(cache, "aabbcc"), cached_table(cache, "aabbdd")
    third = cached_table(cache, "xx")
    for table in (second, third, first):
        end(cache, table)
    order = []
    for _ in range(5):
        before = {name for name in ALL if found(cache, name)[len(name) // SIZE - 1 :]}
        assert cache.evict(1) == 1
        after = {name for name in ALL if found(cache, name)[len(name) // SIZE - 1 :]}
        order += sorted(before - after)
    assert order == ["aabbdd", "xx", "aabbcc", "aabb", "aa"]
    assert cache._allocator.num_free == 12


ALL = ("aa", "aabb", "aabbcc", "aabbdd", "xx")


def test_a_block_that_was_used_again_is_evicted_later() -> None:
    cache = cache_of()
    for name in ("aa", "bb", "cc"):
        end(cache, cached_table(cache, name))
    table = BlockTable(cache._allocator, SIZE)
    cache.share(table, found(cache, "aa")[0], SIZE)
    assert cache.num_idle == 2
    end(cache, table)
    assert cache.evict(2) == 2
    assert [bool(found(cache, name)) for name in ("aa", "bb", "cc")] == [True, False, False]


def test_a_block_that_a_table_holds_is_never_evicted() -> None:
    cache = cache_of()
    table = cached_table(cache, "aabb")
    end(cache, cached_table(cache, "aabbcc"))
    assert cache.num_idle == 1
    assert cache.evict(12) == 1
    assert found(cache, "aabbcc") == table.blocks


def test_the_release_of_a_table_keeps_blocks_that_another_holds() -> None:
    cache = cache_of()
    first = cached_table(cache, "aabb")
    second = first.fork()
    end(cache, first)
    assert cache.num_idle == 0
    end(cache, second)
    assert cache.num_idle == 2


@pytest.mark.parametrize(("asked", "given"), [(-3, 0), (0, 0), (2, 2), (3, 3), (100, 3)])
def test_no_more_blocks_are_evicted_than_requested_and_idle(asked: int, given: int) -> None:
    cache = cache_of()
    end(cache, cached_table(cache, "aabbcc"))
    free = cache._allocator.num_free
    assert cache.evict(asked) == given
    assert (cache.num_idle, cache._allocator.num_free) == (3 - given, free + given)


def test_clearing_keeps_blocks_in_use_in_their_tables_and_caches_nothing_after_them() -> None:
    cache = cache_of()
    table = filled(cache, "aabbcc")
    stream = stream_of("aabbcc")
    cache.keep(table, stream, 0, 2)
    end(cache, cached_table(cache, "xx"))
    cache.clear()
    assert (len(cache), cache.num_idle) == (0, 0)
    assert holders(cache, table.blocks) == [1, 1, 1]
    cache.keep(table, stream, 2, 3)
    assert len(cache) == 0, "no lookup could find a block without those before it"
    end(cache, table)
    assert cache._allocator.num_free == 12


def test_a_block_is_not_cached_if_its_cached_parent_is_another_tables_copy() -> None:
    """A child of another table's copy of a block would not keep that copy from being evicted first."""
    cache = cache_of()
    table, stream = filled(cache, "aabb"), stream_of("aabb")
    cache.keep(table, stream, 0, 1)
    cache.clear()
    end(cache, cached_table(cache, "aa"))
    cache.keep(table, stream, 1, 2)
    assert len(cache) == 1
    assert cache.num_idle == 1


def test_moved_blocks_are_found_in_their_new_places() -> None:
    cache = cache_of(8)
    filler = filled(cache, "....")
    table = cached_table(cache, "aabb")
    filler.release()
    moved = {block: new for new, block in enumerate(table.blocks)}
    cache._allocator.relocate(moved)
    table.rename_blocks(moved)
    cache.rename_blocks(moved)
    assert found(cache, "aabb") == table.blocks == [0, 1]
    end(cache, table)
    assert cache.num_idle == 2
    assert cache.evict(2) == 2
    assert cache._allocator.num_free == 8


# Partial blocks.


def part(cache: PrefixCache, before: str, tokens: str) -> tuple[int, int] | None:
    """The match for the tokens after a text of full blocks."""
    stream = stream_of(before, block_size=cache.block_size)
    return cache.match_part(stream.parent(len(stream)), [ord(letter) for letter in tokens])


@pytest.mark.parametrize(("tokens", "length"), [("efgh", 4), ("efg", 3), ("efxx", 2), ("exgh", 1), ("e", 1)])
def test_a_block_with_the_same_start_is_found_with_its_common_length(tokens: str, length: int) -> None:
    cache = cache_of(block_size=4)
    table = cached_table(cache, "abcdefgh")
    assert part(cache, "abcd", tokens) == (table.blocks[1], length)


@pytest.mark.parametrize(
    ("before", "tokens"), [("abcd", "xfgh"), ("abcd", ""), ("", "efgh"), ("xxxx", "efgh")]
)
def test_there_is_no_partial_match_without_a_common_token_or_after_another_prefix(
    before: str, tokens: str
) -> None:
    cache = cache_of(block_size=4)
    cached_table(cache, "abcdefgh")
    assert part(cache, before, tokens) is None


def test_of_several_blocks_with_the_same_first_token_the_newest_is_compared() -> None:
    cache = cache_of(block_size=4)
    cached_table(cache, "abcd")
    newest = cached_table(cache, "abxx")
    cached_table(cache, "zzzz")
    assert part(cache, "", "abcd") == (newest.blocks[0], 2)
    end(cache, newest)
    cache.evict(1)
    assert part(cache, "", "abcd") is None


def test_a_partly_shared_block_is_copied_before_it_is_written() -> None:
    cache = cache_of(block_size=4)
    owner = cached_table(cache, "abcd")
    end(cache, owner.fork())
    table = BlockTable(cache._allocator, 4)
    cache.share(table, owner.blocks[0], 3)
    [copy] = table.append_tokens(1)
    cache.released([copy.src])
    assert (copy.src, copy.length) == (owner.blocks[0], 3)
    assert holders(cache, owner.blocks) == [2]
    assert cache.num_idle == 0


# Costs.


def count_steps(function: Callable[[], object]) -> int:
    """The number of bytecode instructions that Python runs for a call, the same on any machine."""
    counted = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace

    gc.disable()  # or finalizers left by earlier tests run, and are counted, in between
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
        gc.enable()
    return counted


POOL = 1_000_000
SIZES = (1_000, 100_000)


def large_cache(num_in_use: int, num_idle: int) -> PrefixCache:
    """A pool of a million blocks, with these numbers of blocks cached and in use, and cached and idle."""
    cache = cache_of(POOL, block_size=1)
    for salt, number in (("in use", num_in_use), ("idle", num_idle)):
        stream, table = TokenBlocks(1, salt), BlockTable(cache._allocator, 1)
        stream.extend(range(number))
        table.append_tokens(number)
        cache.keep(table, stream, 0, number)
        if salt == "idle":
            end(cache, table)
    return cache


@pytest.mark.parametrize("in_use", [True, False])
def test_eviction_costs_the_same_however_many_blocks_are_cached(in_use: bool) -> None:
    """A block is filled, cached, released and evicted, once while many others are in use."""
    costs = []
    for size in SIZES:
        cache = large_cache(size, 0) if in_use else large_cache(0, size)

        def fill_and_evict(number: int, cache: PrefixCache = cache) -> int:
            end(cache, cached_table(cache, chr(1_000 + number)))
            return count_steps(lambda: cache.evict(1))

        costs.append([fill_and_evict(number) for number in range(20)])
    assert costs[0] == costs[1]
    assert max(costs[0]) == min(costs[0])


def test_lookup_and_caching_cost_the_same_however_many_blocks_are_cached() -> None:
    costs = []
    for size in SIZES:
        cache = large_cache(0, size)
        stream = stream_of("abcdefgh", block_size=1)
        cost = [count_steps(lambda c=cache, s=stream: c.match(s, 0, 8))]  # type: ignore[misc]
        table = filled(cache, "abcdefgh")
        cost.append(count_steps(lambda c=cache, s=stream, t=table: c.keep(t, s, 0, 8)))  # type: ignore[misc]
        cost += [count_steps(lambda c=cache, s=stream, n=n: c.match(s, 0, n)) for n in range(1, 9)]  # type: ignore[misc]
        cost.append(count_steps(lambda c=cache, t=table: end(c, t)))  # type: ignore[misc]
        costs.append(cost)
    assert costs[0] == costs[1]
    per_block = {more - less for less, more in pairwise(costs[0][2:10])}
    assert len(per_block) == 1, "each additional block costs the same"


# Events in any order.


@dataclass(eq=False)
class Text:
    """A table, its expected contents, and how many of its blocks `keep` has seen."""

    salt: str
    tokens: list[int]
    table: BlockTable
    stream: TokenBlocks
    num_seen: int = 0

    def prefix(self, num_tokens: int) -> Prefix:
        """The salt and the first tokens, which determine a key and a value."""
        return self.salt, *self.tokens[:num_tokens]


class Machine(RuleBasedStateMachine):
    """Tables are created, share, fill, are cached, fork and end; blocks are evicted, cleared and moved."""

    happened: Counter[str]
    has_unique_hashes = True  # no two blocks have the same hash, so the oracle knows what is cached

    cache: PrefixCache

    @initialize(num_blocks=st.integers(1, 14), block_size=st.integers(1, 4))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.size = BlockAllocator(num_blocks), block_size
        self.cache = PrefixCache(self.allocator, block_size)
        self.texts: list[Text] = []
        self.held: dict[tuple[int, int], Prefix] = {}  # the contents of each slot, by block and offset
        self.kept: dict[Prefix, int] = {}  # the oracle: the block of every cached prefix
        self.released_at: dict[Prefix, int] = {}  # when it was last released
        self.newest: dict[tuple[Prefix, int], Prefix] = {}
        self.now = 0

    @rule(
        salt=st.sampled_from(["", "", "", "salt"]),
        shared=st.integers(0, 10),
        own=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5),
        finds_prefix=st.sampled_from([True, True, False]),
        done=st.sampled_from([True, True, False]),
    )
    def begin_text(self, salt: str, shared: int, own: list[int], finds_prefix: bool, done: bool) -> None:
        """A text that starts like others, and the events that usually follow."""
        tokens = [1] * shared + own
        stream = TokenBlocks(self.size, salt)
        stream.extend(tokens)
        if len(self.texts) == 4:
            self.end_text(self.texts[0])
        text = Text(salt, tokens, BlockTable(self.allocator, self.size), stream)
        self.texts.append(text)
        if finds_prefix:
            self.share_blocks(text)
            self.share_part(text)
        if done and text in self.texts and self.fill(text, len(tokens)):
            self.keep_full_blocks(text)

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 3), part=st.booleans())
    def look(self, which: int, part: bool) -> None:
        self.share_blocks(self.pick(which))
        if part:
            self.share_part(self.pick(which))

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 3), count=st.integers(1, 6), keeps=st.booleans())
    def compute(self, which: int, count: int, keeps: bool) -> None:
        text = self.pick(which)
        if self.fill(text, count) and keeps:
            self.keep_full_blocks(text)

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 3))
    def keep(self, which: int) -> None:
        self.keep_full_blocks(self.pick(which))

    @precondition(lambda self: 0 < len(self.texts) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        """As the scheduler does: its full blocks are cached by then."""
        text = self.pick(which)
        self.keep_full_blocks(text)
        tokens = list(text.tokens)
        self.texts.append(Text(text.salt, tokens, text.table.fork(), text.stream.copy(), text.num_seen))

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 3))
    def end(self, which: int) -> None:
        self.end_text(self.pick(which))

    @rule(num_blocks=st.integers(-1, 4))
    def free_idle(self, num_blocks: int) -> None:
        in_use = {block for text in self.texts for block in text.table.blocks}
        idle = [prefix for prefix, block in self.kept.items() if block not in in_use]
        idle.sort(key=lambda prefix: (self.released_at[prefix], -len(prefix)))
        going, free = idle[: max(0, num_blocks)], self.allocator.num_free
        given = self.cache.evict(num_blocks)
        assert self.allocator.num_free == free + given
        self.happened["evicted"] += given
        if self.has_unique_hashes:
            assert given == len(going)
            self.forget(going)

    @precondition(lambda self: self.now % 7 == 3)
    @rule()
    def clear(self) -> None:
        self.happened["cleared"] += len(self.cache) > 0
        self.cache.clear()
        self.forget(list(self.kept))
        assert (len(self.cache), self.cache.num_idle) == (0, 0)

    @rule()
    def move(self) -> None:
        """Move blocks in use to the front of the pool, as compaction does."""
        counts = [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]
        in_use = [block for block, count in enumerate(counts) if count]
        holes = [block for block, count in enumerate(counts[: len(in_use)]) if not count]
        moved = dict(zip(in_use[len(in_use) - len(holes) :], holes, strict=True))
        self.allocator.relocate(moved)
        self.cache.rename_blocks(moved)
        for text in self.texts:
            text.table.rename_blocks(moved)
        was = {slot: what for slot, what in self.held.items() if slot[0] in in_use}
        self.held = {(moved.get(block, block), i): what for (block, i), what in was.items()}
        self.kept = {prefix: moved.get(block, block) for prefix, block in self.kept.items()}
        self.happened["moved"] += len(moved)

    @invariant()
    def check(self) -> None:
        blocks = self.cache.blocks
        in_use = Counter(block for text in self.texts for block in text.table.blocks)
        assert len(set(blocks)) == len(blocks) == len(self.cache), "a block is cached twice"
        assert self.cache.num_idle == len(set(blocks) - set(in_use)), "idle blocks are miscounted"
        counted = [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]
        assert counted == [in_use[block] + (block in blocks) for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free == counted.count(0)
        for text in self.texts:
            self.check_reads_its_own(text)
            are_kept = [block in self.cache for block in text.table.blocks]
            assert are_kept == sorted(are_kept, reverse=True), "a cached block after one that is not"
        prefixes = {self.held[block, self.size - 1] for block in blocks}
        assert len(prefixes) == len(blocks), "a prefix is cached twice"
        before = {prefix[: -self.size] for prefix in prefixes if len(prefix) > 1 + self.size}
        assert before <= prefixes, "a block is evicted before one that depends on it"
        if self.has_unique_hashes:
            assert {self.held[block, self.size - 1]: block for block in blocks} == self.kept

    def teardown(self) -> None:
        """End all texts; then every block can be allocated."""
        if not hasattr(self, "cache") or sys.exc_info()[0] is not None:
            return
        for text in list(self.texts):
            self.end_text(text)
        assert self.cache.num_idle == len(self.cache)
        self.cache.evict(self.allocator.num_blocks)
        assert self.allocator.num_free == self.allocator.num_blocks

    def pick(self, which: int) -> Text:
        return self.texts[which % len(self.texts)]

    def share_blocks(self, text: Text) -> None:
        first, stop = text.table.num_tokens // self.size, len(text.stream)
        if not self.may_share(text):
            return
        blocks = self.cache.match(text.stream, first, stop)
        if self.has_unique_hashes:
            assert blocks == self.expected_match(text, first, stop)
        for block in blocks:
            self.cache.share(text.table, block, self.size)
        self.happened["shared"] += len(blocks)

    def share_part(self, text: Text) -> None:
        """Share a part of a block if one matches, and write the next token, which copies the block."""
        at = text.table.num_tokens
        tokens = text.tokens[at : min(at + self.size, len(text.tokens) - 1)]
        if not tokens or not self.may_share(text):
            return
        match = self.cache.match_part(text.stream.parent(at // self.size), tokens)
        if self.has_unique_hashes:
            assert match == self.expected_part(text, at, tokens)
        if match is None:
            return
        assert 1 <= match.length <= len(tokens)
        self.cache.share(text.table, match.block, match.length)
        self.check()
        self.fill(text, 1)
        self.happened["parts shared"] += match.length < self.size

    def fill(self, text: Text, count: int) -> bool:
        """Fill pages with the next tokens, evicting idle blocks; False: it ended for lack of blocks."""
        table, start = text.table, text.table.num_tokens
        stop = min(len(text.tokens), start + count)
        needed = table.blocks_to_append(stop - start)
        if needed > self.allocator.num_free:
            self.free_idle(needed - self.allocator.num_free)
        if needed > self.allocator.num_free:
            self.end_text(text)
            return False
        for src, dst, length in table.append_tokens(stop - start):
            self.held |= {(dst, i): self.held[src, i] for i in range(length)}
            self.record_release([src])
        for position in range(start, stop):
            block, offset = table.blocks[position // self.size], position % self.size
            self.held[block, offset] = text.prefix(position + 1)
        return True

    def keep_full_blocks(self, text: Text) -> None:
        first, stop = text.num_seen, text.table.num_tokens // self.size
        if self.has_unique_hashes:
            expected = self.expected_keep(text, first, stop)
            self.happened["computed twice"] += expected != text.table.blocks
        self.cache.keep(text.table, text.stream, first, stop)
        if self.has_unique_hashes:
            assert text.table.blocks == expected
        text.num_seen = stop

    def end_text(self, text: Text) -> None:
        self.texts.remove(text)
        blocks = list(text.table.blocks)
        text.table.release()
        self.record_release(blocks)

    def may_share(self, text: Text) -> bool:
        """At a block boundary, after cached blocks: the condition of `PrefixSharing`."""
        blocks = text.table.blocks
        return text.table.num_tokens % self.size == 0 and (not blocks or blocks[-1] in self.cache)

    def check_reads_its_own(self, text: Text) -> None:
        for position in range(text.table.num_tokens):
            block, offset = text.table.blocks[position // self.size], position % self.size
            assert self.held[block, offset] == text.prefix(position + 1), "a text reads another's tokens"

    def record_release(self, blocks: list[int]) -> None:
        self.now += 1
        prefix_of = {block: prefix for prefix, block in self.kept.items()}
        self.released_at.update((prefix_of[block], self.now) for block in blocks if block in prefix_of)
        self.cache.released(blocks)

    def forget(self, prefixes: list[Prefix]) -> None:
        for prefix in prefixes:
            del self.kept[prefix]
        self.newest = {key: prefix for key, prefix in self.newest.items() if prefix in self.kept}

    def expected_match(self, text: Text, first: int, stop: int) -> list[int]:
        blocks: list[int] = []
        for index in range(first, stop):
            block = self.kept.get(text.prefix((index + 1) * self.size))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def expected_part(self, text: Text, at: int, tokens: list[int]) -> tuple[int, int] | None:
        prefix = self.newest.get((text.prefix(at), tokens[0]))
        if prefix is None:
            return None
        same = [one == other for one, other in zip(prefix[1 + at :], tokens, strict=False)]
        return self.kept[prefix], [*same, False].index(False)

    def expected_keep(self, text: Text, first: int, stop: int) -> list[int]:
        """The table's blocks afterwards; records what is cached by then."""
        blocks = list(text.table.blocks)
        for index in range(first, stop):
            before, prefix = text.prefix(index * self.size), text.prefix((index + 1) * self.size)
            if index and self.kept.get(before) != blocks[index - 1]:
                break
            if prefix not in self.kept:
                self.kept[prefix] = blocks[index]
                self.newest[before, text.tokens[index * self.size]] = prefix
            blocks[index] = self.kept[prefix]
        return blocks


def run_machine(machine: type[Machine], phases: tuple[Phase, ...] = tuple(Phase)) -> Counter[str]:
    """Run a machine many times; returns how often each event happened."""
    happened: Counter[str] = Counter()
    counted = type("Counted", (machine,), {"happened": happened})
    run_state_machine_as_test(
        counted,
        settings=settings(
            max_examples=examples(250, quick=250),
            stateful_step_count=40,
            phases=phases,
            report_multiple_bugs=False,
        ),
    )
    return happened


def test_a_cache_agrees_with_a_dict_of_prefixes_after_any_events() -> None:
    happened = run_machine(Machine)
    for name in ("shared", "parts shared", "computed twice", "evicted", "cleared", "moved"):
        assert happened[name] >= 30, f"the machine hardly tests anything: {happened}"


class Colliding(Machine):
    """The same with a hash that is too short: a text that reads another's keys would be caught."""

    has_unique_hashes = False


def constant_hash(parent: bytes, tokens: object) -> bytes:
    return b"the same for all texts"


def one_bit_hash(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    return bytes([(sum(parent) + sum(tokens)) % 2])


@pytest.mark.parametrize("short", [constant_hash, one_bit_hash])
def test_hashes_that_collide_never_serve_other_tokens(
    monkeypatch: pytest.MonkeyPatch, short: Callable[..., bytes]
) -> None:
    monkeypatch.setattr(prefix_cache, "block_hash", short)
    happened = run_machine(Colliding)
    for name in ("shared", "evicted"):
        assert happened[name] >= 30, f"the machine hardly tests anything: {happened}"
