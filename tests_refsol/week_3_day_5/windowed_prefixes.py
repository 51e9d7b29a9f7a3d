"""Day 3.5, tasks 8 to 12: prefix caching for groups of layers with different windows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.sliding_window import NO_BLOCK, WindowedTable
from tiny_llm.windowed_prefix import WindowedPrefixSharing

from common.blocks import counts
from common.examples import quick
from week_3_day_5.windowed_tables import seen_from

# Task 8: WindowedPrefixSharing.first_needed


def blocks_needed(num_blocks: int, window: int | None) -> int:
    """The first block that the token after `num_blocks` blocks of 4 sees, found position by position."""
    return seen_from(4 * num_blocks, window or 10**6)[0] // 4


@dataclass
class Setup:
    """A policy with an empty cache for groups with these windows, one layer each, in blocks of 4."""

    windows: tuple[int | None, ...]
    num_blocks: int = 100

    def __post_init__(self) -> None:
        groups = tuple(LayerGroup((layer,), window) for layer, window in enumerate(self.windows))
        self.allocator = BlockAllocator(self.num_blocks)
        self.layout = PageLayout(groups, 4, 16)
        self.sharing = WindowedPrefixSharing(self.allocator, 4, groups)

    def sequence(self, tokens: Sequence[int], outputs: Sequence[int] = (), **params: object) -> PagedSequence:
        """A sequence with these tokens, none of them computed."""
        sampling = SamplingParams(**params)  # type: ignore[arg-type]
        return PagedSequence(
            seq_id="one",
            request_id="one",
            prompt=tuple(tokens),
            params=sampling,
            seed=0,
            max_len=200,
            outputs=list(outputs),
            tables=self.layout.tables(self.allocator),
            streams=self.layout.streams(sampling.cache_salt),
        )

    def put(self, group: int, tokens: Sequence[int], indices: Iterable[int], salt: str = "") -> list[int]:
        """Cache blocks of these tokens for one group, as if a sequence had computed them.

        Return their ids.
        """
        stream = self.layout.streams(salt)[group]
        stream.extend(tokens)
        cached = []
        for index in indices:
            table = BlockTable(self.allocator, 4)
            table.append_tokens(4)
            self.sharing.cache.keep(table, stream.tail(index), 0, 1)
            cached += table.blocks
            table.release()
            self.sharing.released(cached[-1:])
        return cached

    def start(self, sequence: PagedSequence, count: int) -> None:
        """Compute the first tokens of a sequence, and cache its full blocks without the policy."""
        sequence.append_tokens(count)
        sequence.num_computed = count
        for table, stream in zip(sequence.tables, self.layout.streams(""), strict=True):
            stream.extend(sequence.tokens(0, count))
            self.sharing.cache.keep(table, stream, 0, count // 4)

    def compute(self, sequence: PagedSequence, count: int) -> None:
        """Compute the next tokens as a step does: cache full blocks, then release passed ones."""
        start = sequence.num_computed
        sequence.append_tokens(count)
        sequence.num_computed += count
        self.sharing.keep(sequence, start)
        self.sharing.released(self.layout.release_passed(sequence.tables, sequence.num_computed))

    def streams(self, tokens: Sequence[int]) -> list[TokenBlocks]:
        """The stream of each group for these tokens."""
        streams = self.layout.streams("")
        for stream in streams:
            stream.extend(tokens)
        return streams

    def longest_hit(self, first: int, stop: int) -> int:
        """`longest_hit` of the policy for `TEXT`."""
        return self.sharing.longest_hit(self.streams(TEXT), first, stop)

    def share_hit(self, group: int, first: int, hit: int) -> BlockTable:
        """A group's table of `TEXT` that computed `first` blocks itself and shares the rest of a hit."""
        table, stream = self.layout.tables(self.allocator)[group], self.streams(TEXT)[group]
        table.append_tokens(4 * first)
        self.sharing.cache.keep(table, stream, 0, first)
        self.sharing.share_hit(group, table, stream, first, hit)
        return table

    def finish(self, sequence: PagedSequence) -> None:
        """Finish a sequence."""
        blocks = sequence.blocks
        sequence.release_pages()
        self.sharing.released(blocks)

    def found(self, group: int, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The indices of the blocks of these tokens that are cached for a group, with or without gaps."""
        stream = self.layout.streams(salt)[group]
        stream.extend(tokens)
        return [i for i in range(len(stream)) if self.sharing.cache.match(stream, i, i + 1)]

    def check(self, *sequences: PagedSequence) -> None:
        """Assert that a sequence's tables end at the same token and that all references match."""
        for sequence in sequences:
            ends = {table.num_tokens + getattr(table, "start", 0) for table in sequence.tables}
            assert ends == {sequence.num_computed}, "the tables of a sequence do not end at the same token"
        held = Counter(block for one in sequences for table in one.tables for block in table.blocks)
        kept = self.sharing.blocks
        assert self.sharing.num_idle == len(set(kept) - set(held))
        held.update(kept)
        assert counts(self.allocator) == [held[block] for block in range(self.num_blocks)]


TEXT = list(range(100, 133))  # 8 full blocks of 4, and one token more


@pytest.mark.parametrize(
    ("window", "num_blocks", "first"),
    [(6, 3, 1), (5, 3, 2), (4, 3, 2), (2, 3, 2), (1, 3, 3), (9, 3, 1), (10, 3, 0), (6, 1, 0), (6, 0, 0)],
)
def test_task_8_the_window_of_the_next_token_decides_the_first_needed_block(
    window: int, num_blocks: int, first: int
) -> None:
    """Oracle: by hand, blocks of 4: token 12 comes after 3 blocks; with a window of 6 it sees 7 .. 12.

    Common mistake: counting from the last cached token, 11, which is one block too many for a window of 5.
    """
    assert Setup((None, window)).sharing.first_needed(1, num_blocks) == first


def test_task_8_a_group_without_a_window_needs_all_blocks() -> None:
    """Oracle: by hand: the first group has no window."""
    sharing = Setup((None, 3)).sharing
    assert [sharing.first_needed(0, num_blocks) for num_blocks in (0, 1, 9)] == [0, 0, 0]


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8, 9, 13, 100])
def test_task_8_the_first_needed_block_holds_the_first_visible_position(window: int | None) -> None:
    """Oracle: a list of the visible positions. Each group has its own window."""
    sharing = Setup((None, 7, window)).sharing
    for num_blocks in range(12):
        assert sharing.first_needed(2, num_blocks) == blocks_needed(num_blocks, window)
        assert sharing.first_needed(1, num_blocks) == blocks_needed(num_blocks, 7)


# Task 9: WindowedPrefixSharing.longest_hit


def test_task_9_a_completely_cached_prefix_is_found() -> None:
    """Oracle: by hand."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    assert setup.longest_hit(0, 8) == 8
    assert setup.longest_hit(0, 3) == 3


def test_task_9_without_cached_blocks_the_hit_is_empty() -> None:
    """Oracle: by hand: an empty cache, an empty group, other tokens."""
    setup = Setup((None, 6))
    assert setup.longest_hit(0, 8) == 0
    setup.put(0, TEXT, range(8))
    assert setup.longest_hit(0, 8) == 0
    setup.put(1, TEXT[::-1], range(8))
    assert setup.longest_hit(0, 8) == 0


def test_task_9_a_windowed_group_needs_no_blocks_outside_its_window() -> None:
    """Oracle: by hand: with a window of 6 token 32 sees 27 .. 32: blocks 6 and 7. The others are not cached.

    Common mistake: requiring the whole prefix in every group.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [6, 7])
    assert setup.longest_hit(0, 8) == 8


def test_task_9_a_missing_block_inside_the_window_shortens_the_hit() -> None:
    """Oracle: by hand: block 6 of the windowed group is missing, so 7 is useless.

    After 6 blocks it needs 4 and 5.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [4, 5, 7])
    assert setup.longest_hit(0, 8) == 6


def test_task_9_a_hit_is_shortened_until_all_groups_have_their_blocks() -> None:
    """Oracle: by hand: the group with full attention lacks block 5. After 5 blocks the windowed group needs 3
    and 4, and lacks 4; after 4 it needs 2 and 3, which are cached.

    Common mistake: the minimum of the groups' separate hits, which is 5, without block 4.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, [0, 1, 2, 3, 4, 6, 7])
    setup.put(1, TEXT, [2, 3, 6, 7])
    assert setup.longest_hit(0, 8) == 4


def test_task_9_all_groups_are_checked_again_after_a_hit_is_shortened() -> None:
    """Oracle: by hand: after 8 blocks the first windowed group has its blocks, the second lacks block 7.

    After 7 the first needs 6 and lacks it, after 6 it needs 5 and lacks it; after 5 it needs 4 and has it.
    """
    setup = Setup((None, 4, 2))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [4, 7])
    setup.put(2, TEXT, [4, 5])
    assert setup.longest_hit(0, 8) == 5


def test_task_9_blocks_that_the_sequence_holds_need_not_be_cached() -> None:
    """Oracle: by hand: from block 3 on; earlier blocks are in the sequence's tables, cached or not."""
    setup = Setup((None, 6))
    setup.put(0, TEXT, [3, 4])
    setup.put(1, TEXT, [3, 4])
    assert setup.longest_hit(3, 8) == 5
    assert setup.longest_hit(2, 8) == 2


def test_task_9_a_window_of_one_token_needs_no_block() -> None:
    """Oracle: by hand: the next token sees only itself."""
    setup = Setup((None, 1))
    setup.put(0, TEXT, range(5))
    assert setup.longest_hit(0, 8) == 5


def test_task_9_looking_for_a_hit_changes_nothing() -> None:
    """Oracle: by hand."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    setup.longest_hit(0, 8)
    setup.check()
    assert setup.sharing.num_idle == 16


@settings(quick, max_examples=150)
@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 4, 5, 8, 9, 14]), min_size=1, max_size=3),
    missing=st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=3, max_size=3),
    first=st.integers(0, 8),
    stop=st.integers(0, 8),
)
def test_task_9_the_hit_is_the_longest_possible(
    windows: list[int | None], missing: list[set[int]], first: int, stop: int
) -> None:
    """Oracle: all lengths from the largest down, each checked block by block in every group."""
    first, stop = min(first, stop), max(first, stop)
    setup = Setup(tuple(windows))
    cached = [set(range(8)) - gone for gone in missing[: len(windows)]]
    for group, indices in enumerate(cached):
        setup.put(group, TEXT, sorted(indices))
    enough = (
        n
        for n in range(stop, first - 1, -1)
        if all(
            set(range(max(first, blocks_needed(n, window)), n)) <= blocks
            for window, blocks in zip(windows, cached, strict=True)
        )
    )
    assert setup.longest_hit(first, stop) == next(enough)


# Task 10: WindowedPrefixSharing.share_hit


def test_task_10_a_table_without_a_window_gets_all_missing_blocks() -> None:
    """Oracle: by hand: the table computed 2 of 5 blocks."""
    setup = Setup((None, 6))
    later = setup.put(0, TEXT, range(2, 8))
    table = setup.share_hit(0, 2, 5)
    assert table.blocks[2:] == later[:3]
    assert (len(table.blocks), table.num_tokens) == (5, 20)
    assert [setup.allocator.ref_count(block) for block in later] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(("hit", "first_needed"), [(1, 0), (2, 0), (3, 1), (8, 6)])
def test_task_10_an_empty_windowed_table_gets_the_blocks_in_its_window(hit: int, first_needed: int) -> None:
    """Oracle: by hand, blocks of 4, a window of 6: token 32 comes after 8 blocks and sees 27 .. 32."""
    setup = Setup((None, 6))
    windowed = setup.put(1, TEXT, range(8))
    table = setup.share_hit(1, 0, hit)
    assert isinstance(table, WindowedTable)
    assert table.blocks == windowed[first_needed:hit]
    assert (table.start, table.start + table.num_tokens) == (4 * first_needed, 4 * hit)
    assert setup.sharing.num_idle == 8 - (hit - first_needed)


def test_task_10_a_windowed_table_keeps_its_blocks_inside_the_window() -> None:
    """Oracle: by hand: after 2 blocks a window of 6 still sees block 0, which the table computed."""
    setup = Setup((None, 6))
    [later] = setup.put(1, TEXT, [1])
    table = setup.share_hit(1, 1, 2)
    assert isinstance(table, WindowedTable)
    assert (table.start, table.num_tokens, len(table.blocks)) == (0, 8, 2)
    assert table.blocks[1] == later


def test_task_10_blocks_that_a_window_skips_are_idle_and_can_be_evicted() -> None:
    """Oracle: by hand: the table's 2 blocks are cached; after 8 blocks the window sees the last two.

    Common mistake: not calling `released` for skipped blocks, which can then never be evicted.
    """
    setup = Setup((None, 6))
    windowed = setup.put(1, TEXT, [6, 7])
    table = setup.share_hit(1, 2, 8)
    assert isinstance(table, WindowedTable)
    assert (table.start, table.blocks) == (24, windowed)
    assert setup.sharing.num_idle == 2
    assert setup.sharing.evict(9) == 2


def test_task_10_a_window_of_one_token_takes_no_block_and_skips_to_the_end_of_the_hit() -> None:
    """Oracle: by hand: the next token sees only itself; no block is taken although all are cached."""
    setup = Setup((None, 1))
    setup.put(1, TEXT, range(8))
    table = setup.share_hit(1, 0, 8)
    assert isinstance(table, WindowedTable)
    assert (table.start, table.num_tokens, len(table.blocks)) == (32, 0, 0)
    assert setup.sharing.num_idle == 8


@pytest.mark.parametrize("group", [0, 1])
def test_task_10_without_a_hit_nothing_changes(group: int) -> None:
    """Oracle: by hand: the table computed 3 blocks, and the hit ends there. Later blocks are cached."""
    setup = Setup((None, 6))
    setup.put(group, TEXT, range(3, 8))
    table = setup.share_hit(group, 3, 3)
    assert (len(table.blocks), table.num_tokens, setup.sharing.num_idle) == (3, 12, 5)


# Task 11: WindowedPrefixSharing.adopt


def test_task_11_each_table_gets_the_blocks_that_its_layers_need() -> None:
    """Oracle: by hand: 12 of 13 tokens can be shared: 3 blocks, and the last two for a window of 6."""
    setup = Setup((None, 6))
    full_blocks, windowed = setup.put(0, TEXT, range(8)), setup.put(1, TEXT, range(8))
    sequence = setup.sequence(TEXT[:13])
    setup.sharing.adopt(sequence)
    full, near = sequence.tables
    assert list(full.blocks) == full_blocks[:3]
    assert list(near.blocks) == windowed[1:3]
    assert isinstance(near, WindowedTable)
    assert (full.num_tokens, near.start, near.num_tokens) == (12, 4, 8)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (12, 12)
    assert setup.sharing.num_idle == 16 - 5
    setup.check(sequence)


def test_task_11_blocks_outside_the_window_may_be_missing() -> None:
    """Oracle: by hand: the windowed group has only blocks 6 and 7; 33 tokens are 8 blocks and one to compute.

    Common mistake: filling the gap with blocks of other positions.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    windowed = setup.put(1, TEXT, [6, 7])
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 32
    assert list(sequence.tables[1].physical_indices()) == [NO_BLOCK] * 6 + windowed
    setup.check(sequence)


def test_task_11_all_groups_end_at_the_same_token() -> None:
    """Oracle: by hand: one group has 7 blocks, the window of 6 lacks block 4. After 4 blocks it lacks none.

    Common mistake: tables that end at different tokens.
    """
    setup = Setup((None, 6, 9))
    setup.put(0, TEXT, range(7))
    setup.put(1, TEXT, [1, 2, 3, 5])
    setup.put(2, TEXT, range(8))
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 16
    assert [table.num_tokens for table in sequence.tables] == [16, 8, 8]
    setup.check(sequence)


@pytest.mark.parametrize(
    ("length", "adopted"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (32, 28), (33, 32)]
)
def test_task_11_the_last_token_is_always_computed(length: int, adopted: int) -> None:
    """Oracle: by hand, blocks of 4, all cached."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    sequence = setup.sequence(TEXT[:length])
    setup.sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (adopted, adopted)
    setup.check(sequence)


def test_task_11_a_prefix_that_a_group_cannot_continue_is_not_shared() -> None:
    """Oracle: by hand: the windowed group lacks the first five blocks, so nothing changes."""
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(5))
    setup.put(1, TEXT, [5, 6, 7])
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (0, 0)
    assert [(len(table.blocks), table.num_tokens) for table in sequence.tables] == [(0, 0), (0, 0)]
    setup.check(sequence)


def test_task_11_a_partly_computed_sequence_continues_after_its_own_blocks() -> None:
    """Oracle: by hand: one block is computed. After 2 blocks a window of 6 still needs blocks 0 and 1.

    Common mistake: releasing blocks that are still inside the window.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT[:9])
    setup.start(sequence, 4)
    own = [list(table.blocks) for table in sequence.tables]
    later = [setup.put(group, TEXT, [1]) for group in (0, 1)]
    setup.sharing.adopt(sequence)
    assert [list(table.blocks) for table in sequence.tables] == [own[0] + later[0], own[1] + later[1]]
    assert (sequence.num_computed, sequence.num_cached_tokens) == (8, 4)
    setup.check(sequence)


def test_task_11_blocks_that_a_window_has_passed_are_released() -> None:
    """Oracle: by hand: two blocks are computed, and the hit is 8: the window needs cached blocks 6 and 7.

    Its two passed blocks are cached and become idle; without `released` they could never be evicted.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 8)
    setup.put(0, TEXT, range(2, 8))
    windowed = setup.put(1, TEXT, [6, 7])
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 32
    assert list(sequence.tables[1].blocks) == windowed
    assert setup.sharing.num_idle == 2
    setup.check(sequence)
    assert setup.sharing.evict(9) == 2


def test_task_11_a_sequence_with_a_partly_computed_block_adopts_nothing() -> None:
    """Oracle: by hand: 6 tokens are computed, so no cached block starts at the next token."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 6)
    for group in (0, 1):
        setup.put(group, TEXT, range(1, 8))
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 6
    setup.check(sequence)


def test_task_11_a_prompt_with_prompt_logprobs_is_computed_completely() -> None:
    """Oracle: by hand: logits exist only for computed tokens."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    sequence = setup.sequence(TEXT, prompt_logprobs=1)
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 0
    setup.check(sequence)


def test_task_11_tenants_with_different_salts_share_nothing() -> None:
    """Oracle: by hand."""
    setup, adopted = Setup((None, 6)), []
    for group in (0, 1):
        setup.put(group, TEXT, range(8), salt="one")
    for salt in ("one", "two", ""):
        sequence = setup.sequence(TEXT, cache_salt=salt)
        setup.sharing.adopt(sequence)
        adopted.append(sequence.num_computed)
    assert adopted == [32, 0, 0]


# Task 12: WindowedPrefixSharing.keep


def test_task_12_full_blocks_of_every_group_are_cached() -> None:
    """Oracle: by hand: 10 tokens are two full blocks in each of two groups."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(10)
    sequence.num_computed = 10
    setup.sharing.keep(sequence, 0)
    assert len(setup.sharing.blocks) == 4
    assert [setup.found(group, TEXT) for group in (0, 1)] == [[0, 1], [0, 1]]
    setup.check(sequence)


def test_task_12_groups_do_not_share_blocks() -> None:
    """Oracle: by hand: equal tokens have different keys in different layers."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(8)
    sequence.num_computed = 8
    setup.sharing.keep(sequence, 0)
    for group, table in enumerate(sequence.tables):
        stream = setup.layout.streams("")[group]
        stream.extend(TEXT)
        assert list(setup.sharing.cache.match(stream, 0, 8)) == list(table.blocks)


def test_task_12_a_table_with_a_later_start_caches_the_right_blocks() -> None:
    """Oracle: by hand: the windowed table starts at 8 when its blocks 2 and 3 become full.

    Common mistake: mixing indices: blocks count from the table's start, hashes from the sequence's.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 12)
    near = sequence.tables[1]
    assert isinstance(near, WindowedTable)
    setup.sharing.released(near.release_before(8))
    setup.compute(sequence, 5)
    assert setup.found(0, TEXT) == setup.found(1, TEXT) == [0, 1, 2, 3]
    stream = setup.layout.streams("")[1]
    stream.extend(TEXT)
    assert list(setup.sharing.cache.match(stream, 3, 4)) == list(near.blocks[:1])
    assert near.start == 12
    setup.check(sequence)


def test_task_12_released_blocks_are_not_cached() -> None:
    """Oracle: by hand: 16 tokens are computed, of which the windowed table has 8 .. 15.

    Common mistake: a negative index (the first block minus the table's first block).
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(16)
    sequence.num_computed = 16
    near = sequence.tables[1]
    assert isinstance(near, WindowedTable)
    near.release_before(8)
    setup.sharing.keep(sequence, 0)
    assert (setup.found(0, TEXT), setup.found(1, TEXT)) == ([0, 1, 2, 3], [2, 3])
    setup.check(sequence)


@pytest.mark.parametrize(
    ("start", "count", "num_cached"), [(0, 3, 0), (4, 3, 1), (5, 2, 1), (5, 3, 2), (7, 10, 4)]
)
def test_task_12_a_block_is_cached_when_it_is_full(start: int, count: int, num_cached: int) -> None:
    """Oracle: by hand, blocks of 4: blocks that were full before are already cached."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, start)
    setup.compute(sequence, count)
    assert setup.found(0, TEXT) == setup.found(1, TEXT) == list(range(num_cached))
    setup.check(sequence)


def test_task_12_blocks_that_were_cached_meanwhile_are_stored_once() -> None:
    """Oracle: by hand: block 1 was cached for each group while this sequence computed it.

    Its copy is freed.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 4)
    others = [setup.put(group, TEXT, [1])[0] for group in (0, 1)]
    setup.compute(sequence, 4)
    assert [table.blocks[-1] for table in sequence.tables] == others
    assert len(setup.sharing.blocks) == 4
    setup.check(sequence)


def test_task_12_a_model_with_only_windowed_layers_shares_prefixes() -> None:
    """Oracle: by hand: a model whose layers all have a window of 6."""
    setup = Setup((6,))
    first = setup.sequence(TEXT)
    for count in (7, 9, 1, 1, 15):
        setup.compute(first, count)
    setup.finish(first)
    assert setup.found(0, TEXT) == list(range(8))
    second = setup.sequence(TEXT)
    setup.sharing.adopt(second)
    assert (second.num_computed, len(second.table.blocks)) == (32, 2)
    setup.check(second)


@quick
@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 4, 6, 9]), min_size=1, max_size=3),
    texts=st.lists(st.tuples(st.integers(0, 33), st.integers(1, 9)), min_size=1, max_size=5),
    num_evicted=st.integers(0, 12),
)
def test_task_12_all_cached_blocks_are_found(
    windows: list[int | None], texts: list[tuple[int, int]], num_evicted: int
) -> None:
    """Oracle: a list of the computed blocks that are not evicted; all references are counted.

    Sequences with common prefixes run one after the other, in chunks: each adopts cached blocks, computes the
    rest and finishes. After each, some idle blocks are evicted.
    """
    setup = Setup(tuple(windows), num_blocks=300)
    for num_shared, chunk in texts:
        text = [*TEXT[:num_shared], *range(5, 40)]
        sequence, cached = setup.sequence(text), [setup.found(group, text) for group in range(len(windows))]
        setup.sharing.adopt(sequence)
        setup.check(sequence)
        longest = (len(text) - 1) // 4
        assert sequence.num_computed == 4 * max(
            n
            for n in range(longest + 1)
            if all(
                set(range(blocks_needed(n, window), n)) <= set(blocks)
                for window, blocks in zip(windows, cached, strict=True)
            )
        )
        started = sequence.num_computed // 4
        while sequence.num_uncomputed:
            setup.compute(sequence, min(chunk, sequence.num_uncomputed))
            setup.check(sequence)
        for group, blocks in enumerate(cached):
            assert setup.found(group, text) == sorted({*blocks, *range(started, len(text) // 4)})
        setup.finish(sequence)
        setup.check()
        setup.sharing.evict(num_evicted)
