"""Day 3.6, task 5: copying the computed blocks of a sequence to the host."""

from collections import Counter
from collections.abc import Sequence

import pytest
from tiny_llm.sequence import SwappedTable
from tiny_llm.swap import SwapSpace

from common.blocks import counts
from week_3_day_6.two_pools import SIZE, TEXT, Setup, in_use

# Task 5: SwapSpace.swap_out


def test_task_5_computed_blocks_get_host_blocks() -> None:
    """Oracle: by hand: 10 tokens are three blocks, the last of them half full.

    The sequence keeps its blocks.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    blocks = list(sequence.table.blocks)
    copies = setup.space.swap_out(sequence)
    assert copies is not None
    assert [block for block, _ in sorted(copies, key=lambda copy: blocks.index(copy[0]))] == blocks
    assert len({host_block for _, host_block in copies}) == 3
    assert sequence.swapped is not None
    host_block_of = dict(copies)
    assert list(sequence.swapped.tables) == [SwappedTable(0, [host_block_of[block] for block in blocks])]
    assert sequence.swapped.num_computed == 10
    assert in_use(setup.space.allocator) == 3, "the number of blocks in use"
    assert (sequence.table.blocks, sequence.num_computed) == (blocks, 10)
    assert [setup.allocator.ref_count(block) for block in blocks] == [1, 1, 1]


def test_task_5_the_number_of_cached_tokens_is_recorded() -> None:
    """Oracle: `Swapped`: 8 tokens of the sequence came from the prefix cache."""
    sequence = Setup().sequence(TEXT[:10], 10)
    sequence.num_cached_tokens = 8
    SwapSpace(3, SIZE).swap_out(sequence)
    assert sequence.swapped is not None
    assert (sequence.swapped.num_computed, sequence.swapped.num_cached_tokens) == (10, 8)


@pytest.mark.parametrize(("computed", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 4)])
def test_task_5_partly_filled_blocks_are_swapped_out_too(computed: int, blocks: int) -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    assert setup.swap_out(sequence) == in_use(setup.space.allocator) == blocks, (
        "the number of blocks copied to the host"
    )
    setup.check(waiting=[sequence])


@pytest.mark.parametrize(("computed", "blocks"), [(6, 2), (4, 1), (1, 1)])
def test_task_5_blocks_without_computed_tokens_are_not_swapped_out(computed: int, blocks: int) -> None:
    """Oracle: by hand: this step was going to compute up to token 14, so the table already has four blocks.

    Their tokens are not computed. Common mistake: counting the table's blocks instead of computed tokens.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    sequence.append_tokens(14 - computed)
    assert setup.swap_out(sequence) == blocks, "the number of blocks copied to the host"
    setup.check(waiting=[sequence])


def test_task_5_a_common_prefix_is_stored_on_the_host_once() -> None:
    """Oracle: by hand: the first 9 of 11 and 14 tokens are the same: two full blocks.

    They are in different blocks of the pool, but their contents are equal.
    """
    setup = Setup()
    first = setup.sequence(TEXT[:11], 11)
    second = setup.sequence((*TEXT[:9], *range(5)), 14)
    assert setup.swap_out(first) == 3, "the number of blocks copied to the host"
    assert setup.swap_out(second) == 2, "the number of blocks copied to the host"
    assert first.swapped is not None
    assert second.swapped is not None
    shared = first.swapped.tables[0].host_blocks[:2]
    assert second.swapped.tables[0].host_blocks[:2] == shared
    assert [setup.space.allocator.ref_count(block) for block in shared] == [2, 2]
    assert in_use(setup.space.allocator) == 5, "the number of blocks in use"
    setup.check(waiting=[first, second])


def test_task_5_forks_store_their_prompt_once() -> None:
    """Oracle: by hand: three forks of 8 tokens, each with 6 more: 2 shared blocks and 2 for each."""
    setup = Setup()
    leader = setup.sequence(TEXT[:8], 8)
    forks = [leader, *(leader.fork(str(i), i) for i in (1, 2))]
    for index, one in enumerate(forks):
        one.outputs += [index] * 6
        setup.compute(one, 6)
    assert [setup.swap_out(one) for one in forks] == [4, 2, 2], "the number of blocks copied to the host"
    setup.check(waiting=forks)


def test_task_5_a_partly_filled_block_is_not_shared() -> None:
    """Oracle: by hand: the same 6 tokens twice: one block is shared, and each has one more."""
    setup = Setup()
    forks = [setup.sequence(TEXT[:6], 6) for _ in range(2)]
    assert [setup.swap_out(one) for one in forks] == [2, 1], "the number of blocks copied to the host"
    assert in_use(setup.space.allocator) == 3, "the number of blocks in use"
    setup.check(waiting=forks)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_task_5_a_block_with_a_known_but_uncomputed_token_is_not_full(order: Sequence[int]) -> None:
    """Oracle: by hand: both know the same 8 tokens, but one of them has computed only 7.

    Common mistake: using the hash of its known tokens, which shares a block with an empty slot.
    """
    setup = Setup()
    pair = [setup.sequence(TEXT[:8], 7), setup.sequence(TEXT[:8], 8)]
    assert [setup.swap_out(pair[i]) for i in order] == [2, 1], "the number of blocks copied to the host"
    setup.check(waiting=pair)


def test_task_5_equal_tokens_after_different_prefixes_are_not_shared() -> None:
    """Oracle: by hand: keys depend on all earlier tokens.

    Common mistake: comparing only the block's tokens.
    """
    setup = Setup()
    pair = [setup.sequence((*start, *TEXT[:4]), 8) for start in ((1, 2, 3, 4), (5, 6, 7, 8))]
    assert [setup.swap_out(one) for one in pair] == [2, 2], "the number of blocks copied to the host"
    setup.check(waiting=pair)


def test_task_5_tenants_with_different_salts_share_nothing() -> None:
    """Oracle: by hand: different salts give different hashes."""
    setup = Setup()
    forks = [setup.sequence(TEXT[:8], 8, salt=salt) for salt in ("one", "two", "")]
    assert [setup.swap_out(one) for one in forks] == [2, 2, 2], "the number of blocks copied to the host"


def test_task_5_outputs_are_shared_like_a_prompt() -> None:
    """Oracle: by hand: the prompt of one is the prompt and output of the other."""
    setup = Setup()
    pair = [setup.sequence(TEXT[:5], 8, outputs=TEXT[5:9]), setup.sequence(TEXT[:9], 8)]
    assert [setup.swap_out(one) for one in pair] == [2, 0], "the number of blocks copied to the host"
    setup.check(waiting=pair)


def test_task_5_a_windowed_table_stores_its_first_block_index() -> None:
    """Oracle: by hand: with 18 tokens, a window of 6 has blocks 3 and 4; the next token sees from 13 on.

    Common mistake: counting its blocks from 0.
    """
    setup = Setup(windows=(None, 6))
    sequence = setup.sequence(TEXT, 18)
    near = sequence.tables[1]
    assert (getattr(near, "start", 0), len(near.blocks)) == (12, 2)
    assert setup.swap_out(sequence) == 5 + 2, "the number of blocks copied to the host"
    assert sequence.swapped is not None
    assert [(table.first, len(table.host_blocks)) for table in sequence.swapped.tables] == [(0, 5), (3, 2)]
    setup.check(waiting=[sequence])


def test_task_5_windowed_tables_share_only_full_blocks_that_both_hold() -> None:
    """Oracle: by hand: a window of 6 has blocks 3 and 4 of 18 tokens, and blocks 2 and 3 of 15.

    Block 3 of the second is not full, so no windowed block is shared, but three others are. With 16 tokens it
    is full and shared.
    """
    for tokens, copied in ((15, 1 + 2), (16, 0 + 1)):
        setup = Setup(windows=(None, 6))
        first, second = setup.sequence(TEXT, 18), setup.sequence(TEXT, tokens)
        assert setup.swap_out(first) == 7, "the number of blocks copied to the host"
        assert setup.swap_out(second) == copied, "the number of blocks copied to the host"
        setup.check(waiting=[first, second])


def test_task_5_groups_of_layers_share_nothing() -> None:
    """Oracle: by hand: equal tokens have different keys in different layers."""
    setup = Setup(windows=(None, None, 50))
    sequence = setup.sequence(TEXT[:8], 8)
    assert setup.swap_out(sequence) == 6, "the number of blocks copied to the host"
    setup.check(waiting=[sequence])


def test_task_5_a_block_with_a_pending_copy_is_read_from_its_source_block() -> None:
    """Oracle: by hand: a fork was going to write to the shared block 1, so its new block 1 is still empty."""
    setup = Setup()
    leader = setup.sequence(TEXT[:6], 6)
    fork = leader.fork("fork", 1)
    [copy] = fork.append_tokens(1)
    assert setup.pool[copy.dst] != setup.pool[copy.src]
    copies = SwapSpace(9, SIZE).swap_out(fork, {copy.dst: copy.src, 77: 78})
    assert copies is not None
    assert Counter(block for block, _ in copies) == Counter(leader.table.blocks)
    assert setup.swap_out(fork, {copy.dst: copy.src}) == 2, "the number of blocks copied to the host"
    setup.check(leader, waiting=[fork])


def test_task_5_pending_copies_are_resolved_in_every_group() -> None:
    """Oracle: by hand: each table has a pending copy; windows have passed the first tokens."""
    setup = Setup(windows=(None, 6, 3))
    leader = setup.sequence(TEXT, 18)
    fork = leader.fork("fork", 1)
    filled_from = {copy.dst: copy.src for copy in fork.append_tokens(5)}
    assert len(filled_from) == 3
    assert setup.swap_out(fork, filled_from) == 5 + 2 + 1, "the number of blocks copied to the host"
    setup.check(leader, waiting=[fork])


def test_task_5_all_free_host_blocks_can_be_used() -> None:
    """Oracle: by hand: three host blocks for 10 tokens, none left."""
    setup = Setup(host_blocks=3)
    sequence = setup.sequence(TEXT[:10], 10)
    assert setup.swap_out(sequence) == 3, "the number of blocks copied to the host"
    setup.check(waiting=[sequence])


def test_task_5_blocks_that_the_host_already_has_need_no_free_block() -> None:
    """Oracle: by hand: the host is full but has the second one's content.

    Common mistake: counting all its blocks.
    """
    setup = Setup(host_blocks=3)
    first, second = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:8], 8)
    assert setup.swap_out(first) == 3, "the number of blocks copied to the host"
    assert setup.swap_out(second) == 0, "the number of blocks copied to the host"
    setup.check(waiting=[first, second])


@pytest.mark.parametrize("windows", [(None,), (None, None)])
def test_task_5_a_sequence_that_does_not_fit_on_the_host_leaves_no_references(
    windows: tuple[int | None, ...],
) -> None:
    """Oracle: by hand: one host block too few for 3 blocks in each group; the sequence keeps its pages.

    A leaked reference or hash would be found by the next sequence.
    """
    setup = Setup(windows, host_blocks=3 * len(windows) - 1)
    sequence = setup.sequence(TEXT[:10], 10)
    assert setup.space.swap_out(sequence) is None
    assert sequence.swapped is None
    assert in_use(setup.space.allocator) == 0, "the number of blocks in use"
    setup.check(sequence)
    shorter = setup.sequence(TEXT[:8], 8)
    assert setup.swap_out(shorter) == 2 * len(windows), "a rejected swap out must leave nothing on the host"
    setup.check(sequence, waiting=[shorter])


def test_task_5_a_failed_swap_out_keeps_the_blocks_of_other_sequences() -> None:
    """Oracle: by hand: two blocks are on the host, one more is free, and two are needed.

    The two shared blocks belong to the first sequence; releasing them once too often would free them.
    """
    setup = Setup(host_blocks=4)
    first, other = setup.sequence(TEXT[:8], 8), setup.sequence([1, 2], 2)
    assert (setup.swap_out(first), setup.swap_out(other)) == (2, 1), "the number of blocks copied to the host"
    before = counts(setup.space.allocator)
    second = setup.sequence((*TEXT[:8], *range(6)), 14)
    assert setup.space.swap_out(second) is None
    assert counts(setup.space.allocator) == before
    setup.check(second, waiting=[first, other])
    third = setup.sequence((*TEXT[:8], *range(4)), 12)
    assert setup.swap_out(third) == 1, (
        "the first one's blocks must still be found, the rejected one's must not"
    )
    setup.check(second, waiting=[first, other, third])
