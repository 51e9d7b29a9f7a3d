"""Day 3.6, tasks 3 and 4: references to host blocks, and their release."""

import pytest
from tiny_llm.sequence import PagedSequence, SwappedTable
from tiny_llm.swap import HostBlock, SwapSpace

from common.blocks import counts
from week_3_day_6.two_pools import SIZE, TEXT, Setup, in_use

# Task 3: SwapSpace.hold


def held(space: SwapSpace, sequence: PagedSequence, place: int, index: int = 0) -> HostBlock:
    """The host block for one block of a sequence; fails if there is none."""
    found = space.hold(sequence, index, place)
    assert found is not None, "`hold` returned None although host blocks are free"
    return found


def test_task_3_a_new_host_block_has_one_reference() -> None:
    """Oracle: by hand: three blocks of one sequence, full or not, take three host blocks and need copies."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:10], 10)
    found = [held(setup.space, sequence, place) for place in range(3)]
    assert [each.is_new for each in found] == [True, True, True]
    assert len({each.block for each in found}) == 3
    assert [setup.space.allocator.ref_count(each.block) for each in found] == [1, 1, 1]
    assert in_use(setup.space.allocator) == 3, "the number of blocks in use"


def test_task_3_a_full_block_with_equal_content_is_shared() -> None:
    """Oracle: by hand: the first block of both is the same, the second is not."""
    setup = Setup()
    first, second = setup.sequence(TEXT[:8], 8), setup.sequence((*TEXT[:6], 1, 2), 8)
    first_blocks = [held(setup.space, first, place) for place in range(2)]
    second_blocks = [held(setup.space, second, place) for place in range(2)]
    assert second_blocks[0] == HostBlock(first_blocks[0].block, is_new=False)
    assert second_blocks[1].is_new
    assert second_blocks[1].block != first_blocks[1].block
    assert [setup.space.allocator.ref_count(each.block) for each in (*first_blocks, second_blocks[1])] == [
        2,
        1,
        1,
    ]


def test_task_3_a_partly_filled_block_is_not_shared() -> None:
    """Oracle: by hand: the same 6 tokens: block 1 has two of them, and both sequences will write to it."""
    setup = Setup()
    pair = [setup.sequence(TEXT[:6], 6) for _ in range(2)]
    found = [held(setup.space, one, 1) for one in pair]
    assert [each.is_new for each in found] == [True, True]
    assert in_use(setup.space.allocator) == 2, "the number of blocks in use"


def test_task_3_tables_of_different_layers_share_no_host_blocks() -> None:
    """Oracle: by hand: equal tokens have different keys in different layers, so the table's index matters."""
    setup = Setup(windows=(None, None))
    sequence = setup.sequence(TEXT[:4], 4)
    assert [held(setup.space, sequence, 0, index).is_new for index in (0, 1, 0, 1)] == [
        True,
        True,
        False,
        False,
    ]
    assert in_use(setup.space.allocator) == 2, "the number of blocks in use"


def test_task_3_a_full_host_returns_only_blocks_that_it_already_has() -> None:
    """Oracle: by hand: one host block. None for other content, without a change; equal content is found."""
    setup = Setup(host_blocks=1)
    sequence = setup.sequence(TEXT[:8], 8)
    block = held(setup.space, sequence, 0).block
    assert setup.space.hold(sequence, 0, 1) is None
    assert counts(setup.space.allocator) == [1]
    assert held(setup.space, sequence, 0) == HostBlock(block, is_new=False)
    assert counts(setup.space.allocator) == [2]


# Task 4: SwapSpace.release


def test_task_4_every_block_of_every_table_is_released() -> None:
    """Oracle: by hand: two tables with 3 and 1 blocks, and a third one without any."""
    space = SwapSpace(6, SIZE)
    blocks = [space.allocator.allocate() for _ in range(5)]
    space.release([SwappedTable(0, blocks[:3]), SwappedTable(7, blocks[3:4]), SwappedTable(0, [])])
    assert [space.allocator.ref_count(block) for block in blocks] == [0, 0, 0, 0, 1]
    space.release([])
    assert in_use(space.allocator) == 1, "the number of blocks in use"


def test_task_4_a_release_drops_one_reference() -> None:
    """Oracle: by hand: a block with another reference is not free and is still found without a copy."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:4], 4)
    block = held(setup.space, sequence, 0).block
    held(setup.space, sequence, 0)
    setup.space.release([SwappedTable(0, [block])])
    assert setup.space.allocator.ref_count(block) == 1
    assert held(setup.space, sequence, 0) == HostBlock(block, is_new=False)


def test_task_4_a_host_block_without_references_is_not_found() -> None:
    """Oracle: by hand: one host block, for one content and then another.

    Common mistake: leaving the old hash.
    """
    setup = Setup(host_blocks=1)
    one, other = setup.sequence(TEXT[:4], 4), setup.sequence([1, 2, 3, 4], 4)
    for sequence in (one, other, one, one):
        host_block = held(setup.space, sequence, 0)
        assert host_block.is_new, "it was found by an outdated hash"
        setup.space.release([SwappedTable(0, [host_block.block])])
        assert in_use(setup.space.allocator) == 0, "the number of blocks in use"


def test_task_4_releasing_a_partly_filled_block_needs_no_hash() -> None:
    """Oracle: by hand: full and partly filled blocks of one sequence are released together."""
    setup = Setup()
    sequence = setup.sequence(TEXT[:6], 6)
    found = [held(setup.space, sequence, place) for place in range(2)]
    setup.space.release([SwappedTable(0, [each.block for each in found])])
    assert in_use(setup.space.allocator) == 0, "the number of blocks in use"
    assert held(setup.space, sequence, 0).is_new


@pytest.mark.parametrize("first", [0, 1])
def test_task_4_a_full_block_whose_hash_belongs_to_another_block_can_be_released(first: int) -> None:
    """Oracle: by hand: two contents with one forged hash. Only the first is found by it.

    The second is full too but has no entry in `_hash_of`. Releasing it must keep the first one's hash.
    """
    setup = Setup()
    pair = [setup.sequence(TEXT[:4], 4), setup.sequence([1, 2, 3, 4], 4)]
    pair[1].stream_of(0, 1).hashes[0] = pair[0].stream_of(0, 1).hashes[0]
    found = [held(setup.space, one, 0) for one in pair]
    assert [each.is_new for each in found] == [True, True]
    setup.space.release([SwappedTable(0, [found[first].block])])
    assert held(setup.space, pair[0], 0).is_new == (first == 0), "is_new of the first content's block"
    setup.space.release([SwappedTable(0, [found[1 - first].block])])
    assert in_use(setup.space.allocator) == 1, "the number of blocks in use"
