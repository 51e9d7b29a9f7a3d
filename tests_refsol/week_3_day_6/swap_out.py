"""Task 5: what a sequence has computed is copied to the host."""

from collections import Counter
from collections.abc import Sequence

import pytest
from tiny_llm.sequence import SwappedTable
from tiny_llm.swap import SwapSpace

from common.blocks import counts
from week_3_day_6.two_pools import SIZE, TEXT, Setup, in_use

# Task 5: SwapSpace.swap_out


def test_task_5_what_is_computed_gets_host_blocks() -> None:
    """Oracle: by hand: 10 tokens are three blocks, the last of them half full. The sequence keeps its own."""
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
    assert in_use(setup.space.allocator) == 3, "blocks in use"
    assert (sequence.table.blocks, sequence.num_computed) == (blocks, 10)
    assert [setup.allocator.ref_count(block) for block in blocks] == [1, 1, 1]


def test_task_5_what_was_cached_is_remembered() -> None:
    """Oracle: `Swapped`: what a sequence had; 8 of its tokens had been found in a cache."""
    sequence = Setup().sequence(TEXT[:10], 10)
    sequence.num_cached_tokens = 8
    SwapSpace(3, SIZE).swap_out(sequence)
    assert sequence.swapped is not None
    assert (sequence.swapped.num_computed, sequence.swapped.num_cached_tokens) == (10, 8)


@pytest.mark.parametrize(("computed", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 4)])
def test_task_5_blocks_that_are_begun_go_too(computed: int, blocks: int) -> None:
    """Oracle: by hand."""
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    assert setup.out(sequence) == in_use(setup.space.allocator) == blocks, "copies made when going out"
    setup.check(waiting=[sequence])


@pytest.mark.parametrize(("computed", "blocks"), [(6, 2), (4, 1), (1, 1)])
def test_task_5_pages_of_tokens_to_come_stay(computed: int, blocks: int) -> None:
    """Oracle: by hand: this step was to compute up to token 14, so the table has four blocks already.

    What they would hold is not there. Common mistake: going by the table, not by what is computed,.
    """
    setup = Setup()
    sequence = setup.sequence(TEXT, computed)
    sequence.append_tokens(14 - computed)
    assert setup.out(sequence) == blocks, "copies made when going out"
    setup.check(waiting=[sequence])


def test_task_5_what_two_have_in_common_is_on_the_host_once() -> None:
    """Oracle: by hand: of 11 and 14 tokens the first 9 are the same: two full blocks.

    They lie in other blocks of the pool: what is in them counts.
    """
    setup = Setup()
    first = setup.sequence(TEXT[:11], 11)
    second = setup.sequence((*TEXT[:9], *range(5)), 14)
    assert setup.out(first) == 3, "copies made when going out"
    assert setup.out(second) == 2, "copies made when going out"
    assert first.swapped is not None
    assert second.swapped is not None
    shared = first.swapped.tables[0].host_blocks[:2]
    assert second.swapped.tables[0].host_blocks[:2] == shared
    assert [setup.space.allocator.ref_count(block) for block in shared] == [2, 2]
    assert in_use(setup.space.allocator) == 5, "blocks in use"
    setup.check(waiting=[first, second])


def test_task_5_forks_leave_their_prompt_once() -> None:
    """Oracle: by hand: three forks of 8 tokens, each with 6 of its own: 2 blocks, and 2 for each of them."""
    setup = Setup()
    leader = setup.sequence(TEXT[:8], 8)
    family = [leader, *(leader.fork(str(i), i) for i in (1, 2))]
    for index, one in enumerate(family):
        one.outputs += [index] * 6
        setup.compute(one, 6)
    assert [setup.out(one) for one in family] == [4, 2, 2], "copies made when going out"
    setup.check(waiting=family)


def test_task_5_a_block_that_is_not_full_is_each_ones_own() -> None:
    """Oracle: by hand: 6 tokens, the same twice: one block is shared, and each has one of its own."""
    setup = Setup()
    family = [setup.sequence(TEXT[:6], 6) for _ in range(2)]
    assert [setup.out(one) for one in family] == [2, 1], "copies made when going out"
    assert in_use(setup.space.allocator) == 3, "blocks in use"
    setup.check(waiting=family)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_task_5_a_block_whose_last_token_is_known_but_not_computed_is_not_full(order: Sequence[int]) -> None:
    """Oracle: by hand: both know the same 8 tokens, and one of them has computed 7.

    Its tokens have a hash already. Whoever goes by that leaves a slot empty, or shares an empty one.
    """
    setup = Setup()
    pair = [setup.sequence(TEXT[:8], 7), setup.sequence(TEXT[:8], 8)]
    assert [setup.out(pair[i]) for i in order] == [2, 1], "copies made when going out"
    setup.check(waiting=pair)


def test_task_5_the_same_tokens_after_another_text_are_another_block() -> None:
    """Oracle: by hand: keys depend on all that comes before.

    Common mistake: going by a block's own tokens.
    """
    setup = Setup()
    pair = [setup.sequence((*start, *TEXT[:4]), 8) for start in ((1, 2, 3, 4), (5, 6, 7, 8))]
    assert [setup.out(one) for one in pair] == [2, 2], "copies made when going out"
    setup.check(waiting=pair)


def test_task_5_tenants_share_nothing() -> None:
    """Oracle: by hand: another salt, other hashes."""
    setup = Setup()
    family = [setup.sequence(TEXT[:8], 8, salt=salt) for salt in ("one", "two", "")]
    assert [setup.out(one) for one in family] == [2, 2, 2], "copies made when going out"


def test_task_5_outputs_are_shared_like_a_prompt() -> None:
    """Oracle: by hand: the one has as a prompt what the other has said."""
    setup = Setup()
    pair = [setup.sequence(TEXT[:5], 8, outputs=TEXT[5:9]), setup.sequence(TEXT[:9], 8)]
    assert [setup.out(one) for one in pair] == [2, 0], "copies made when going out"
    setup.check(waiting=pair)


def test_task_5_a_windows_table_begins_where_it_begins() -> None:
    """Oracle: by hand: of 18 tokens a window of 6 has blocks 3 and 4; the next token sees from 13 on.

    Common mistake: counting its blocks from 0 gives another's place to each.
    """
    setup = Setup(windows=(None, 6))
    sequence = setup.sequence(TEXT, 18)
    near = sequence.tables[1]
    assert (getattr(near, "start", 0), len(near.blocks)) == (12, 2)
    assert setup.out(sequence) == 5 + 2, "copies made when going out"
    assert sequence.swapped is not None
    assert [(table.first, len(table.host_blocks)) for table in sequence.swapped.tables] == [(0, 5), (3, 2)]
    setup.check(waiting=[sequence])


def test_task_5_windows_share_what_both_have() -> None:
    """Oracle: by hand: a window of 6 has blocks 3 and 4 of 18 tokens, and blocks 2 and 3 of 15.

    Block 3 of the second is not full; so of the windowed blocks none is shared, and of the others three are.
    With 16 tokens it would be full: then it is shared.
    """
    for tokens, copied in ((15, 1 + 2), (16, 0 + 1)):
        setup = Setup(windows=(None, 6))
        first, second = setup.sequence(TEXT, 18), setup.sequence(TEXT, tokens)
        assert setup.out(first) == 7, "copies made when going out"
        assert setup.out(second) == copied, "copies made when going out"
        setup.check(waiting=[first, second])


def test_task_5_groups_of_layers_share_nothing() -> None:
    """Oracle: by hand: the same tokens in other layers are other keys."""
    setup = Setup(windows=(None, None, 50))
    sequence = setup.sequence(TEXT[:8], 8)
    assert setup.out(sequence) == 6, "copies made when going out"
    setup.check(waiting=[sequence])


def test_task_5_a_block_that_waits_for_its_copy_is_read_where_that_comes_from() -> None:
    """Oracle: by hand: a fork was to write into block 1, which it shared: its own block 1 is empty still."""
    setup = Setup()
    leader = setup.sequence(TEXT[:6], 6)
    fork = leader.fork("fork", 1)
    [copy] = fork.append_tokens(1)
    assert setup.pool[copy.dst] != setup.pool[copy.src]
    copies = SwapSpace(9, SIZE).swap_out(fork, {copy.dst: copy.src, 77: 78})
    assert copies is not None
    assert Counter(block for block, _ in copies) == Counter(leader.table.blocks)
    assert setup.out(fork, {copy.dst: copy.src}) == 2, "copies made when going out"
    setup.check(leader, waiting=[fork])


def test_task_5_copies_that_wait_in_every_group() -> None:
    """Oracle: by hand: two tables, two copies, in the middle of a text that windows have passed."""
    setup = Setup(windows=(None, 6, 3))
    leader = setup.sequence(TEXT, 18)
    fork = leader.fork("fork", 1)
    filled_from = {copy.dst: copy.src for copy in fork.append_tokens(5)}
    assert len(filled_from) == 3
    assert setup.out(fork, filled_from) == 5 + 2 + 1, "copies made when going out"
    setup.check(leader, waiting=[fork])


def test_task_5_as_many_blocks_as_are_free() -> None:
    """Oracle: by hand: three blocks for 10 tokens, and not one is left."""
    setup = Setup(host_blocks=3)
    sequence = setup.sequence(TEXT[:10], 10)
    assert setup.out(sequence) == 3, "copies made when going out"
    setup.check(waiting=[sequence])


def test_task_5_what_is_there_needs_no_free_block() -> None:
    """Oracle: by hand: the host is full of what the second one has. Common mistake: counting its blocks."""
    setup = Setup(host_blocks=3)
    first, second = setup.sequence(TEXT[:12], 12), setup.sequence(TEXT[:8], 8)
    assert setup.out(first) == 3, "copies made when going out"
    assert setup.out(second) == 0, "copies made when going out"
    setup.check(waiting=[first, second])


@pytest.mark.parametrize("windows", [(None,), (None, None)])
def test_task_5_without_blocks_for_all_nothing_is_held(windows: tuple[int | None, ...]) -> None:
    """Oracle: by hand: two blocks and one for each of two groups, one too few; the pages stay the sequence's.

    A reference that is kept, or a hash that is, would be found by the next one.
    """
    setup = Setup(windows, host_blocks=3 * len(windows) - 1)
    sequence = setup.sequence(TEXT[:10], 10)
    assert setup.space.swap_out(sequence) is None
    assert sequence.swapped is None
    assert in_use(setup.space.allocator) == 0, "blocks in use"
    setup.check(sequence)
    shorter = setup.sequence(TEXT[:8], 8)
    assert setup.out(shorter) == 2 * len(windows), "nothing of it is on the host"
    setup.check(sequence, waiting=[shorter])


def test_task_5_a_full_host_leaves_what_others_hold() -> None:
    """Oracle: by hand: two blocks are on the host, one more is free, and two are needed.

    The two that were found are the first one's: given up once too often they would be free.
    """
    setup = Setup(host_blocks=4)
    first, other = setup.sequence(TEXT[:8], 8), setup.sequence([1, 2], 2)
    assert (setup.out(first), setup.out(other)) == (2, 1), "copies made when going out"
    before = counts(setup.space.allocator)
    second = setup.sequence((*TEXT[:8], *range(6)), 14)
    assert setup.space.swap_out(second) is None
    assert counts(setup.space.allocator) == before
    setup.check(second, waiting=[first, other])
    third = setup.sequence((*TEXT[:8], *range(4)), 12)
    assert setup.out(third) == 1, "the first one's blocks are still found, the second one's are not"
    setup.check(second, waiting=[first, other, third])
