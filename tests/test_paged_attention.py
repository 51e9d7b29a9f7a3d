"""BlockAllocator and BlockTable: which tables hold which blocks. Plain ints; the oracle is counting.

No test depends on block ids: any order of allocation is correct.
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.errors import DoubleFreeError, OutOfBlocksError, UnknownBlockError
from tiny_llm.paged_attention import BlockAllocator, BlockTable


def table_with(num_tokens: int, *, num_blocks: int = 8, block_size: int = 4) -> BlockTable:
    table = BlockTable(BlockAllocator(num_blocks), block_size)
    table.append_tokens(num_tokens)
    return table


# Allocator.


def test_every_block_is_allocated_once_until_none_is_free() -> None:
    allocator = BlockAllocator(5)
    blocks = [allocator.allocate() for _ in range(5)]
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    with pytest.raises(OutOfBlocksError, match="all 5 are held"):
        allocator.allocate()


def test_a_freed_block_can_be_allocated_again() -> None:
    allocator = BlockAllocator(1)
    block = allocator.allocate()
    allocator.free(block)
    assert allocator.num_free == 1
    assert allocator.allocate() == block


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.add_ref(block)
    allocator.free(block)
    assert (allocator.ref_count(block), allocator.num_free) == (1, 1)
    allocator.free(block)
    assert (allocator.ref_count(block), allocator.num_free) == (0, 2)


@pytest.mark.parametrize("operation", ["free", "add_ref"])
def test_a_block_without_a_holder_cannot_be_freed_or_shared(operation: str) -> None:
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    allocator.free(block)
    with pytest.raises(DoubleFreeError, match=f"block {block} "):
        getattr(allocator, operation)(block)
    assert allocator.num_free == 3


@pytest.mark.parametrize("operation", ["free", "add_ref", "ref_count"])
@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_outside_the_pool_is_rejected(operation: str, block: int) -> None:
    with pytest.raises(UnknownBlockError, match=f"block {block} is not in this pool of 3"):
        getattr(BlockAllocator(3), operation)(block)


@pytest.mark.parametrize("num_blocks", [0, -4])
def test_a_pool_has_at_least_one_block(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"not {num_blocks}"):
        BlockAllocator(num_blocks)


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["allocate", "add_ref", "free"]), st.integers(0, 5))),
)
def test_counts_equal_those_of_a_plain_counter(num_blocks: int, operations: list[tuple[str, int]]) -> None:
    allocator, counts = BlockAllocator(num_blocks), Counter()
    for operation, block in operations:
        if operation == "allocate" and allocator.num_free:
            counts[allocator.allocate()] += 1
        elif operation == "add_ref" and counts[block]:
            allocator.add_ref(block)
            counts[block] += 1
        elif operation == "free" and counts[block]:
            allocator.free(block)
            counts[block] -= 1
        assert [allocator.ref_count(b) for b in range(num_blocks)] == [counts[b] for b in range(num_blocks)]
        assert allocator.num_free == sum(counts[b] == 0 for b in range(num_blocks))


# Table.


@given(st.integers(1, 17), st.lists(st.integers(0, 40), max_size=8))
def test_a_table_holds_only_the_blocks_that_its_tokens_need(block_size: int, appends: list[int]) -> None:
    table = BlockTable(BlockAllocator(400), block_size)
    for count in appends:
        predicted = table.blocks_to_append(count)
        before = table.allocator.num_free
        assert table.append_tokens(count) == []
        assert before - table.allocator.num_free == predicted
    assert table.num_tokens == sum(appends)
    assert len(table.physical_indices()) == -(-sum(appends) // block_size)
    assert len(set(table.physical_indices())) == len(table.physical_indices())


def test_the_last_block_is_filled_before_another_is_allocated() -> None:
    table = table_with(5)
    blocks = table.physical_indices()
    table.append_tokens(3)
    assert table.physical_indices() == blocks


def test_an_append_that_does_not_fit_changes_nothing() -> None:
    table = table_with(5, num_blocks=3)
    blocks = table.physical_indices()
    with pytest.raises(OutOfBlocksError, match=r"8 more tokens after 5 need 2 blocks of 4; 1 of 3 are free"):
        table.append_tokens(8)
    assert (table.physical_indices(), table.num_tokens, table.allocator.num_free) == (blocks, 5, 1)


def test_a_copy_on_write_that_does_not_fit_changes_nothing() -> None:
    table = table_with(5, num_blocks=2)
    child = table.fork()
    with pytest.raises(OutOfBlocksError):
        child.append_tokens(1)
    assert child.physical_indices() == table.physical_indices()
    assert [table.allocator.ref_count(block) for block in table.blocks] == [2, 2]


def test_a_fork_shares_every_block_and_allocates_none() -> None:
    table = table_with(6)
    free = table.allocator.num_free
    child = table.fork()
    assert child.physical_indices() == table.physical_indices()
    assert child.num_tokens == 6
    assert table.allocator.num_free == free
    assert all(table.allocator.ref_count(block) == 2 for block in table.blocks)


def test_a_write_after_a_fork_copies_the_shared_partial_block_once() -> None:
    table = table_with(6)
    child = table.fork()
    [first, shared] = table.physical_indices()
    [copy] = child.append_tokens(1)
    assert (copy.src, copy.length) == (shared, 2)
    assert child.physical_indices() == [first, copy.dst]
    assert copy.dst != shared
    assert table.physical_indices() == [first, shared]
    assert child.append_tokens(1) == []
    assert table.append_tokens(1) == [], "the last holder writes in place"


def test_a_full_shared_block_is_never_copied() -> None:
    table = table_with(8)
    child = table.fork()
    assert child.append_tokens(1) == []
    assert child.physical_indices()[:2] == table.physical_indices()


def test_an_empty_append_to_a_shared_block_copies_nothing() -> None:
    child = table_with(6).fork()
    assert child.blocks_to_append(0) == 0
    assert child.append_tokens(0) == []


def test_a_release_drops_only_the_tables_own_references() -> None:
    table = table_with(6)
    child = table.fork()
    child.append_tokens(5)
    child.release()
    assert (child.physical_indices(), child.num_tokens) == ([], 0)
    assert all(table.allocator.ref_count(block) == 1 for block in table.blocks)
    table.release()
    table.release()
    assert table.allocator.num_free == table.allocator.num_blocks


def test_physical_indices_returns_a_copy() -> None:
    table = table_with(6)
    table.physical_indices().clear()
    assert len(table.physical_indices()) == 2


@pytest.mark.parametrize("block_size", [0, -1])
def test_a_block_holds_at_least_one_token(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"not {block_size}"):
        BlockTable(BlockAllocator(1), block_size)


@given(st.integers(1, 17), st.integers(0, 60), st.data())
def test_a_slot_consists_of_the_tokens_block_and_offset(
    block_size: int, num_tokens: int, data: st.DataObject
) -> None:
    table = BlockTable(BlockAllocator(60), block_size)
    table.append_tokens(num_tokens)
    start = data.draw(st.integers(0, num_tokens))
    stop = data.draw(st.integers(start, num_tokens))
    blocks = table.physical_indices()
    expected = [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]
    assert table.slots(start, stop) == expected
    assert len(set(table.slots(0, num_tokens))) == num_tokens


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 7), (7, 7)])
def test_positions_outside_the_table_have_no_slots(start: int, stop: int) -> None:
    table = BlockTable(BlockAllocator(4), 4)
    table.append_tokens(6)
    with pytest.raises(ValueError, match="the table's 6 tokens"):
        table.slots(start, stop)
