"""Tasks 6 and 7: what waits on the host comes back, beside what is in the pool already."""

import pytest
from tiny_llm.sequence import SwappedTable

from common.blocks import counts
from week_3_day_6.two_pools import TEXT, Setup, in_use

# Task 6: SwapSpace.blocks_to_swap_in


@pytest.mark.parametrize(
    ("computed", "adopted", "blocks"), [(10, 0, 3), (12, 0, 3), (1, 0, 1), (10, 1, 2), (10, 2, 1), (12, 2, 1)]
)
def test_task_6_what_the_cache_had_need_not_come(computed: int, adopted: int, blocks: int) -> None:
    """Oracle: by hand, blocks of 4: of 10 tokens, 8 of which were adopted, one block is missing."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:12], computed)
    assert setup.out(sequence) is not None
    assert setup.adopt(sequence, donor, adopted)
    assert setup.space.blocks_to_swap_in(sequence) == blocks, "blocks that it would take"


@pytest.mark.parametrize(
    ("adopted", "blocks"), [(0, 5 + 2 + 1), (1, 4 + 2 + 1), (2, 3 + 2 + 1), (3, 2 + 2 + 1), (4, 1 + 1 + 1)]
)
def test_task_6_a_windows_blocks_count_from_its_first(adopted: int, blocks: int) -> None:
    """Oracle: by hand: 18 tokens; windows of 6 and 3 have blocks 3 and 4, and block 4, on the host.

    With one block adopted, 4 of the first table are missing and all of the others: a negative number of
    blocks to leave out is the mistake.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence, donor = setup.sequence(TEXT, 18), setup.sequence(TEXT, 0)
    assert setup.out(sequence) == 8, "copies made when going out"
    for count in (4,) * adopted:
        setup.compute(donor, count)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.space.blocks_to_swap_in(sequence) == blocks, "blocks that it would take"


def test_task_6_counting_takes_nothing() -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.out(sequence)
    assert [setup.space.blocks_to_swap_in(sequence) for _ in range(2)] == [3, 3], "blocks that it would take"
    setup.check(waiting=[sequence])
    assert sequence.table.blocks == []


# Task 7: SwapSpace.swap_in


def test_task_7_what_went_out_comes_back() -> None:
    """Oracle: by hand: 10 tokens in three new blocks, filled from the three on the host, in order."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.out(sequence)
    assert sequence.swapped is not None
    waiting = sequence.swapped.tables[0].host_blocks
    copies = setup.space.swap_in(sequence)
    assert dict(copies) == dict(zip(sequence.table.blocks, waiting, strict=True))
    assert (sequence.table.num_tokens, sequence.num_computed) == (10, 10)
    assert in_use(setup.allocator) == 3, "blocks in use"


@pytest.mark.parametrize("computed", [1, 3, 4, 5, 8, 9, 16, 17])
def test_task_7_as_many_tokens_as_there_were(computed: int) -> None:
    """Oracle: symbolic contents; and the text goes on where it was.

    A last block that counts as full would leave a hole behind it: the mistake.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    blocks = setup.out(sequence)
    assert setup.back(sequence) == blocks, "copies made when coming back"
    setup.check(sequence, waiting=[sequence])
    setup.compute(sequence, 6)
    setup.check(sequence, waiting=[sequence])


def test_task_7_it_had_found_as_much_as_before() -> None:
    """Oracle: by hand: 4 tokens had been cached when it came; that it finds 8 now says nothing about that."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:10], 10)
    sequence.num_cached_tokens = 4
    setup.out(sequence)
    setup.adopt(sequence, donor, 2)
    setup.back(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (10, 4)


@pytest.mark.parametrize(("adopted", "copied"), [(0, 3), (1, 2), (2, 1)])
def test_task_7_what_it_holds_already_stays(adopted: int, copied: int) -> None:
    """Oracle: by hand: blocks that the prefix cache still had are not copied, and not taken twice."""
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:11], 11)
    setup.out(sequence)
    setup.adopt(sequence, donor, adopted)
    assert setup.back(sequence) == copied, "copies made when coming back"
    assert sequence.table.blocks[:adopted] == donor.table.blocks[:adopted]
    assert in_use(setup.allocator) == 3 + copied, "blocks in use"
    setup.check(donor, sequence, waiting=[sequence])


def test_task_7_full_blocks_at_hand_are_shared() -> None:
    """Oracle: by hand: the first of two forks is back, with 8 tokens of both and 3 of its own.

    The second shares 2 blocks with it, and is given 1: a holder more for each, and no copy.
    """
    setup = Setup()
    leader = setup.sequence(TEXT[:8], 8)
    family = [leader, leader.fork("fork", 1)]
    for index, one in enumerate(family):
        one.outputs += [index] * 3
        setup.compute(one, 3)
    assert [setup.out(one) for one in family] == [3, 1], "copies made when going out"
    assert setup.back(family[0]) == 3, "copies made when coming back"
    assert setup.back(family[1], setup.at_hand(family[0])) == 1, "copies made when coming back"
    assert family[1].table.blocks[:2] == family[0].table.blocks[:2]
    assert in_use(setup.allocator) == 4, "blocks in use"
    setup.check(*family, waiting=family)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_task_7_at_hand_is_what_has_the_hash_and_nothing_else(place: int) -> None:
    """Oracle: by hand: one block of three is at hand; the others are copied, and all stand in their order.

    Block 0 of the pool is a block like any other.
    """
    setup = Setup()
    donor, sequence = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:12], 12)
    setup.out(sequence)
    block, digest = donor.table.blocks[place], donor.stream_of(0, 3).hashes[place]
    assert setup.back(sequence, {digest: block, bytes(32): 70, b"": 71}) == 2
    assert sequence.table.blocks[place] == block
    setup.check(donor, sequence, waiting=[sequence])


def test_task_7_the_host_blocks_stay_until_they_are_forgotten() -> None:
    """Oracle: by hand: the copies are still to be made, and it may be preempted again before.

    Then it comes back once more, from the same host blocks, without having been swapped out again.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    setup.out(sequence)
    before = counts(setup.space.allocator)
    for _ in range(2):
        assert len(setup.space.swap_in(sequence)) == 3
        assert counts(setup.space.allocator) == before
        sequence.release_pages()
        setup.spoil()
        assert setup.space.blocks_to_swap_in(sequence) == 3, "blocks that it would take"
    assert setup.back(sequence) == 3, "copies made when coming back"
    setup.check(sequence, waiting=[sequence])


def test_task_7_a_window_begins_where_it_did() -> None:
    """Oracle: by hand: of 18 tokens windows of 6 and 3 had blocks 3 and 4, and block 4: from 12 and 16 on.

    A windowed table that begins at 0 has other positions than its keys: the mistake.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence = setup.sequence(TEXT, 18)
    setup.out(sequence)
    assert setup.back(sequence) == 5 + 2 + 1, "copies made when coming back"
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
def test_task_7_windows_go_on_where_they_are_or_skip(adopted: int, copied: int, starts: list[int]) -> None:
    """Oracle: by hand: 18 tokens, windows of 6 and 3, and a prefix cache that had the first blocks.

    With 2 of them the first window holds 0 .. 7, of which nothing is needed any more: those go back, and it
    goes on at 12. With 3 it holds 4 .. 11, and 12 is just behind: it goes on, and may release later.
    """
    setup = Setup(windows=(None, 6, 3))
    sequence, donor = setup.sequence(TEXT, 18), setup.sequence(TEXT, 0)
    setup.out(sequence)
    for _ in range(adopted):
        setup.compute(donor, 4)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.back(sequence) == copied, "copies made when coming back"
    assert [getattr(table, "start", 0) for table in sequence.tables] == starts
    setup.check(sequence, donor, waiting=[sequence])


@pytest.mark.parametrize("adopted", [0, 1, 2])
def test_task_7_a_window_with_nothing_on_the_host_skips_too(adopted: int) -> None:
    """Oracle: by hand: a window of 1 has passed all 8 tokens: its table begins at 8, and has no block.

    A table that is left at 0, since nothing is to be copied, writes the next token to another place.
    """
    setup = Setup(windows=(None, 1))
    sequence, donor = setup.sequence(TEXT, 8), setup.sequence(TEXT, 0)
    assert setup.out(sequence) == 2, "copies made when going out"
    assert sequence.swapped is not None
    assert sequence.swapped.tables[1] == SwappedTable(2, [])
    for _ in range(adopted):
        setup.compute(donor, 4)
    assert setup.adopt(sequence, donor, adopted)
    assert setup.back(sequence) == 2 - adopted, "copies made when coming back"
    assert [getattr(table, "start", 0) for table in sequence.tables] == [0, 8]
    setup.compute(sequence, 3)
    setup.check(sequence, donor, waiting=[sequence])


def test_task_7_windows_share_what_is_at_hand() -> None:
    """Oracle: by hand: of 17 tokens a window of 6 has block 3 and the first token of block 4.

    Two forks in two groups: 4 full blocks and 1, and each of them begins a block of its own in each group.
    """
    setup = Setup(windows=(None, 6))
    leader = setup.sequence(TEXT[:16], 16)
    family = [leader, leader.fork("fork", 1)]
    for index, one in enumerate(family):
        one.outputs.append(index)
        setup.compute(one, 1)
    assert [setup.out(one) for one in family] == [5 + 2, 1 + 1], "copies made when going out"
    assert setup.back(family[0]) == 7, "copies made when coming back"
    assert setup.back(family[1], setup.at_hand(family[0])) == 2, "copies made when coming back"
    assert in_use(setup.allocator) == 9, "blocks in use"
    setup.check(*family, waiting=family)


def test_task_7_the_same_at_hand_of_other_layers_is_no_help() -> None:
    """Oracle: by hand: what is at hand is of the second group only."""
    setup = Setup(windows=(None, None))
    donor, sequence = setup.sequence(TEXT[:8], 8), setup.sequence(TEXT[:8], 8)
    setup.out(sequence)
    at_hand = dict(zip(donor.stream_of(1, 2).hashes, donor.tables[1].blocks, strict=True))
    assert setup.back(sequence, at_hand) == 2, "copies made when coming back"
    setup.check(donor, sequence, waiting=[sequence])
