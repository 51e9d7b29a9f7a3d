"""Day 3.4, tasks 1 to 4: blocks that are called by their content, and found by it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks, block_hash

from common.blocks import filled, holders
from common.examples import quick

# Task 1: block_hash

FIRST = bytes(32)  # stands for the parent of some stream's first block


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

    Common mistakes: ids that are joined into one number or cut down to a byte.
    """
    assert block_hash(FIRST, tokens) != block_hash(FIRST, [5, 6, 7, 8])


def test_task_1_the_same_tokens_after_another_text_are_another_hash() -> None:
    """Oracle: the docstring: keys and values depend on all tokens before.

    Common mistake: a hash without its parent.
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
    """Oracle: the docstring: tenants that do not share, with the same text of equal blocks."""
    streams = [stream_of([3] * 12, salt=salt) for salt in ("", "one", "two")]
    assert len({digest for stream in streams for digest in stream.hashes}) == 9


# Task 3: PrefixCache.add


def make_cache(num_blocks: int = 12, block_size: int = 4) -> tuple[BlockAllocator, PrefixCache]:
    """An empty cache, and the allocator of its pool."""
    allocator = BlockAllocator(num_blocks)
    return allocator, PrefixCache(allocator, block_size)


def added(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int]) -> BlockTable:
    """A table that has computed these tokens, each of its full blocks added to the cache."""
    table, stream = filled(allocator, len(tokens), cache.block_size), stream_of(tokens, cache.block_size)
    for index in range(len(stream)):
        cache.add(table.blocks[index], stream, index)
    return table


def test_task_3_the_cache_is_one_more_holder_of_what_it_keeps() -> None:
    """Oracle: by hand: two full blocks, and one that is half full."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    assert sorted(cache.blocks) == sorted(table.blocks[:2])
    assert len(cache) == 2
    assert holders(table) == [2, 2, 1]
    assert allocator.num_free == 12 - 3


def test_task_3_a_block_that_is_kept_is_known_by_its_id() -> None:
    """Oracle: by hand: the block that is half full was not added."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    is_kept = [block in cache for block in table.blocks]
    assert is_kept == [True, True, False]


def test_task_3_a_block_in_use_is_not_idle() -> None:
    """Oracle: by hand: its table holds it. A block in the queue may be evicted while it is read."""
    allocator, cache = make_cache()
    added(allocator, cache, range(8))
    assert (cache.num_idle, cache.idle) == (0, [])


def test_task_3_what_is_kept_outlives_its_table() -> None:
    """Oracle: by hand: the cache is the only holder then."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    blocks = list(table.blocks)
    table.release()
    assert [allocator.ref_count(block) for block in blocks] == [1, 1, 0]
    assert allocator.num_free == 12 - 2


def test_task_3_what_was_cleared_away_can_be_added_again() -> None:
    """Oracle: by hand: the given `clear` undoes every entry of `add`, or fails over one that is missing."""
    allocator, cache = make_cache()
    table, stream = added(allocator, cache, range(8)), stream_of(range(8))
    cache.clear()
    assert (len(cache), holders(table)) == (0, [1, 1])
    cache.add(table.blocks[0], stream, 0)
    assert ([block in cache for block in table.blocks], holders(table)) == ([True, False], [2, 1])


# Task 4: PrefixCache.match


def kept(allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> BlockTable:
    """A table with these tokens: what is kept of them is shared, the rest is computed and added."""
    stream = stream_of(tokens, cache.block_size, salt)
    table = BlockTable(allocator, cache.block_size)
    for block in cache.match(stream, 0, len(stream)):
        cache.share(table, block, cache.block_size)
    first = len(table.blocks)
    table.append_tokens(len(tokens) - table.num_tokens)
    for index in range(first, len(stream)):
        cache.add(table.blocks[index], stream, index)
    return table


def forged(tokens: Sequence[int], hashes: Sequence[bytes]) -> TokenBlocks:
    """A stream whose first hashes are those of another text: what a collision would look like."""
    stream = stream_of(tokens)
    stream.hashes[: len(hashes)] = hashes
    return stream


def test_task_4_what_is_kept_is_found_in_order() -> None:
    """Oracle: by hand: also when the table has gone."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, range(13))
    blocks = list(table.blocks)
    assert list(cache.match(stream_of(range(13)), 0, 3)) == blocks[:3]
    table.release()
    assert list(cache.match(stream_of(range(20)), 0, 5)) == blocks[:3]


def test_task_4_looking_is_not_holding() -> None:
    """Oracle: by hand: only `share` makes a table a holder."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, range(12))
    cache.match(stream_of(range(12)), 0, 3)
    assert holders(table) == [2, 2, 2]


def test_task_4_only_the_blocks_that_are_asked_for() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = kept(allocator, cache, range(16)).blocks
    stream = stream_of(range(16))
    assert list(cache.match(stream, 1, 3)) == blocks[1:3]
    assert list(cache.match(stream, 3, 4)) == blocks[3:]
    assert list(cache.match(stream, 2, 2)) == []


def test_task_4_a_text_is_found_up_to_the_first_miss() -> None:
    """Oracle: by hand: the second block of four is another, and so are all that continue it."""
    allocator, cache = make_cache()
    blocks = kept(allocator, cache, range(16)).blocks
    assert list(cache.match(stream_of([*range(7), 99, *range(8, 16)]), 0, 4)) == blocks[:1]
    assert list(cache.match(stream_of([99, *range(1, 16)]), 0, 4)) == []
    assert list(cache.match(stream_of(range(4, 16)), 0, 3)) == []


def test_task_4_a_hole_ends_a_match() -> None:
    """Oracle: by hand: the second block of a text that collides with another is not the one that is kept.

    Going on behind it is the mistake: the third one has its hash, its tokens and its parent.
    """
    allocator, cache = make_cache()
    blocks = kept(allocator, cache, range(12)).blocks
    stream = stream_of(range(12))
    stream.tokens[1] = (9, 9, 9, 9)
    assert list(cache.match(stream, 0, 3)) == blocks[:1]


def test_task_4_an_equal_hash_proves_nothing() -> None:
    """Oracle: by hand: another text's hashes with other tokens, or with the right tokens and another parent.

    Common mistake: a match here is an answer from another client's text.
    """
    allocator, cache = make_cache()
    kept(allocator, cache, range(8))
    hashes = stream_of(range(8)).hashes
    assert list(cache.match(forged([9] * 8, hashes), 0, 2)) == []
    assert len(cache.match(forged([0, 1, 2, 3, 9, 9, 9, 9], hashes), 0, 2)) == 1
    assert list(cache.match(forged([4, 5, 6, 7], hashes[1:]), 0, 1)) == []


def test_task_4_salts_keep_texts_apart() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = kept(allocator, cache, range(8), "one").blocks
    assert list(cache.match(stream_of(range(8), salt="one"), 0, 2)) == blocks
    assert list(cache.match(stream_of(range(8), salt="two"), 0, 2)) == []
    assert list(cache.match(stream_of(range(8)), 0, 2)) == []
