"""Day 3.5, tasks 1 to 5: the tokens that a window sees, and tables that start at its first block."""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import Span, pack_batch
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sliding_window import NO_BLOCK, WindowedTable, first_visible, sliding_window_mask

from common.blocks import counts
from common.examples import quick


def seen_from(position: int, window: int) -> list[int]:
    """The positions that a query sees: the last `window` of all up to its own."""
    return list(range(position + 1))[-window:]


# Task 1: first_visible


@pytest.mark.parametrize(
    ("position", "window", "first"),
    [(5, 3, 3), (3, 3, 1), (2, 3, 0), (0, 3, 0), (1, 3, 0), (7, 1, 7), (0, 1, 0), (9, 100, 0)],
)
def test_task_1_a_query_sees_its_own_token_and_earlier_ones(position: int, window: int, first: int) -> None:
    """Oracle: by hand: with a window of 3, position 5 sees 3, 4 and 5.

    Common mistakes: `position - window`, which is one token too many, and negative positions.
    """
    assert first_visible(position, window) == first


@pytest.mark.parametrize("window", [1, 2, 5, 16, 60])
def test_task_1_a_query_sees_the_last_window_positions(window: int) -> None:
    """Oracle: a slice of a list of all positions."""
    for position in range(50):
        assert first_visible(position, window) == seen_from(position, window)[0]


def test_task_1_a_window_of_3_of_8_blocks_saves_42_percent() -> None:
    """Oracle: counted by hand: 8 blocks, and a window of 3: 1 + 2 + 3 * 6 = 21 pairs of 36 causal ones.

    Common mistakes: counting positions before the first block (3 * 8 = 24), counting pairs that a causal mask
    hides (8 * 8 = 64).
    """
    pairs = sum(block - first_visible(block, 3) + 1 for block in range(8))
    causal = sum(block - first_visible(block, 8) + 1 for block in range(8))
    assert (pairs, causal) == (21, 36)
    assert round(100 * (1 - pairs / causal)) == 42


@pytest.mark.parametrize("window", [0, -1])
def test_task_1_a_window_below_one_is_rejected(window: int) -> None:
    """Oracle: the docstring."""
    for position in (0, 5):
        with pytest.raises(ValueError):
            first_visible(position, window)


# Task 2: sliding_window_mask

NO = -float("inf")


def test_task_2_with_a_window_of_two_each_token_sees_two_tokens() -> None:
    """Oracle: by hand: four tokens, a window of 2."""
    mask = sliding_window_mask(4, 4, 2)
    assert mask.tolist() == [[0, NO, NO, NO], [0, 0, NO, NO], [NO, 0, 0, NO], [NO, NO, 0, 0]]


def test_task_2_the_rows_are_the_last_tokens() -> None:
    """Oracle: by hand: the last two of five, a window of 3. Common mistake: rows that start at position 0."""
    assert sliding_window_mask(2, 5, 3).tolist() == [[NO, 0, 0, 0, NO], [NO, NO, 0, 0, 0]]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 9), (4, 4), (3, 9), (9, 9), (8, 9)])
def test_task_2_the_mask_matches_a_loop_over_all_pairs(length: int, total: int, window: int) -> None:
    """Oracle: a loop over all pairs; a window larger than the sequence gives a causal mask."""
    mask = np.array(sliding_window_mask(length, total, window))
    assert mask.shape == (length, total)
    for row, position in enumerate(range(total - length, total)):
        seen = seen_from(position, window)
        assert mask[row].tolist() == [0 if other in seen else NO for other in range(total)]


def test_task_2_the_mask_leaves_weight_only_on_visible_tokens() -> None:
    """Oracle: by hand: with equal scores all visible tokens have the same weight, the others none."""
    weights = mx.softmax(mx.zeros((2, 3, 3)) + sliding_window_mask(3, 3, 2), axis=-1)
    np.testing.assert_allclose(np.array(weights)[1], [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]], atol=1e-6)


# Task 3: WindowedTable.release_before


def table_of(
    blocks: Sequence[int], num_tokens: int, *, start: int = 0, block_size: int = 4, num_blocks: int = 10
) -> WindowedTable:
    """A table of `num_tokens` from `start` on in exactly these blocks; the pool's other blocks are free."""
    allocator = BlockAllocator(num_blocks)
    for _ in range(num_blocks):
        allocator.allocate()
    for block in set(range(num_blocks)) - set(blocks):
        allocator.free(block)
    table = WindowedTable(allocator, block_size)
    table.blocks, table.num_tokens, table.start = list(blocks), num_tokens, start
    return table


def state(table: WindowedTable) -> tuple[object, ...]:
    """The complete state of a table and its pool."""
    return table.start, table.num_tokens, list(table.blocks), counts(table.allocator)


def expect(table: WindowedTable, start: int, num_tokens: int, blocks: Sequence[int]) -> None:
    """Assert that a table holds exactly these blocks of its pool, each with one reference."""
    assert (table.start, table.num_tokens, list(table.blocks)) == (start, num_tokens, list(blocks))
    assert counts(table.allocator) == [int(block in blocks) for block in range(table.allocator.num_blocks)]


def test_task_3_blocks_that_end_before_a_position_are_released() -> None:
    """Oracle: by hand: 10 tokens in blocks 7, 2 and 5 of 4; from position 8 on, only the third is needed."""
    table = table_of([7, 2, 5], 10)
    assert list(table.release_before(8)) == [7, 2]
    expect(table, 8, 2, [5])
    assert table.allocator.num_free == 9


@pytest.mark.parametrize(
    ("position", "num_released"), [(0, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2), (9, 2), (10, 2), (100, 2)]
)
def test_task_3_a_block_is_released_when_all_its_positions_are_before_the_given_one(
    position: int, num_released: int
) -> None:
    """Oracle: by hand, blocks of 4; a last block that is not full stays, for every position."""
    table, blocks = table_of([7, 2, 5], 10), [7, 2, 5]
    assert list(table.release_before(position)) == blocks[:num_released]
    expect(table, 4 * num_released, 10 - 4 * num_released, blocks[num_released:])


@pytest.mark.parametrize(
    ("position", "num_released"), [(0, 0), (8, 0), (11, 0), (12, 1), (16, 2), (18, 2), (99, 2)]
)
def test_task_3_positions_count_from_the_start_of_the_sequence(position: int, num_released: int) -> None:
    """Oracle: by hand: a table that starts at 8 and holds 8 .. 17.

    Common mistake: counting from the start of the table.
    """
    table, blocks = table_of([3, 9, 6], 10, start=8), [3, 9, 6]
    assert list(table.release_before(position)) == blocks[:num_released]
    expect(table, 8 + 4 * num_released, 10 - 4 * num_released, blocks[num_released:])


def test_task_3_a_full_last_block_can_be_released() -> None:
    """Oracle: by hand: 8 tokens, none of them visible any more; the sequence continues in a new block."""
    table = table_of([7, 2], 8)
    assert list(table.release_before(8)) == [7, 2]
    expect(table, 8, 0, [])
    table.append_tokens(3)
    assert (table.start, table.num_tokens, len(table.blocks)) == (8, 3, 1)


def test_task_3_blocks_are_released_only_once() -> None:
    """Oracle: by hand: by then the block may belong to another sequence."""
    table = table_of([7, 2, 5], 10)
    table.release_before(5)
    before = state(table)
    for position in (5, 4, 0, 7):
        assert list(table.release_before(position)) == []
        assert state(table) == before


def test_task_3_blocks_with_other_holders_stay_with_them() -> None:
    """Oracle: by hand: blocks 7 and 5 have a second reference; only 2 is free afterwards."""
    table = table_of([7, 2, 5], 12)
    table.allocator.add_ref(7)
    table.allocator.add_ref(5)
    assert list(table.release_before(12)) == [7, 2, 5]
    assert [table.allocator.ref_count(block) for block in (7, 2, 5)] == [1, 0, 1]


@quick
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=20),
)
def test_task_3_random_growth_and_release_match_a_dict(
    block_size: int, steps: list[tuple[bool, int]]
) -> None:
    """Oracle: a dict from positions to blocks, from which whole blocks are deleted one by one."""
    table, block_of, end = WindowedTable(BlockAllocator(200), block_size), dict[int, int](), 0
    for grows, number in steps:
        if grows:
            table.append_tokens(number % 9)
            new, end = range(end, end + number % 9), end + number % 9
            block_of |= {p: table.blocks[(p - table.start) // block_size] for p in new}
        else:
            passed = []
            while block_of and len(block_of) >= block_size and min(block_of) + block_size <= number:
                first = min(block_of)
                passed.append(block_of[first])
                block_of = {
                    position: block for position, block in block_of.items() if position >= first + block_size
                }
            assert list(table.release_before(number)) == passed
        assert list(table.blocks) == list(dict.fromkeys(block_of.values()))
        assert (table.num_tokens, table.start) == (len(block_of), end - len(block_of))
        assert Counter(counts(table.allocator))[1] == len(table.blocks) == 200 - table.allocator.num_free


def test_task_3_a_sequence_of_a_hundred_tokens_needs_three_blocks() -> None:
    """Oracle: by hand: a window of 5 and 4 new tokens are in at most 3 blocks of 4.

    This uses the batch manager without a model; the whole sequence would take 25 blocks.
    """
    manager = PagedBatchManager(
        3, 4, 1, max_batched_tokens=4, max_model_len=100, groups=(LayerGroup((0, 1), 5),)
    )
    manager.add_request([1] * 90, "a", SamplingParams(max_tokens=10))
    sequence = manager.sequence("a")
    while sequence.num_computed < 99:
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
        assert len(sequence.table.blocks) <= 2, "a query sees 4 tokens before its own"
    manager.finish("a")
    assert manager.allocator.num_free == 3


# Task 4: WindowedTable.skip_to


def test_task_4_a_table_can_skip_to_a_later_position() -> None:
    """Oracle: by hand: 6 tokens in two blocks, continued at 12: both blocks are released."""
    table = table_of([7, 2], 6)
    assert list(table.skip_to(12)) == [7, 2]
    expect(table, 12, 0, [])
    table.append_tokens(5)
    assert (table.start, table.num_tokens, len(table.blocks)) == (12, 5, 2)


@pytest.mark.parametrize(
    ("num_tokens", "start", "position"), [(8, 0, 8), (8, 8, 16), (5, 8, 16), (0, 0, 0), (0, 8, 8), (0, 8, 20)]
)
def test_task_4_a_position_at_or_after_the_end_is_accepted(
    num_tokens: int, start: int, position: int
) -> None:
    """Oracle: by hand, blocks of 4, even if there is nothing to release or nothing to skip."""
    blocks = [3, 9][: -(-num_tokens // 4)]
    table = table_of(blocks, num_tokens, start=start)
    assert list(table.skip_to(position)) == blocks
    expect(table, position, 0, [])


@pytest.mark.parametrize("position", [0, 4, 8, 12, 13, 14, 15, 17])
def test_task_4_any_other_position_is_rejected_and_changes_nothing(position: int) -> None:
    """Oracle: the docstring: a table that holds 8 .. 13; positions inside it and between block boundaries."""
    table = table_of([3, 9], 6, start=8)
    before = state(table)
    with pytest.raises(ValueError):
        table.skip_to(position)
    assert state(table) == before


def test_task_4_skipped_blocks_with_other_holders_stay_with_them() -> None:
    """Oracle: by hand."""
    table = table_of([7, 2], 8)
    table.allocator.add_ref(2)
    assert list(table.skip_to(8)) == [7, 2]
    assert [table.allocator.ref_count(block) for block in (7, 2)] == [0, 1]


# Task 5: WindowedTable.physical_indices


def test_task_5_each_released_block_has_a_placeholder() -> None:
    """Oracle: by hand: position 8 is in the third logical block, for every start of the table.

    Common mistake: a list without placeholders, which puts position 0 into block 7.
    """
    assert list(table_of([7, 2], 6, start=8).physical_indices()) == [NO_BLOCK, NO_BLOCK, 7, 2]


def test_task_5_a_table_without_released_blocks_has_no_placeholder() -> None:
    """Oracle: by hand: changing the returned list must not change the table."""
    blocks = [7, 2]
    table = table_of(blocks, 6)
    table.physical_indices().clear()
    assert list(table.physical_indices()) == list(table.blocks) == blocks


def test_task_5_a_table_without_blocks_has_only_placeholders() -> None:
    """Oracle: by hand."""
    assert list(table_of([], 0, start=12).physical_indices()) == [NO_BLOCK] * 3
    assert list(table_of([], 0).physical_indices()) == []


def test_task_5_packing_a_batch_keeps_the_placeholders() -> None:
    """Oracle: by hand: the last of 14 tokens, and 3 tokens of another table; the shorter row is padded."""
    long, short = table_of([7, 2], 6, start=8), table_of([5], 3)
    batch = pack_batch([Span(long, 13, 14), Span(short, 0, 3)])
    assert batch.tables.tolist() == [[NO_BLOCK, NO_BLOCK, 7, 2], [5, 0, 0, 0]]
    assert batch.slots.tolist() == [9, 20, 21, 22]
    assert batch.positions.tolist() == [13, 0, 1, 2]
