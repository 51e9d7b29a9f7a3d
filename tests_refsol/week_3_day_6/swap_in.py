"""Day 3.6, tasks 6 and 7: swapping in blocks that the pool does not already have."""

import pytest
from tiny_llm.sequence import SwappedTable

from common.blocks import counts
from week_3_day_6.two_pools import TEXT, Setup, in_use

# Task 6: SwapSpace.blocks_to_swap_in


@pytest.mark.parametrize(
    ("computed", "adopted", "blocks"), [(10, 0, 3), (12, 0, 3), (1, 0, 1), (10, 1, 2), (10, 2, 1), (12, 2, 1)]
)
def test_task_6_blocks_adopted_from_the_prefix_cache_are_not_swapped_in(
    computed: int, adopted: int, blocks: int
) -> None:
    """Oracle: by hand, blocks of 4: of 10 tokens 8 were adopted, so one block is missing."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:12], computed)
    assert setup.swap_out(sequence) is not None
    assert setup.adopt(sequence, donor, adopted)
    assert setup.space.blocks_to_swap_in(sequence) == blocks, "the number of blocks to swap in"


@pytest.mark.parametrize(
    ("adopted", "blocks"), [(0, 5 + 2 + 1), (1, 4 + 2 + 1), (2, 3 + 2 + 1), (3, 2 + 2 + 1), (4, 1 + 1 + 1)]
)
def test_task_6_blocks_of_a_windowed_table_count_from_its_first_block(adopted: int, blocks: int) -> None:
    """Oracle: by hand: 18 tokens; windows of 6 and 3 have blocks 3 and 4, and block 4, on the host.

    With one block adopted, the first table lacks 4 and the others lack all. Common mistake: a negative number
    of blocks to skip.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence, donor = setup.sequence(TEXT, 18), setup.sequence(TEXT, 0)
    assert setup.swap_out(sequence) == 8, "the number of blocks copied to the host"
    for count in (4,) * adopted:
        setup.compute(donor, count)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.space.blocks_to_swap_in(sequence) == blocks, "the number of blocks to swap in"


def test_task_6_counting_the_blocks_to_swap_in_changes_nothing() -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.swap_out(sequence)
    assert [setup.space.blocks_to_swap_in(sequence) for _ in range(2)] == [3, 3], (
        "the number of blocks to swap in"
    )
    setup.check(waiting=[sequence])
    assert sequence.table.blocks == []


# Task 7: SwapSpace.swap_in


def test_task_7_swapping_in_restores_the_table() -> None:
    """Oracle: by hand: 10 tokens in three new blocks, copied from the three host blocks, in order."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.swap_out(sequence)
    assert sequence.swapped is not None
    waiting = sequence.swapped.tables[0].host_blocks
    copies = setup.space.swap_in(sequence)
    assert dict(copies) == dict(zip(sequence.table.blocks, waiting, strict=True))
    assert (sequence.table.num_tokens, sequence.num_computed) == (10, 10)
    assert in_use(setup.allocator) == 3, "the number of blocks in use"


@pytest.mark.parametrize("computed", [1, 3, 4, 5, 8, 9, 16, 17])
def test_task_7_swapping_in_restores_every_token(computed: int) -> None:
    """Oracle: symbolic contents; the sequence continues at its next token.

    Common mistake: counting a partly filled last block as full, which leaves a gap.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    blocks = setup.swap_out(sequence)
    assert setup.swap_in(sequence) == blocks, "the number of blocks copied to the pool"
    setup.check(sequence, waiting=[sequence])
    setup.compute(sequence, 6)
    setup.check(sequence, waiting=[sequence])


def test_task_7_the_number_of_cached_tokens_is_restored() -> None:
    """Oracle: by hand: 4 tokens were cached at admission; finding 8 now must not change that."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:10], 10)
    sequence.num_cached_tokens = 4
    setup.swap_out(sequence)
    setup.adopt(sequence, donor, 2)
    setup.swap_in(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (10, 4)


@pytest.mark.parametrize(("adopted", "copied"), [(0, 3), (1, 2), (2, 1)])
def test_task_7_blocks_that_the_table_already_holds_are_not_copied(adopted: int, copied: int) -> None:
    """Oracle: by hand: blocks adopted from the prefix cache are neither copied nor allocated again."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:11], 11)
    setup.swap_out(sequence)
    setup.adopt(sequence, donor, adopted)
    assert setup.swap_in(sequence) == copied, "the number of blocks copied to the pool"
    assert sequence.table.blocks[:adopted] == donor.table.blocks[:adopted]
    assert in_use(setup.allocator) == 3 + copied, "the number of blocks in use"
    setup.check(donor, sequence, waiting=[sequence])


def test_task_7_full_blocks_that_other_sequences_hold_are_shared() -> None:
    """Oracle: by hand: the first of two forks is back, with 8 shared tokens and 3 others.

    The second shares 2 blocks with it, without a copy, and gets 1 new block.
    """
    setup = Setup()
    leader = setup.sequence(TEXT[:8], 8)
    forks = [leader, leader.fork("fork", 1)]
    for index, one in enumerate(forks):
        one.outputs += [index] * 3
        setup.compute(one, 3)
    assert [setup.swap_out(one) for one in forks] == [3, 1], "the number of blocks copied to the host"
    assert setup.swap_in(forks[0]) == 3, "the number of blocks copied to the pool"
    assert setup.swap_in(forks[1], setup.at_hand(forks[0])) == 1, "the number of blocks copied to the pool"
    assert forks[1].table.blocks[:2] == forks[0].table.blocks[:2]
    assert in_use(setup.allocator) == 4, "the number of blocks in use"
    setup.check(*forks, waiting=forks)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_task_7_only_a_block_with_the_right_hash_is_shared(place: int) -> None:
    """Oracle: by hand: one of three blocks is at hand; the others are copied, and the order is kept.

    Block 0 of the pool is a valid block.
    """
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:12], 12)
    setup.swap_out(sequence)
    block, digest = donor.table.blocks[place], donor.stream_of(0, 3).hashes[place]
    assert setup.swap_in(sequence, {digest: block, bytes(32): 70, b"": 71}) == 2
    assert sequence.table.blocks[place] == block
    setup.check(donor, sequence, waiting=[sequence])


def test_task_7_host_blocks_stay_until_forget() -> None:
    """Oracle: by hand: the sequence may be preempted again before the copies are made.

    Then it is swapped in again from the same host blocks, without another swap out.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.swap_out(sequence)
    before = counts(setup.space.allocator)
    for _ in range(2):
        assert len(setup.space.swap_in(sequence)) == 3
        assert counts(setup.space.allocator) == before
        sequence.release_pages()
        setup.overwrite_free_blocks()
        assert setup.space.blocks_to_swap_in(sequence) == 3, "the number of blocks to swap in"
    assert setup.swap_in(sequence) == 3, "the number of blocks copied to the pool"
    setup.check(sequence, waiting=[sequence])


def test_task_7_a_windowed_table_keeps_its_start() -> None:
    """Oracle: by hand: with 18 tokens, a window of 6 had blocks 3 and 4, one of 3 block 4: from 12 and 16 on.

    Common mistake: a windowed table that starts at 0.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence = setup.sequence(TEXT, 18)
    setup.swap_out(sequence)
    assert setup.swap_in(sequence) == 5 + 2 + 1, "the number of blocks copied to the pool"
    assert [getattr(table, "start", 0) for table in sequence.tables] == [0, 12, 16]
    setup.check(sequence, waiting=[sequence])
    setup.compute(sequence, 7)
    setup.check(sequence, waiting=[sequence])


@pytest.mark.parametrize(
    ("adopted", "copied", "starts"),
    [
        (1, 4 + 2 + 1, [0, 12, 16]),
        (2, 3 + 2 + 1, [0, 12, 16]),
        (3, 2 + 2 + 1, [0, 4, 16]),
        (4, 1 + 1 + 1, [0, 8, 12]),
    ],
)
def test_task_7_a_windowed_table_continues_at_its_first_host_block_or_skips_to_it(
    adopted: int, copied: int, starts: list[int]
) -> None:
    """Oracle: by hand: 18 tokens, windows of 6 and 3, and a prefix cache with the first blocks.

    With 2 of them the first window holds 0 .. 7, none of it needed any more: these are released, and the
    table continues at 12. With 3 it holds 4 .. 11, directly before 12: it continues and may release them
    later.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence, donor = setup.sequence(TEXT, 18), setup.sequence(TEXT, 0)
    setup.swap_out(sequence)
    for _ in range(adopted):
        setup.compute(donor, 4)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.swap_in(sequence) == copied, "the number of blocks copied to the pool"
    assert [getattr(table, "start", 0) for table in sequence.tables] == starts
    setup.check(sequence, donor, waiting=[sequence])


@pytest.mark.parametrize("adopted", [0, 1, 2])
def test_task_7_a_windowed_table_without_host_blocks_skips_too(adopted: int) -> None:
    """Oracle: by hand: a window of 1 has passed all 8 tokens: its table starts at 8 and has no block.

    Common mistake: leaving the table at 0, which writes the next token to the wrong slot.
    """
    setup = Setup(windows=(None, 1))
    sequence, donor = setup.sequence(TEXT, 8), setup.sequence(TEXT, 0)
    assert setup.swap_out(sequence) == 2, "the number of blocks copied to the host"
    assert sequence.swapped is not None
    assert sequence.swapped.tables[1] == SwappedTable(2, [])
    for _ in range(adopted):
        setup.compute(donor, 4)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.swap_in(sequence) == 2 - adopted, "the number of blocks copied to the pool"
    assert [getattr(table, "start", 0) for table in sequence.tables] == [0, 8]
    setup.compute(sequence, 3)
    setup.check(sequence, donor, waiting=[sequence])


def test_task_7_windowed_tables_share_blocks_of_other_sequences() -> None:
    """Oracle: by hand: with 17 tokens, a window of 6 has block 3 and the first token of block 4.

    Two forks in two groups share 4 full blocks and 1, and each has one more block in each group.
    """
    setup = Setup(windows=(None, 6))
    leader = setup.sequence(TEXT[:16], 16)
    forks = [leader, leader.fork("fork", 1)]
    for index, one in enumerate(forks):
        one.outputs.append(index)
        setup.compute(one, 1)
    assert [setup.swap_out(one) for one in forks] == [5 + 2, 1 + 1], "the number of blocks copied to the host"
    assert setup.swap_in(forks[0]) == 7, "the number of blocks copied to the pool"
    assert setup.swap_in(forks[1], setup.at_hand(forks[0])) == 2, "the number of blocks copied to the pool"
    assert in_use(setup.allocator) == 9, "the number of blocks in use"
    setup.check(*forks, waiting=forks)


def test_task_7_blocks_of_other_layers_are_not_shared() -> None:
    """Oracle: by hand: the blocks at hand belong to the second group."""
    setup = Setup(windows=(None, None))
    donor, sequence = setup.sequence(TEXT[:8], 8), setup.sequence(TEXT[:8], 8)
    setup.swap_out(sequence)
    at_hand = dict(zip(donor.stream_of(1, 2).hashes, donor.tables[1].blocks, strict=True))
    assert setup.swap_in(sequence, at_hand) == 2, "the number of blocks copied to the pool"
    setup.check(donor, sequence, waiting=[sequence])
