"""Day 3.4: prompts that begin alike find each other's keys and values, and do not compute them again.

When it passes, you have a cache that knows full blocks by what they hold and by all that comes before them.
It keeps them when their sequences have ended, shares them with whoever comes next, and gives them up where
pages are short, the least recently used first.
"""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.loader import LoadedModel, load_model
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.prefix_cache import PartMatch, PrefixCache, TokenBlocks, block_hash
from tiny_llm.prefix_kv_cache import PrefixCachingKVCache
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sequence import PagedSequence

from tiny_llm import SamplingParams

# The engine runs with and without compiled kernels; the warning that there are none is not this day's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")

# The same examples in every run, and no file that remembers the last failure.
quick = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)

# Task 1: block_hash

FIRST = bytes(32)  # stands for what the first block of some stream hangs on


def test_task_1_a_hash_is_32_bytes_and_the_same_for_the_same_text() -> None:
    """Oracle: the docstring: a list and a tuple of the same ids are the same text."""
    digest = block_hash(FIRST, [5, 6, 7, 8])
    assert isinstance(digest, bytes)
    assert len(digest) == 32
    assert block_hash(FIRST, [5, 6, 7, 8]) == digest
    assert block_hash(FIRST, (5, 6, 7, 8)) == digest


@pytest.mark.parametrize(
    "tokens",
    [
        *([5, 6, 7, 9], [8, 7, 6, 5], [5, 6, 7, 8 + 256], [5, 6, 7, 8 + 65_536]),
        *([5, 6, 78, 0], [56, 7, 8, 0], [5, 67, 8], [5, 6, 7], [5, 6, 7, 8, 8]),
    ],
)
def test_task_1_other_tokens_are_another_hash(tokens: list[int]) -> None:
    """Oracle: the docstring: another id, order, or way to read the digits, and large ids too.

    Ids that are joined into one number or cut down to a byte are the mistakes.
    """
    assert block_hash(FIRST, tokens) != block_hash(FIRST, [5, 6, 7, 8])


def test_task_1_the_same_tokens_after_another_text_are_another_hash() -> None:
    """Oracle: the docstring: keys and values depend on all tokens before.

    A hash without its parent is the mistake.
    """
    befores = [FIRST, block_hash(FIRST, [1, 2]), block_hash(FIRST, [2, 1]), bytes([1]) + bytes(31)]
    assert len({block_hash(before, [5, 6]) for before in befores}) == 4


@quick
@given(st.lists(st.tuples(st.integers(0, 1), *[st.integers(0, 3)] * 3), max_size=12))
def test_task_1_equal_hashes_are_equal_texts(texts: list[tuple[int, ...]]) -> None:
    """Oracle: a set of the texts themselves: what is before, and three tokens."""
    hashes = {block_hash(bytes([before]) * 32, tokens) for before, *tokens in texts}
    assert len(hashes) == len(set(texts))


# Task 2: TokenBlocks.extend


def stream_of(tokens: Sequence[int], block_size: int = 4, salt: str = "") -> TokenBlocks:
    """A stream of these tokens."""
    stream = TokenBlocks(block_size, salt)
    stream.extend(tokens)
    return stream


def test_task_2_a_text_is_cut_into_full_blocks() -> None:
    """Oracle: by hand: 11 tokens in blocks of 4; the last 3 are no full block."""
    stream = stream_of(range(11))
    assert stream.tokens == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert len(stream) == len(stream.hashes) == 2


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (12, 3)])
def test_task_2_only_full_blocks_count(length: int, blocks: int) -> None:
    """Oracle: by hand, blocks of 4: one block less where the text ends with a full one is the mistake."""
    assert len(stream_of([9] * length)) == blocks


def test_task_2_each_hash_stands_for_its_block_and_all_before() -> None:
    """Oracle: `block_hash`, block by block: the parent of the first is `parent(0)`."""
    stream = stream_of([1, 2, 3, 1, 2, 3, 7, 8, 9], block_size=3)
    before = stream.parent(0)
    for tokens, digest in zip([(1, 2, 3), (1, 2, 3), (7, 8, 9)], stream.hashes, strict=True):
        assert digest == block_hash(before, tokens)
        before = digest


def test_task_2_texts_have_the_same_hashes_as_far_as_they_are_the_same() -> None:
    """Oracle: by hand: they differ in token 5, in the second of three blocks."""
    one, other = stream_of(range(12)), stream_of([*range(5), 99, *range(6, 12)])
    assert [a == b for a, b in zip(one.hashes, other.hashes, strict=True)] == [True, False, False]
    assert one.tokens[2] == other.tokens[2]


def test_task_2_a_text_that_comes_in_pieces_is_the_same_text() -> None:
    """Oracle: the whole text at once. A rest is given again: nothing is remembered of it."""
    whole, pieces = stream_of(range(14)), TokenBlocks(4)
    pieces.extend(range(4))
    pieces.extend([4, 5, 6])
    pieces.extend([])
    pieces.extend(range(4, 14))
    assert (pieces.tokens, pieces.hashes) == (whole.tokens, whole.hashes)


def test_task_2_another_salt_is_another_hash_for_every_block() -> None:
    """Oracle: the docstring: tenants who do not share, with the same text of equal blocks."""
    streams = [stream_of([3] * 12, salt=salt) for salt in ("", "one", "two")]
    assert len({digest for stream in streams for digest in stream.hashes}) == 9


# Task 3: PrefixCache.keep


def make_cache(num_blocks: int = 12, block_size: int = 4) -> tuple[BlockAllocator, PrefixCache]:
    """An empty cache, and the allocator of its pool."""
    allocator = BlockAllocator(num_blocks)
    return allocator, PrefixCache(allocator, block_size)


def computed(allocator: BlockAllocator, num_tokens: int, block_size: int = 4) -> BlockTable:
    """A table with room for so many tokens: as if they had been computed."""
    table = BlockTable(allocator, block_size)
    table.append_tokens(num_tokens)
    return table


def keep(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> BlockTable:
    """A table that has computed these tokens, its full blocks kept."""
    table, stream = (
        computed(allocator, len(tokens), cache.block_size),
        stream_of(tokens, cache.block_size, salt),
    )
    cache.keep(table, stream, 0, len(stream))
    return table


def counts(allocator: BlockAllocator, blocks: Sequence[int]) -> list[int]:
    """How many holders each of these blocks has."""
    return [allocator.ref_count(block) for block in blocks]


def holders(table: BlockTable) -> list[int]:
    """How many holders each of a table's blocks has, in the table's order."""
    return counts(table.allocator, table.blocks)


def test_task_3_the_cache_is_one_more_holder_of_what_it_keeps() -> None:
    """Oracle: by hand: two full blocks, and one that is half full. No new holder is the mistake."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, range(10))
    assert sorted(cache.blocks) == sorted(table.blocks[:2])
    assert len(cache) == 2
    assert holders(table) == [2, 2, 1]
    assert allocator.num_free == 12 - 3


def test_task_3_what_is_kept_outlives_its_table() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, range(10))
    blocks = list(table.blocks)
    table.release()
    assert counts(allocator, blocks) == [1, 1, 0]
    assert allocator.num_free == 12 - 2


def test_task_3_a_table_is_kept_as_it_grows() -> None:
    """Oracle: by hand: each block once it is full, and again without any change."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), computed(allocator, 12)
    for first, stop in ((0, 1), (1, 1), (1, 3), (0, 3)):
        cache.keep(table, stream, first, stop)
        assert sorted(cache.blocks) == sorted(table.blocks[:stop])
    assert holders(table) == [2, 2, 2]
    assert len(set(table.blocks)) == 3


def test_task_3_what_two_have_computed_is_in_the_pool_once() -> None:
    """Oracle: by hand: two equal blocks of three. Whose go back is decided: the cache had the first's.

    A block that goes back and still stands in the table is another's a moment later: the mistake.
    """
    allocator, cache = make_cache()
    first, second = computed(allocator, 12), computed(allocator, 12)
    held, own = list(first.blocks), list(second.blocks)
    cache.keep(first, stream_of(range(12)), 0, 3)
    cache.keep(second, stream_of([*range(8), 0, 0, 0, 0]), 0, 3)
    assert first.blocks == held
    assert second.blocks == [*held[:2], own[2]]
    assert counts(allocator, held) == [3, 3, 2]
    assert counts(allocator, own) == [0, 0, 2]
    assert len(cache) == 4
    assert allocator.num_free == 12 - 4


def test_task_3_the_same_tokens_in_another_place_are_another_block() -> None:
    """Oracle: by hand: what comes before is different, so keys and values are."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, [7] * 12)
    assert len(cache) == len(set(table.blocks)) == 3


def forged(tokens: Sequence[int], hashes: Sequence[bytes]) -> TokenBlocks:
    """A stream whose first hashes are those of another text: what a collision would look like."""
    stream = stream_of(tokens)
    stream.hashes[: len(hashes)] = hashes
    return stream


def test_task_3_other_tokens_under_the_same_hash_stay_the_tables_alone() -> None:
    """Oracle: the docstring: the table keeps its own, and nothing is kept behind: nobody could find it."""
    allocator, cache = make_cache()
    first = keep(allocator, cache, range(8))
    second = computed(allocator, 8)
    own = list(second.blocks)
    cache.keep(second, forged([9, 9, 9, 9, 1, 1, 1, 1], stream_of(range(4)).hashes), 0, 2)
    assert second.blocks == own
    assert counts(allocator, own) == [1, 1]
    assert sorted(cache.blocks) == sorted(first.blocks)
    assert holders(first) == [2, 2]


def test_task_3_the_same_tokens_after_others_under_the_same_hash_are_no_reason_to_share() -> None:
    """Oracle: the docstring: the same tokens behind the same parent. Here the parent is another."""
    allocator, cache = make_cache()
    first, second = keep(allocator, cache, range(8)), computed(allocator, 4)
    cache.keep(second, forged([4, 5, 6, 7], stream_of(range(8)).hashes[1:]), 0, 1)
    assert set(second.blocks).isdisjoint(first.blocks)
    assert holders(second) == [1]


def test_task_3_behind_a_block_that_is_not_kept_none_is() -> None:
    """Oracle: the docstring: the cache is cleared while a table is at its third block."""
    allocator, cache = make_cache()
    stream, table = stream_of(range(12)), computed(allocator, 12)
    cache.keep(table, stream, 0, 2)
    cache.clear()
    cache.keep(table, stream, 2, 3)
    assert len(cache) == 0
    assert holders(table) == [1, 1, 1]


# Task 4: PrefixCache.match


def test_task_4_what_is_kept_is_found_in_order() -> None:
    """Oracle: by hand: also when the table has gone."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, range(13))
    blocks = list(table.blocks)
    assert list(cache.match(stream_of(range(13)), 0, 3)) == blocks[:3]
    table.release()
    assert list(cache.match(stream_of(range(20)), 0, 5)) == blocks[:3]


def test_task_4_looking_is_not_holding() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, range(12))
    cache.match(stream_of(range(12)), 0, 3)
    assert holders(table) == [2, 2, 2]


def test_task_4_only_the_blocks_that_are_asked_for() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = keep(allocator, cache, range(16)).blocks
    stream = stream_of(range(16))
    assert list(cache.match(stream, 1, 3)) == blocks[1:3]
    assert list(cache.match(stream, 3, 4)) == blocks[3:]
    assert list(cache.match(stream, 2, 2)) == []


def test_task_4_a_text_is_found_as_far_as_it_goes_unbroken() -> None:
    """Oracle: by hand: the second block of four is another, and so is all that hangs on it."""
    allocator, cache = make_cache()
    blocks = keep(allocator, cache, range(16)).blocks
    assert list(cache.match(stream_of([*range(7), 99, *range(8, 16)]), 0, 4)) == blocks[:1]
    assert list(cache.match(stream_of([99, *range(1, 16)]), 0, 4)) == []
    assert list(cache.match(stream_of(range(4, 16)), 0, 3)) == []


def test_task_4_a_hole_ends_a_match() -> None:
    """Oracle: by hand: the second block of a text that collides with another is not the one that is kept.

    Going on behind it is the mistake: the third one has its hash, its tokens and its parent.
    """
    allocator, cache = make_cache()
    blocks = keep(allocator, cache, range(12)).blocks
    stream = stream_of(range(12))
    stream.tokens[1] = (9, 9, 9, 9)
    assert list(cache.match(stream, 0, 3)) == blocks[:1]


def test_task_4_a_hash_is_not_believed() -> None:
    """Oracle: by hand: another's hashes with other tokens, or with the right ones after other ones.

    Serving them would be answering from another's text: the mistake that this finds.
    """
    allocator, cache = make_cache()
    keep(allocator, cache, range(8))
    hashes = stream_of(range(8)).hashes
    assert list(cache.match(forged([9] * 8, hashes), 0, 2)) == []
    assert len(cache.match(forged([0, 1, 2, 3, 9, 9, 9, 9], hashes), 0, 2)) == 1
    assert list(cache.match(forged([4, 5, 6, 7], hashes[1:]), 0, 1)) == []


def test_task_4_salts_keep_texts_apart() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = keep(allocator, cache, range(8), "one").blocks
    assert list(cache.match(stream_of(range(8), salt="one"), 0, 2)) == blocks
    assert list(cache.match(stream_of(range(8), salt="two"), 0, 2)) == []
    assert list(cache.match(stream_of(range(8)), 0, 2)) == []


# Task 5: PrefixCache.released


def let_go(cache: PrefixCache, table: BlockTable) -> None:
    """Release a table and tell the cache, as the engine does."""
    blocks = list(table.blocks)
    table.release()
    cache.released(blocks)


def found(cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> list[int]:
    """The kept blocks of a text, as far as they go."""
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
    table = keep(allocator, cache, range(10))
    assert cache.num_idle == 0
    let_go(cache, table)
    assert cache.num_idle == 2
    assert allocator.num_free == 12 - 2


def test_task_5_a_block_that_another_table_holds_is_not_idle() -> None:
    """Oracle: by hand: two tables begin alike: two blocks are shared, and each has one of its own."""
    allocator, cache = make_cache()
    first = keep(allocator, cache, range(12))
    second = keep(allocator, cache, [*range(8), 9, 9, 9, 9])
    let_go(cache, first)
    assert cache.num_idle == 1
    let_go(cache, second)
    assert cache.num_idle == 4


def test_task_5_blocks_that_are_not_kept_are_nobodys_matter() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    let_go(cache, computed(allocator, 12))
    cache.released([])
    assert cache.num_idle == len(cache) == 0


def test_task_5_who_shares_an_idle_block_wakes_it() -> None:
    """Oracle: by hand: there and back, twice."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, range(12)))
    for _ in range(2):
        table = shared(allocator, cache, range(8))
        assert cache.num_idle == 1
        assert holders(table) == [2, 2]
        let_go(cache, table)
        assert cache.num_idle == 3


def test_task_5_who_has_computed_what_lies_idle_wakes_it_too() -> None:
    """Oracle: by hand: `keep` hands out an idle block, which is idle no more."""
    allocator, cache = make_cache()
    table = computed(allocator, 8)
    let_go(cache, keep(allocator, cache, range(8)))
    assert cache.num_idle == 2
    cache.keep(table, stream_of(range(8)), 0, 1)
    assert cache.num_idle == 1
    cache.keep(table, stream_of(range(8)), 1, 2)
    assert cache.num_idle == 0
    assert holders(table) == [2, 2]
    let_go(cache, table)
    assert cache.num_idle == 2


# Task 6: PrefixCache.evict


@pytest.mark.parametrize(("asked", "given_up"), [(0, 0), (1, 1), (3, 3), (4, 3), (100, 3), (-2, 0)])
def test_task_6_no_more_is_given_up_than_is_asked_for_and_idle(asked: int, given_up: int) -> None:
    """Oracle: by hand: three are idle."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, range(12)))
    assert cache.evict(asked) == given_up
    assert cache.num_idle == len(cache) == 3 - given_up
    assert allocator.num_free == 9 + given_up


def test_task_6_what_is_given_up_is_found_no_more_and_can_be_kept_again() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, range(12)))
    cache.evict(3)
    assert found(cache, range(12)) == []
    assert allocator.num_free == 12
    let_go(cache, keep(allocator, cache, range(12)))
    assert len(found(cache, range(12))) == 3


def test_task_6_what_a_table_holds_is_not_given_up() -> None:
    """Oracle: by hand: of three kept blocks one is idle."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, range(12)))
    table = shared(allocator, cache, range(8))
    assert cache.evict(12) == 1
    assert found(cache, range(12)) == table.blocks
    assert holders(table) == [2, 2]


def test_task_6_of_one_text_the_deepest_goes_first() -> None:
    """Oracle: by hand: a beginning is of use without its end, and an end never without its beginning."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, range(16)))
    left = []
    for _ in range(4):
        cache.evict(1)
        left.append(len(found(cache, range(16))))
    assert left == [3, 2, 1, 0]


def lost(cache: PrefixCache, texts: dict[str, Sequence[int]], number: int) -> list[str]:
    """Give up so many blocks one by one, and say which text was cut short by each."""
    names = []
    for _ in range(number):
        before = {name: len(found(cache, tokens)) for name, tokens in texts.items()}
        cache.evict(1)
        names += [name for name, tokens in texts.items() if len(found(cache, tokens)) < before[name]]
    return names


def test_task_6_the_least_recently_used_text_goes_first() -> None:
    """Oracle: by hand: they were kept in one order and let go of in another, which counts."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 4, "c": [3] * 8}
    tables = {name: keep(allocator, cache, tokens) for name, tokens in texts.items()}
    for name in ("c", "a", "b"):
        let_go(cache, tables[name])
    assert lost(cache, texts, 5) == ["c", "c", "a", "a", "b"]


def test_task_6_to_be_used_again_is_to_go_later() -> None:
    """Oracle: by hand: the oldest text is shared by somebody, who leaves again."""
    allocator, cache = make_cache()
    texts: dict[str, Sequence[int]] = {"a": [1] * 8, "b": [2] * 8, "c": [3] * 8}
    for tokens in texts.values():
        let_go(cache, keep(allocator, cache, tokens))
    let_go(cache, shared(allocator, cache, texts["a"]))
    assert lost(cache, texts, 6) == ["b", "b", "c", "c", "a", "a"]


def test_task_6_what_two_texts_share_goes_after_both() -> None:
    """Oracle: by hand: one shared block; each text has another behind it."""
    allocator, cache = make_cache()
    one, two = [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3, 3, 3]
    first, second = keep(allocator, cache, one), keep(allocator, cache, two)
    let_go(cache, first)
    let_go(cache, second)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 2)
    cache.evict(1)
    assert (len(found(cache, one)), len(found(cache, two))) == (1, 1)


class Prefixes(RuleBasedStateMachine):
    """Texts are begun, go on, end, and are given up, on a pool that is often too small for them."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 3))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.cache = make_cache(num_blocks, block_size)
        self.texts: list[tuple[BlockTable, list[int]]] = []
        self.holds: dict[int, tuple[int, ...]] = {}  # the text that was computed into each block
        self.given_up: list[tuple[int, ...]] = []

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
            let_go(self.cache, table)
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
        let_go(self.cache, table)

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
        assert gone.isdisjoint(in_use), "given up while somebody reads it"

    @invariant()
    def check(self) -> None:
        kept = self.cache.blocks
        held = Counter(block for table, _ in self.texts for block in table.blocks)
        assert self.cache.num_idle == len(set(kept) - set(held))
        held.update(kept)
        assert counts(self.allocator, range(self.allocator.num_blocks)) == [
            held[block] for block in range(self.allocator.num_blocks)
        ]
        assert self.allocator.num_free + len(held) == self.allocator.num_blocks
        assert len({self.holds[block] for block in kept}) == len(kept), "a prefix is in the pool twice"
        for table, tokens in self.texts:
            self.check_reads_its_own(table, tokens)

    def check_reads_its_own(self, table: BlockTable, tokens: list[int]) -> None:
        size = table.block_size
        for i, block in enumerate(table.blocks):
            assert self.holds[block] == tuple(tokens[: (i + 1) * size]), "somebody reads another's text"


def test_task_6_blocks_are_conserved_and_nobody_reads_anothers_text() -> None:
    """Oracle: a count of all holders, and the text that was computed into each block, as a tuple.

    Free blocks and held ones are the whole pool; a block has as many holders as tables and the cache name it;
    a prefix is there once; idle blocks can be had, others cannot, and no end stays without its beginning.
    """
    run_state_machine_as_test(Prefixes, settings=settings(quick, max_examples=80, stateful_step_count=25))


# Task 7: PrefixCache.match_part


def root() -> bytes:
    """What the first block of a stream hangs on."""
    return TokenBlocks(4).parent(0)


@pytest.mark.parametrize(
    ("tokens", "length"), [([5, 6, 7, 8], 4), ([5, 6, 7], 3), ([5, 6, 9, 8], 2), ([5, 9, 7, 8], 1), ([5], 1)]
)
def test_task_7_the_common_beginning_is_counted(tokens: list[int], length: int) -> None:
    """Oracle: by hand: equal tokens behind a difference do not count."""
    allocator, cache = make_cache()
    table = keep(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), tokens) == PartMatch(table.blocks[0], length)


def test_task_7_nothing_in_common_is_no_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    assert cache.match_part(root(), [5, 6]) is None
    keep(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), [6, 6, 7, 8]) is None


def test_task_7_the_text_before_counts() -> None:
    """Oracle: by hand: the second block hangs on the first, and on nothing else."""
    allocator, cache = make_cache()
    table, stream = keep(allocator, cache, range(8)), stream_of(range(8))
    assert cache.match_part(stream.parent(1), [4, 5, 0]) == PartMatch(table.blocks[1], 2)
    assert cache.match_part(stream.parent(0), [4, 5, 0]) is None
    assert cache.match_part(stream.hashes[1], [4, 5, 0]) is None
    assert cache.match_part(TokenBlocks(4, "salt").parent(0), [0, 1, 2]) is None


def test_task_7_of_several_the_one_that_was_kept_last() -> None:
    """Oracle: the docstring: two blocks begin with token 5; one that begins with another does not count."""
    allocator, cache = make_cache()
    keep(allocator, cache, [5, 6, 7, 8])
    newer = keep(allocator, cache, [5, 6, 0, 0])
    keep(allocator, cache, [9, 9, 9, 9])
    assert cache.match_part(root(), [5, 6, 7, 8]) == PartMatch(newer.blocks[0], 2)


def test_task_7_what_was_given_up_is_no_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, [5, 6, 7, 8]))
    assert cache.match_part(root(), [5, 6]) is not None
    cache.evict(1)
    assert cache.match_part(root(), [5, 6]) is None


def test_task_7_looking_is_not_holding() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    let_go(cache, keep(allocator, cache, [5, 6, 7, 8]))
    cache.match_part(root(), [5, 6])
    assert cache.num_idle == 1
    assert allocator.num_free == 11


# Task 8: PrefixSharing.adopt


def make_sharing(num_blocks: int = 24, block_size: int = 4) -> tuple[BlockAllocator, PrefixSharing]:
    """A policy with an empty cache, and the allocator of its pool."""
    allocator = BlockAllocator(num_blocks)
    return allocator, PrefixSharing(allocator, block_size)


def sequence_of(
    allocator: BlockAllocator, tokens: Sequence[int], outputs: Sequence[int] = (), **params: object
) -> PagedSequence:
    """A sequence with these tokens, of which none is computed; blocks of 4."""
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return PagedSequence(
        seq_id="one",
        request_id="one",
        prompt=tuple(tokens),
        params=sampling,
        seed=0,
        max_len=100,
        outputs=list(outputs),
        tables=[BlockTable(allocator, 4)],
        streams=[TokenBlocks(4, sampling.cache_salt)],
    )


def compute(sharing: PrefixSharing, sequence: PagedSequence, count: int) -> None:
    """Compute the next tokens of a sequence and keep what is full: as if a step had done it."""
    start = sequence.num_computed
    sequence.table.append_tokens(count)
    sequence.num_computed += count
    sharing.keep(sequence, start)


def serve(
    allocator: BlockAllocator, sharing: PrefixSharing, tokens: Sequence[int], **params: object
) -> list[int]:
    """Compute all of a text; its blocks, which nobody holds any more."""
    sequence = sequence_of(allocator, tokens, **params)
    compute(sharing, sequence, len(tokens))
    blocks = list(sequence.table.blocks)
    sequence.give_up_pages()
    sharing.released(blocks)
    return blocks


def test_task_8_what_is_kept_comes_into_the_table_and_counts_as_computed() -> None:
    """Oracle: by hand: 10 tokens are kept as two blocks; 14 begin like them."""
    allocator, sharing = make_sharing()
    kept = serve(allocator, sharing, range(10))[:2]
    sequence = sequence_of(allocator, range(14))
    sharing.adopt(sequence)
    assert sequence.table.blocks == kept
    assert sequence.table.num_tokens == sequence.num_computed == sequence.num_cached_tokens == 8
    assert sequence.num_uncomputed == 6
    assert counts(allocator, kept) == [2, 2]
    assert sharing.num_idle == 0


@pytest.mark.parametrize(
    ("length", "adopted"),
    [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12), (16, 12), (17, 16)],
)
def test_task_8_the_last_token_is_left_to_compute(length: int, adopted: int) -> None:
    """Oracle: by hand, blocks of 4 that are all kept. No token left, no logits: a step that never ends."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(20))
    sequence = sequence_of(allocator, range(length))
    sharing.adopt(sequence)
    assert sequence.num_computed == sequence.table.num_tokens == adopted


def test_task_8_nothing_that_is_kept_is_nothing_to_share() -> None:
    """Oracle: by hand: an empty cache, and another text."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(12))
    sharing.adopt(sequence)
    serve(allocator, sharing, [9] * 12)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed, sequence.num_cached_tokens) == (0, 0, 0)
    assert sharing.num_idle == 3


def test_task_8_a_sequence_under_way_takes_what_has_come() -> None:
    """Oracle: by hand: one block computed by itself, and by then two more are there."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 4)
    serve(allocator, sharing, range(12))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (12, 8)
    assert len(set(sequence.table.blocks)) == 3
    assert holders(sequence.table) == [2, 2, 2]


def test_task_8_within_a_block_nothing_is_shared() -> None:
    """Oracle: by hand: 6 of 20 tokens are computed; a whole block would not fit behind half of one."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 6)
    serve(allocator, sharing, range(20))
    held = list(sequence.table.blocks)
    sharing.adopt(sequence)
    assert (sequence.table.blocks, sequence.num_computed) == (held, 6)


def test_task_8_who_is_asked_for_log_probabilities_of_the_prompt_computes_it() -> None:
    """Oracle: by hand: logits exist only for tokens that are computed."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(12), prompt_logprobs=1)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed) == (0, 0)


def test_task_8_what_was_said_before_a_preemption_is_shared_like_a_prompt() -> None:
    """Oracle: by hand: a prompt of 6 and 7 outputs: all but the last token was computed before.

    How many tokens were cached is said once, about the prompt, and that was before its first output.
    """
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(6), outputs=range(6, 13))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_uncomputed) == (12, 1)
    assert sequence.num_cached_tokens == 0


def test_task_8_salts_keep_tenants_apart() -> None:
    """Oracle: by hand."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12), cache_salt="one")
    adopted = []
    for salt in ("one", "two", ""):
        sequence = sequence_of(allocator, range(12), cache_salt=salt)
        sharing.adopt(sequence)
        adopted.append(sequence.num_computed)
    assert adopted == [8, 0, 0]


# Task 9: PrefixSharing.next_block


def test_task_9_who_has_the_same_text_has_the_same_next_block() -> None:
    """Oracle: by hand: alike for two blocks, and different in the third."""
    allocator, sharing = make_sharing()
    one, other = sequence_of(allocator, range(13)), sequence_of(allocator, [*range(9), 99, *range(10, 13)])
    seen = []
    for _ in range(3):
        assert sharing.next_block(one) is not None
        seen.append(sharing.next_block(one) == sharing.next_block(other))
        compute(sharing, one, 4)
        compute(sharing, other, 4)
    assert seen == [True, True, False]


def test_task_9_each_block_is_another() -> None:
    """Oracle: by hand: equal tokens all the way."""
    allocator, sharing = make_sharing()
    sequence, seen = sequence_of(allocator, [7] * 13), set()
    for _ in range(3):
        seen.add(sharing.next_block(sequence))
        compute(sharing, sequence, 4)
    assert len(seen) == 3


def test_task_9_a_block_that_is_half_full_is_the_next_one_still() -> None:
    """Oracle: by hand: 0, 1 and 3 tokens of the first block are computed, then all 4."""
    allocator, sharing = make_sharing()
    sequence, seen = sequence_of(allocator, range(9)), []
    for count in (0, 1, 2, 1):
        compute(sharing, sequence, count)
        seen.append(sharing.next_block(sequence))
    assert seen[0] is not None
    assert [block == seen[0] for block in seen] == [True, True, True, False]


@pytest.mark.parametrize(
    ("length", "count", "is_known"), [(3, 0, False), (4, 0, True), (7, 4, False), (8, 4, True), (8, 7, True)]
)
def test_task_9_a_block_that_is_not_all_known_stands_for_nothing(
    length: int, count: int, is_known: bool
) -> None:
    """Oracle: by hand: what fills the rest is not known yet; a last block that is full is known."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(length))
    compute(sharing, sequence, count)
    assert (sharing.next_block(sequence) is not None) == is_known


def test_task_9_outputs_are_known_tokens() -> None:
    """Oracle: by hand: 2 tokens of a prompt and 3 outputs fill one block of 4, as a prompt of 5 does."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, [0, 1], outputs=[2, 3, 4])
    assert sharing.next_block(sequence) is not None
    assert sharing.next_block(sequence) == sharing.next_block(sequence_of(allocator, range(5)))


def test_task_9_tenants_do_not_wait_for_each_other() -> None:
    """Oracle: by hand."""
    allocator, sharing = make_sharing()
    salts = ("", "one", "two")
    assert len({sharing.next_block(sequence_of(allocator, range(9), cache_salt=salt)) for salt in salts}) == 3


class NewestGivesWay:
    """Preemption as a later day has it: whoever came last gives way."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and a block to grow into."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Sequence[PagedSequence]) -> PagedSequence:
        """The last."""
        return candidates[-1]


def manager_of(num_blocks: int = 40, budget: int = 256) -> PagedBatchManager:
    """A batch manager that shares prefixes and computes nothing: blocks of 4, eight sequences at once."""
    policies = Policies(preemption=NewestGivesWay(), prefix=PrefixSharing)
    return PagedBatchManager(num_blocks, 4, 8, max_batched_tokens=budget, policies=policies)


def run(manager: PagedBatchManager, prompts: dict[str, Sequence[int]], max_tokens: int = 1) -> dict[str, int]:
    """Serve prompts that come together; the tokens that were computed for each.

    The outputs are 0, 1, 2 and so on. After each step all blocks are counted.
    """
    for name, prompt in prompts.items():
        manager.add_request(list(prompt), name, SamplingParams(max_tokens=max_tokens))
    computed_tokens = dict.fromkeys(prompts, 0)
    for _ in range(1_000):
        if not manager.has_work:
            return computed_tokens
        known = {sequence.seq_id: sequence for sequence in [*manager.running, *manager.waiting]}
        ready = list(manager.process_batch())
        for name in ready:
            sequence = known[name]
            first = not sequence.outputs
            computed_tokens[name] += sequence.num_tokens - sequence.num_cached_tokens if first else 1
            manager.commit({name: len(sequence.outputs)})
            if sequence.num_tokens == sequence.max_len:
                manager.finish(name)
        check_blocks(manager)
    raise AssertionError("a prompt is never served")


def check_blocks(manager: PagedBatchManager) -> None:
    """Every block is free, or counted once for each table that holds it and once for the cache."""
    held = Counter(block for sequence in manager.running for block in sequence.table.blocks)
    assert manager.prefix.num_idle == len(set(manager.prefix.blocks) - set(held))
    held.update(manager.prefix.blocks)
    total = manager.allocator.num_blocks
    assert counts(manager.allocator, range(total)) == [held[block] for block in range(total)]
    assert manager.allocator.num_free + len(held) == total


@pytest.mark.parametrize("budget", [256, 12, 8])
def test_task_9_equal_prompts_that_come_together_are_computed_once(budget: int) -> None:
    """Oracle: by hand: 22 tokens are five blocks of 4 and two more, which everybody computes.

    A batch in which nobody waits computes 66 tokens instead of 26.
    """
    prompt = range(22)
    assert run(manager_of(budget=budget), {"a": prompt, "b": prompt, "c": prompt}) == {
        "a": 22,
        "b": 2,
        "c": 2,
    }


def test_task_9_the_next_turn_of_a_chat_finds_the_last_answer() -> None:
    """Oracle: by hand: 10 tokens and two outputs are kept as three blocks."""
    manager = manager_of()
    run(manager, {"first": [9] * 10}, max_tokens=4)
    assert run(manager, {"next": [*[9] * 10, 0, 1, 2, 3, 8, 8]}) == {"next": 16 - 12}


def test_task_9_a_pool_full_of_what_nobody_uses_admits_everybody() -> None:
    """Oracle: by hand: all 8 blocks are kept and idle; a prompt that shares nothing needs all of them."""
    manager = manager_of(8)
    run(manager, {"a": [1] * 16})
    run(manager, {"b": [2] * 16})
    assert (manager.allocator.num_free, manager.prefix.num_idle) == (0, 8)
    assert run(manager, {"c": [3] * 31}) == {"c": 31}


@quick
@given(
    num_blocks=st.integers(7, 20),
    budget=st.integers(8, 40),
    crowds=st.lists(
        st.lists(
            st.tuples(st.integers(0, 16), st.lists(st.integers(2, 3), min_size=1, max_size=3)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_task_9_crowds_that_share_lose_no_block(
    num_blocks: int, budget: int, crowds: list[list[tuple[int, list[int]]]]
) -> None:
    """Oracle: a count of all holders after each step; in the end free and kept blocks are the whole pool."""
    manager = manager_of(num_blocks, budget)
    for number, crowd in enumerate(crowds):
        prompts = {f"{number}:{i}": [1] * same + own for i, (same, own) in enumerate(crowd)}
        run(manager, prompts, max_tokens=6)
    kept = len(manager.prefix.blocks)
    assert manager.prefix.num_idle == kept
    assert manager.prefix.evict(num_blocks) == kept
    assert manager.allocator.num_free == num_blocks


def answers(
    loaded: LoadedModel, prompts: list[str], policies: Policies, waves: int
) -> list[list[PagedSequence]]:
    """Serve the prompts three tokens long, all together, `waves` times; the sequences of each wave."""
    manager = PagedBatchManager(64, 8, 4, model=loaded.model, policies=policies)
    served = []
    for wave in range(waves):
        for i, prompt in enumerate(prompts):
            manager.add_request(loaded.tokenizer.encode(prompt), f"{wave}.{i}", SamplingParams(max_tokens=3))
        sequences = [manager.sequence(f"{wave}.{i}") for i in range(len(prompts))]
        while manager.has_work:
            logits = manager.process_batch()
            manager.commit({seq_id: int(mx.argmax(row).item()) for seq_id, row in logits.items()})
            for seq_id in list(logits):
                if len(manager.sequence(seq_id).outputs) == 3:
                    manager.finish(seq_id)
        served.append(sequences)
    return served


def test_task_9_the_real_model_answers_the_same_and_computes_less() -> None:
    """Oracle: the same manager without prefix caching; what is shared is counted in full blocks of 8."""
    system = "You keep a lighthouse, and you answer whoever asks you in a single short sentence."
    prompts = [f"{system} Who are you?", f"{system} What shines?"]
    loaded = load_model(None)
    [plain] = answers(loaded, prompts, Policies(), waves=1)
    _, warm = answers(loaded, prompts, Policies(prefix=PrefixSharing), waves=2)
    full_blocks = (len(loaded.tokenizer.encode(system)) - 1) // 8
    assert full_blocks > 1
    assert [one.num_cached_tokens for one in plain] == [0, 0]
    assert [one.outputs for one in warm] == [one.outputs for one in plain]
    assert all(one.num_cached_tokens >= 8 * full_blocks for one in warm)


# Task 10: PrefixCachingKVCache.get_or_create_prefix

HEADS, D = 2, 3


def make_kv_cache(total_blocks: int = 8) -> PrefixCachingKVCache:
    """Blocks of 4 tokens."""
    return PrefixCachingKVCache(total_blocks, 4, HEADS, D, mx.float32)


def write(cache: PrefixCachingKVCache, seq_id: str, start: int, numbers: Sequence[float]) -> None:
    """Write tokens from a position on: each number is another token."""
    for position, number in enumerate(numbers, start):
        cache.write_token(seq_id, position, mx.full((HEADS, D), number), mx.full((HEADS, D), -number))


def read(cache: PrefixCachingKVCache, seq_id: str) -> list[float]:
    """All tokens of a sequence, as numbers."""
    keys, values = cache.read_blocks(seq_id, 0, cache.tables[seq_id].num_tokens)
    assert keys.tolist() == (-values).tolist()
    return keys[0, :, 0].tolist()


def expect_conserved(cache: PrefixCachingKVCache) -> None:
    """Every block is free, or counted once for each sequence and each prefix that holds it."""
    held = Counter(block for table in cache.tables.values() for block in table.blocks)
    total = cache.allocator.num_blocks
    assert counts(cache.allocator, range(total)) == [held[block] for block in range(total)]
    assert cache.allocator.num_free == total - len(held)


def test_task_10_a_new_prefix_takes_its_blocks() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4; it is a sequence that can be written and read."""
    cache = make_kv_cache()
    blocks = cache.get_or_create_prefix("sys", 6)
    assert len(set(blocks)) == 2
    assert cache.allocator.num_free == 6
    write(cache, "sys", 0, range(1, 7))
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]


def test_task_10_asking_again_takes_no_block_and_changes_nothing() -> None:
    """Oracle: by hand: growing by as many tokens each time is the mistake."""
    cache = make_kv_cache()
    blocks = list(cache.get_or_create_prefix("sys", 6))
    write(cache, "sys", 0, range(1, 7))
    for _ in range(3):
        assert list(cache.get_or_create_prefix("sys", 6)) == blocks
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    expect_conserved(cache)


def test_task_10_what_is_returned_is_the_callers() -> None:
    """Oracle: by hand: a list that the table goes on using would let a caller change the table."""
    cache = make_kv_cache()
    for _ in range(2):
        cache.get_or_create_prefix("sys", 6).clear()
    assert len(cache.tables["sys"].blocks) == 2


def test_task_10_another_length_under_the_same_name_is_refused() -> None:
    """Oracle: the docstring."""
    cache = make_kv_cache()
    cache.get_or_create_prefix("sys", 6)
    for length in (5, 7):
        with pytest.raises(ValueError):
            cache.get_or_create_prefix("sys", length)
    assert cache.tables["sys"].num_tokens == 6
    expect_conserved(cache)


def test_task_10_prefixes_share_nothing() -> None:
    """Oracle: by hand: the caller says what is alike."""
    cache = make_kv_cache()
    assert set(cache.get_or_create_prefix("one", 6)).isdisjoint(cache.get_or_create_prefix("two", 6))


def test_task_10_a_prefix_that_does_not_fit_changes_nothing() -> None:
    """Oracle: the docstring: 9 tokens need three blocks, and two are free."""
    cache = make_kv_cache(4)
    cache.get_or_create_prefix("one", 5)
    with pytest.raises(OutOfBlocksError):
        cache.get_or_create_prefix("two", 9)
    assert set(cache.tables) == {"one"}
    expect_conserved(cache)


# Task 11: PrefixCachingKVCache.allocate_with_prefix


def with_prefix(total_blocks: int = 8, length: int = 6) -> PrefixCachingKVCache:
    """A cache with a prefix "sys" of the tokens 1, 2, 3 and so on."""
    cache = make_kv_cache(total_blocks)
    cache.get_or_create_prefix("sys", length)
    write(cache, "sys", 0, range(1, length + 1))
    return cache


def test_task_11_a_sequence_begins_with_the_prefix() -> None:
    """Oracle: by hand: 6 tokens and 3 more: one full block is shared, the half-full one is a copy."""
    cache = with_prefix()
    blocks = cache.allocate_with_prefix("a", "sys", 9)
    assert len(blocks) == len(set(blocks)) == 3
    assert blocks[0] == cache.tables["sys"].blocks[0]
    assert blocks[1] != cache.tables["sys"].blocks[1]
    write(cache, "a", 6, [7, 8, 9])
    assert read(cache, "a") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    assert cache.allocator.num_free == 8 - 4
    expect_conserved(cache)


def test_task_11_full_blocks_are_shared_without_a_copy() -> None:
    """Oracle: by hand: a prefix of two full blocks, and three users with 1, 4 and 5 tokens of their own."""
    cache = with_prefix(length=8)
    for seq_id, total in (("a", 9), ("b", 12), ("c", 13)):
        assert cache.allocate_with_prefix(seq_id, "sys", total)[:2] == cache.tables["sys"].blocks
    assert cache.allocator.num_free == 8 - 2 - 1 - 1 - 2
    assert holders(cache.tables["sys"]) == [4, 4]


def test_task_11_who_adds_nothing_shares_everything() -> None:
    """Oracle: by hand: the half-full block too, until somebody writes."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 6)
    assert cache.tables["a"].blocks == cache.tables["sys"].blocks
    assert cache.allocator.num_free == 8 - 2
    write(cache, "a", 5, [60])
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    assert read(cache, "a") == [1, 2, 3, 4, 5, 60]
    expect_conserved(cache)


def test_task_11_fifty_users_hold_one_copy_of_it() -> None:
    """Oracle: by hand: 64 tokens are 16 blocks, and each user has one block of its own: 66 instead of 850."""
    cache = with_prefix(16 + 50, length=64)
    for user in range(50):
        cache.allocate_with_prefix(f"user {user}", "sys", 65 + user % 4)
    assert cache.allocator.num_free == 0
    assert holders(cache.tables["sys"]) == [51] * 16


def test_task_11_the_prefix_and_its_users_outlive_each_other() -> None:
    """Oracle: by hand."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 7)
    cache.allocate_with_prefix("b", "sys", 7)
    write(cache, "b", 6, [7])
    cache.free_sequence("a")
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    cache.free_sequence("sys")
    assert read(cache, "b") == [1, 2, 3, 4, 5, 6, 7]
    expect_conserved(cache)
    cache.free_sequence("b")
    assert cache.allocator.num_free == 8


def test_task_11_what_cannot_be_is_refused() -> None:
    """Oracle: the docstring: an unknown prefix, a sequence that is there, fewer tokens than the prefix."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 7)
    before = {name: list(table.blocks) for name, table in cache.tables.items()}
    with pytest.raises(KeyError):
        cache.allocate_with_prefix("b", "other", 9)
    for seq_id, total in (("a", 9), ("sys", 9), ("b", 5)):
        with pytest.raises(ValueError):
            cache.allocate_with_prefix(seq_id, "sys", total)
    assert {name: list(table.blocks) for name, table in cache.tables.items()} == before
    expect_conserved(cache)


@pytest.mark.parametrize("total", [7, 8, 9, 40])
def test_task_11_a_sequence_that_does_not_fit_changes_nothing(total: int) -> None:
    """Oracle: the docstring: no block is free, and the copy needs one.

    References that stay are the mistake.
    """
    cache = with_prefix(2)
    with pytest.raises(OutOfBlocksError):
        cache.allocate_with_prefix("a", "sys", total)
    assert set(cache.tables) == {"sys"}
    assert holders(cache.tables["sys"]) == [1, 1]
    cache.free_sequence("sys")
    assert cache.allocator.num_free == 2
