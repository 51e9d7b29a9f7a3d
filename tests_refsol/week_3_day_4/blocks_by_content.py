"""Day 3.4, tasks 1 to 4: hashes of blocks, and cached blocks that are found by their hash."""

import sys
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks, block_hash

from common.blocks import filled, holders
from common.examples import quick

# Task 1: block_hash

FIRST = bytes(32)  # a parent hash for the first block of a stream


def short(hashes: Iterable[bytes]) -> list[str]:
    """The first 8 hexadecimal digits of each hash, which is enough to compare them."""
    return [digest.hex()[:8] for digest in hashes]


def test_task_1_a_hash_is_32_bytes_and_equal_for_equal_tokens() -> None:
    """Oracle: the docstring: a list and a tuple of the same ids have the same hash."""
    digest = block_hash(FIRST, [5, 6, 7, 8])
    assert isinstance(digest, bytes)
    assert len(digest) == 32
    again = [block_hash(FIRST, [5, 6, 7, 8]), block_hash(FIRST, (5, 6, 7, 8))]
    assert short(again) == short([digest, digest]), "the same tokens again, as a list and as a tuple"


def test_task_1_the_parent_comes_first_then_each_id_as_8_bytes() -> None:
    """Oracle: SHA-256 of these bytes, computed once with the command `sha256sum`.

    Common mistakes: the tokens before the parent, 4 bytes for each id, a separator.
    """
    digest = block_hash(bytes(range(32)), [5, 70_000])
    expected = {"little": "e179d682", "big": "844911ae"}[sys.byteorder]
    assert short([digest]) == [expected], "the parent's 32 bytes, then 8 bytes for each of 5 and 70,000"


@pytest.mark.parametrize(
    "tokens",
    [
        *([5, 6, 7, 9], [8, 7, 6, 5], [5, 6, 7, 8 + 256], [5, 6, 7, 8 + 65_536]),
        *([5, 6, 78, 0], [56, 7, 8, 0], [5, 67, 8], [5, 6, 7], [5, 6, 7, 8, 8]),
    ],
)
def test_task_1_different_tokens_have_different_hashes(tokens: list[int]) -> None:
    """Oracle: the docstring: a different id, order or split of the digits, and large ids.

    Common mistakes: joining the ids as text, truncating an id to a byte.
    """
    assert block_hash(FIRST, tokens) != block_hash(FIRST, [5, 6, 7, 8])


def test_task_1_equal_tokens_after_different_prefixes_have_different_hashes() -> None:
    """Oracle: the docstring: keys and values depend on all tokens before.

    Common mistake: a hash without its parent.
    """
    parents = [FIRST, block_hash(FIRST, [1, 2]), block_hash(FIRST, [2, 1]), bytes([1]) + bytes(31)]
    assert len({block_hash(parent, [5, 6]) for parent in parents}) == 4


@quick
@given(st.lists(st.tuples(st.integers(0, 1), *[st.integers(0, 3)] * 3), max_size=12))
def test_task_1_hashes_are_equal_only_for_equal_prefixes_and_tokens(texts: list[tuple[int, ...]]) -> None:
    """Oracle: a set of the inputs themselves: a parent and three tokens."""
    hashes = {block_hash(bytes([before]) * 32, tokens) for before, *tokens in texts}
    assert len(hashes) == len(set(texts))


# Task 2: TokenBlocks.extend


def stream_of(tokens: Sequence[int], block_size: int = 4, salt: str = "") -> TokenBlocks:
    """A stream of these tokens."""
    stream = TokenBlocks(block_size, salt)
    stream.extend(tokens)
    return stream


def test_task_2_tokens_are_split_into_full_blocks() -> None:
    """Oracle: by hand: 11 tokens in blocks of 4; the last 3 do not fill a block."""
    stream = stream_of(range(11))
    assert stream.tokens == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert len(stream) == len(stream.hashes) == 2


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (12, 3)])
def test_task_2_only_full_blocks_count(length: int, blocks: int) -> None:
    """Oracle: by hand, blocks of 4: Common mistake: dropping a full last block."""
    assert len(stream_of([9] * length)) == blocks


def test_task_2_each_hash_covers_its_block_and_all_blocks_before_it() -> None:
    """Oracle: `block_hash`, block by block: the parent of the first is `parent(0)`."""
    stream = stream_of([1, 2, 3, 1, 2, 3, 7, 8, 9], block_size=3)
    hashes = [stream.parent(0)]
    for tokens in ((1, 2, 3), (1, 2, 3), (7, 8, 9)):
        hashes.append(block_hash(hashes[-1], tokens))
    assert short(stream.hashes) == short(hashes[1:])


def test_task_2_hashes_are_equal_up_to_the_first_different_block() -> None:
    """Oracle: by hand: they differ in token 5, in the second of three blocks."""
    one, other = stream_of(range(12)), stream_of([*range(5), 99, *range(6, 12)])
    assert [a == b for a, b in zip(one.hashes, other.hashes, strict=True)] == [True, False, False]
    assert one.tokens[2] == other.tokens[2]


def test_task_2_tokens_that_come_in_pieces_give_the_same_blocks() -> None:
    """Oracle: all tokens at once. Tokens of an incomplete block must be passed again."""
    whole, pieces = stream_of(range(14)), TokenBlocks(4)
    pieces.extend(range(4))
    pieces.extend([4, 5, 6])
    pieces.extend([])
    pieces.extend(range(4, 14))
    assert pieces.tokens == whole.tokens
    assert short(pieces.hashes) == short(whole.hashes)


def test_task_2_a_different_salt_changes_every_hash() -> None:
    """Oracle: the docstring: tenants with different salts and the same tokens share no hash."""
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


def test_task_3_the_cache_adds_a_reference_to_each_cached_block() -> None:
    """Oracle: by hand: two full blocks and a half-full one."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    assert sorted(cache.blocks) == sorted(table.blocks[:2])
    assert len(cache) == 2
    assert holders(table) == [2, 2, 1]
    assert allocator.num_free == 12 - 3


def test_task_3_a_cached_block_is_found_by_its_id() -> None:
    """Oracle: by hand: the half-full block was not added."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    is_cached = [block in cache for block in table.blocks]
    assert is_cached == [True, True, False]


def test_task_3_a_block_in_use_is_not_idle() -> None:
    """Oracle: by hand: its table holds it.

    A block in the eviction queue could be evicted while a table reads it.
    """
    allocator, cache = make_cache()
    added(allocator, cache, range(8))
    assert (cache.num_idle, cache.idle) == (0, [])


def test_task_3_cached_blocks_stay_allocated_after_their_table_is_released() -> None:
    """Oracle: by hand: then only the cache holds them."""
    allocator, cache = make_cache()
    table = added(allocator, cache, range(10))
    blocks = list(table.blocks)
    table.release()
    assert [allocator.ref_count(block) for block in blocks] == [1, 1, 0]
    assert allocator.num_free == 12 - 2


def test_task_3_a_block_can_be_added_again_after_clear() -> None:
    """Oracle: by hand: the given `clear` removes all entries of `add`, and fails if one is missing."""
    allocator, cache = make_cache()
    table, stream = added(allocator, cache, range(8)), stream_of(range(8))
    cache.clear()
    assert (len(cache), holders(table)) == (0, [1, 1])
    cache.add(table.blocks[0], stream, 0)
    assert ([block in cache for block in table.blocks], holders(table)) == ([True, False], [2, 1])


# Task 4: PrefixCache.match


def cached(
    allocator: BlockAllocator, cache: PrefixCache, tokens: Sequence[int], salt: str = ""
) -> BlockTable:
    """A table with these tokens: cached blocks are shared, the others are computed and added."""
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
    """A stream whose first hashes are those of other tokens, as in a hash collision."""
    stream = stream_of(tokens)
    stream.hashes[: len(hashes)] = hashes
    return stream


def test_task_4_cached_blocks_are_found_in_order() -> None:
    """Oracle: by hand: even after the table is released."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(13))
    blocks = list(table.blocks)
    assert list(cache.match(stream_of(range(13)), 0, 3)) == blocks[:3]
    table.release()
    assert list(cache.match(stream_of(range(20)), 0, 5)) == blocks[:3]


def test_task_4_a_match_adds_no_references() -> None:
    """Oracle: by hand: only `share` adds a reference."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, range(12))
    cache.match(stream_of(range(12)), 0, 3)
    assert holders(table) == [2, 2, 2]


def test_task_4_a_match_returns_only_the_requested_blocks() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = cached(allocator, cache, range(16)).blocks
    stream = stream_of(range(16))
    assert list(cache.match(stream, 1, 3)) == blocks[1:3]
    assert list(cache.match(stream, 3, 4)) == blocks[3:]
    assert list(cache.match(stream, 2, 2)) == []


def test_task_4_a_match_ends_at_the_first_miss() -> None:
    """Oracle: by hand: the second of four blocks differs, and so do all later ones."""
    allocator, cache = make_cache()
    blocks = cached(allocator, cache, range(16)).blocks
    assert list(cache.match(stream_of([*range(7), 99, *range(8, 16)]), 0, 4)) == blocks[:1]
    assert list(cache.match(stream_of([99, *range(1, 16)]), 0, 4)) == []
    assert list(cache.match(stream_of(range(4, 16)), 0, 3)) == []


def test_task_4_a_collision_in_the_middle_ends_a_match() -> None:
    """Oracle: by hand: the second block has the hash of a cached block but other tokens.

    Common mistake: continuing after it, since the third block has the right hash, tokens and parent.
    """
    allocator, cache = make_cache()
    blocks = cached(allocator, cache, range(12)).blocks
    stream = stream_of(range(12))
    stream.tokens[1] = (9, 9, 9, 9)
    assert list(cache.match(stream, 0, 3)) == blocks[:1]


def test_task_4_an_equal_hash_of_other_tokens_or_another_parent_is_not_a_match() -> None:
    """Oracle: by hand: the hashes of cached blocks with other tokens, or with another parent.

    A match would leak another client's prompt into the answer.
    """
    allocator, cache = make_cache()
    cached(allocator, cache, range(8))
    hashes = stream_of(range(8)).hashes
    assert list(cache.match(forged([9] * 8, hashes), 0, 2)) == []
    assert len(cache.match(forged([0, 1, 2, 3, 9, 9, 9, 9], hashes), 0, 2)) == 1
    assert list(cache.match(forged([4, 5, 6, 7], hashes[1:]), 0, 1)) == []


def test_task_4_streams_with_different_salts_do_not_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    blocks = cached(allocator, cache, range(8), "one").blocks
    assert list(cache.match(stream_of(range(8), salt="one"), 0, 2)) == blocks
    assert list(cache.match(stream_of(range(8), salt="two"), 0, 2)) == []
    assert list(cache.match(stream_of(range(8)), 0, 2)) == []
