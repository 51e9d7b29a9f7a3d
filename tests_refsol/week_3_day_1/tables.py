"""Day 3.1, tasks 3 to 7: block tables: append, slots, fork and release."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.paged_attention import BlockAllocator, BlockTable

from common.blocks import counts, holders
from common.examples import quick

# Task 3: BlockTable.blocks_to_append


def filled(num_tokens: int, *, num_blocks: int = 8, block_size: int = 4) -> BlockTable:
    """A table with this many tokens on a new pool, built without the methods under test."""
    return filled_from(BlockAllocator(num_blocks), num_tokens, block_size)


def filled_from(allocator: BlockAllocator, num_tokens: int, block_size: int = 4) -> BlockTable:
    """The same on an existing pool."""
    table = BlockTable(allocator, block_size)
    table.blocks = [allocator.allocate() for _ in range(-(-num_tokens // block_size))]
    table.num_tokens = num_tokens
    return table


def sharing(table: BlockTable) -> BlockTable:
    """A second table over the same blocks, built without the methods under test."""
    for block in table.blocks:
        table.allocator.add_ref(block)
    other = BlockTable(table.allocator, table.block_size)
    other.blocks, other.num_tokens = list(table.blocks), table.num_tokens
    return other


class State(NamedTuple):
    """The complete state of tables on one pool."""

    reference_counts: list[int]
    num_free: int
    blocks: list[list[int]]
    num_tokens: list[int]


def state(*tables: BlockTable) -> State:
    """The state of tables and of their pool."""
    blocks, num_tokens = [list(table.blocks) for table in tables], [table.num_tokens for table in tables]
    return State(counts(tables[0].allocator), tables[0].allocator.num_free, blocks, num_tokens)


def check_unchanged(before: State, *tables: BlockTable) -> None:
    """Assert that tables and pool are as they were; the message says what differs."""
    pairs = zip(State._fields, before, state(*tables), strict=True)
    changed = [f"{name} was {old} and is {new}" for name, old, new in pairs if old != new]
    assert not changed, f"this call must change nothing: {', '.join(changed)}"


def missing_blocks(table: BlockTable, num_new_tokens: int) -> int:
    """The number of logical blocks that get new tokens and that the table does not hold exclusively."""
    new = range(table.num_tokens, table.num_tokens + num_new_tokens)
    written = {position // table.block_size for position in new}
    own = {place for place, number in enumerate(holders(table)) if number == 1}
    return len(written - own)


@pytest.mark.parametrize(
    ("num_tokens", "new", "blocks"),
    [(0, 1, 1), (0, 4, 1), (0, 5, 2), (1, 3, 0), (1, 4, 1), (4, 1, 1), (6, 2, 0), (6, 3, 1), (8, 9, 3)],
)
def test_task_3_new_blocks_are_needed_only_for_tokens_that_do_not_fit_the_last_block(
    num_tokens: int, new: int, blocks: int
) -> None:
    """Oracle: by hand, blocks of 4. Common mistake: rounding up only the new tokens."""
    assert filled(num_tokens).blocks_to_append(new) == blocks


@pytest.mark.parametrize(("new", "blocks"), [(1, 1), (2, 1), (3, 2), (6, 2), (7, 3)])
def test_task_3_a_shared_partial_block_needs_one_more_block(new: int, blocks: int) -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: the last block holds 2 of them and must be copied."""
    table = filled(6)
    other = sharing(table)
    assert table.blocks_to_append(new) == blocks
    assert other.blocks_to_append(new) == blocks


@pytest.mark.parametrize(("new", "blocks"), [(1, 1), (4, 1), (5, 2)])
def test_task_3_full_shared_blocks_are_not_copied(new: int, blocks: int) -> None:
    """Oracle: by hand: 8 tokens fill two blocks of 4. Common mistake: copying the second one."""
    table = filled(8)
    assert sharing(table).blocks_to_append(new) == blocks


def test_task_3_only_a_shared_last_block_needs_a_copy() -> None:
    """Oracle: by hand: the first block is shared, the last one is not."""
    table = filled(6)
    table.allocator.add_ref(table.blocks[0])
    assert table.blocks_to_append(1) == 0


def test_task_3_zero_tokens_need_no_blocks() -> None:
    """Oracle: by hand: nothing is written, so nothing is copied; an empty table has no last block."""
    table = filled(6)
    sharing(table)
    assert table.blocks_to_append(0) == 0
    assert filled(0).blocks_to_append(0) == 0


def test_task_3_counting_the_blocks_to_append_changes_nothing() -> None:
    """Oracle: by hand; it does not check whether that many blocks are free."""
    table = filled(6, num_blocks=2)
    other = sharing(table)
    before = state(table, other)
    assert table.blocks_to_append(100) == 26
    check_unchanged(before, table, other)


@quick
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.data())
def test_task_3_the_count_is_the_number_of_blocks_that_the_append_must_allocate(
    block_size: int, num_tokens: int, new: int, data: st.DataObject
) -> None:
    """Oracle: the positions of the new tokens, one by one; any block may have other references."""
    table = filled(num_tokens, num_blocks=40, block_size=block_size)
    for block in table.blocks:
        if data.draw(st.booleans()):
            table.allocator.add_ref(block)
    assert table.blocks_to_append(new) == missing_blocks(table, new)


# Task 4: BlockTable.append_tokens


class SymbolicPool:
    """A pool that stores plain values instead of arrays, by block and offset."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], object] = {}  # by block and offset

    def append(self, table: BlockTable, tokens: Sequence[object]) -> int:
        """Append tokens to a sequence: first the copies, then the writes. Return the number of copies."""
        start = table.num_tokens
        copies = table.append_tokens(len(tokens))
        for copy in copies:
            for offset in range(copy.length):
                assert (copy.src, offset) in self.held, "a copy reads a slot that was never written"
                self.held[copy.dst, offset] = self.held[copy.src, offset]
        for position, token in enumerate(tokens, start):
            self.held[self.place(table, position)] = token
        return len(copies)

    def read(self, table: BlockTable) -> list[object]:
        """The values in the slots of a sequence's tokens."""
        return [self.held[self.place(table, position)] for position in range(table.num_tokens)]

    def place(self, table: BlockTable, position: int) -> tuple[int, int]:
        """Block and offset of a position."""
        return table.physical_indices()[position // table.block_size], position % table.block_size


SENTENCE = ["The", "cat", "sat", "on", "the", "mat"]


def test_task_4_six_tokens_take_two_blocks_of_four() -> None:
    """Oracle: by hand, blocks of 4; other requests hold blocks too, so the two are not adjacent."""
    allocator, pool = BlockAllocator(6), SymbolicPool()
    others = [allocator.allocate() for _ in range(6)]
    allocator.free(others[3])
    allocator.free(others[0])
    table = BlockTable(allocator, 4)
    assert pool.append(table, SENTENCE) == 0
    first, second = table.physical_indices()
    assert {first, second} == {others[0], others[3]}
    assert [pool.held[first, offset] for offset in range(4)] == ["The", "cat", "sat", "on"]
    assert [pool.held.get((second, offset)) for offset in range(4)] == ["the", "mat", None, None]
    assert pool.read(table) == SENTENCE


def test_task_4_the_last_block_is_filled_before_a_new_one_is_allocated() -> None:
    """Oracle: by hand, blocks of 3: tokens 1, 4 and 7 take a block. Earlier blocks stay in the table."""
    table = BlockTable(BlockAllocator(8), 3)
    held, before = [], []
    for num_tokens in range(1, 8):
        assert table.append_tokens(1) == []
        assert table.num_tokens == num_tokens
        assert table.blocks[: len(before)] == before
        before = list(table.blocks)
        held.append(len(before))
    assert held == [1, 1, 1, 2, 2, 2, 3]
    assert len(set(table.blocks)) == 3
    assert table.allocator.num_free == 5


@pytest.mark.parametrize(
    ("num_tokens", "new", "blocks"), [(0, 12, 3), (0, 13, 4), (2, 2, 1), (2, 7, 3), (4, 4, 2)]
)
def test_task_4_many_tokens_can_be_appended_at_once(num_tokens: int, new: int, blocks: int) -> None:
    """Oracle: by hand, blocks of 4."""
    table = filled(num_tokens)
    held = list(table.blocks)
    assert table.append_tokens(new) == []
    assert table.num_tokens == num_tokens + new
    assert table.blocks[: len(held)] == held
    assert len(table.blocks) == len(set(table.blocks)) == blocks
    assert holders(table) == [1] * blocks
    assert table.allocator.num_free == 8 - blocks


@pytest.mark.parametrize(("num_tokens", "new"), [(0, 13), (5, 8), (8, 5), (12, 1)])
def test_task_4_tokens_that_do_not_fit_are_rejected_and_change_nothing(num_tokens: int, new: int) -> None:
    """Oracle: by hand: the pool has 3 blocks of 4.

    Common mistake: taking the free blocks before the error.
    """
    table = filled(num_tokens, num_blocks=3)
    before = state(table)
    with pytest.raises(OutOfBlocksError):
        table.append_tokens(new)
    check_unchanged(before, table)
    table.append_tokens(12 - num_tokens)
    assert sorted(table.blocks) == [0, 1, 2], "a smaller append must still succeed"


def test_task_4_appending_zero_tokens_changes_nothing() -> None:
    """Oracle: by hand: even if the last block is shared, and if no block is free."""
    table = filled(6, num_blocks=2)
    other, empty = sharing(table), BlockTable(table.allocator, 4)
    before = state(table, other, empty)
    assert [one.append_tokens(0) for one in (table, other, empty)] == [[], [], []]
    check_unchanged(before, table, other, empty)


def test_task_4_only_a_shared_partial_block_is_copied() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: the second block holds 2, and only these are copied."""
    table = filled(6)
    other = sharing(table)
    first, shared = table.blocks
    [copy] = other.append_tokens(1)
    assert (copy.src, copy.length) == (shared, 2)
    assert copy.dst not in (first, shared)
    assert other.blocks == [first, copy.dst]
    assert other.num_tokens == 7
    assert (table.blocks, table.num_tokens) == ([first, shared], 6), "the other table must not change"
    assert [table.allocator.ref_count(block) for block in (first, shared, copy.dst)] == [2, 1, 1]
    assert table.allocator.num_free == 5


def test_task_4_a_shared_block_is_copied_only_once() -> None:
    """Oracle: by hand: after the copy each table has its own last block and writes in place."""
    table = filled(6)
    other = sharing(table)
    copies = [other.append_tokens(1), other.append_tokens(1), table.append_tokens(1), table.append_tokens(1)]
    assert [len(made) for made in copies] == [1, 0, 0, 0]
    assert [len(one.blocks) for one in (table, other)] == [2, 2]
    assert table.allocator.num_free == 5


def test_task_4_the_last_of_three_holders_writes_in_place() -> None:
    """Oracle: by hand: two copies, to different blocks."""
    table = filled(6)
    tables = [table, sharing(table), sharing(table)]
    shared = table.blocks[-1]
    [one], [two] = tables[2].append_tokens(1), tables[0].append_tokens(2)
    assert tables[1].append_tokens(2) == []
    assert (one.src, one.length) == (two.src, two.length) == (shared, 2)
    assert len({shared, one.dst, two.dst}) == 3
    assert [one.dst, shared, two.dst] == [tables[2].blocks[-1], tables[1].blocks[-1], tables[0].blocks[-1]]


def test_task_4_full_shared_blocks_are_never_copied() -> None:
    """Oracle: by hand: 8 tokens in blocks of 4: the next token goes to a new block of each table."""
    table = filled(8)
    other, shared = sharing(table), list(table.blocks)
    assert table.append_tokens(3) == []
    assert other.append_tokens(3) == []
    assert table.blocks[:2] == other.blocks[:2] == shared
    assert table.blocks[2] != other.blocks[2]
    assert table.allocator.num_free == 4


def test_task_4_one_append_may_need_a_copy_and_new_blocks() -> None:
    """Oracle: by hand: 2 of 7 tokens go to the copy, 4 and 1 to new blocks. The length is 2."""
    table = filled(6)
    other = sharing(table)
    first, shared = table.blocks
    [copy] = other.append_tokens(7)
    assert (copy.src, copy.length) == (shared, 2)
    assert other.blocks[:2] == [first, copy.dst]
    assert len(set(other.blocks)) == 4
    assert other.num_tokens == 13
    assert table.allocator.num_free == 3


@pytest.mark.parametrize(("free", "new"), [(0, 1), (0, 2), (1, 3), (1, 6), (2, 7)])
def test_task_4_a_copy_that_does_not_fit_is_rejected_and_changes_nothing(free: int, new: int) -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: a copy and zero, one or two new blocks.

    Common mistakes: copying before it is known that the rest fits, not counting the copy.
    """
    table = filled(6, num_blocks=2 + free)
    other = sharing(table)
    before = state(table, other)
    with pytest.raises(OutOfBlocksError):
        other.append_tokens(new)
    check_unchanged(before, table, other)


def test_task_4_after_a_copy_each_table_reads_its_own_tokens() -> None:
    """Oracle: the tokens themselves, in a pool of plain values."""
    pool, table = SymbolicPool(), BlockTable(BlockAllocator(4), 4)
    pool.append(table, SENTENCE)
    other = sharing(table)
    assert pool.append(other, ["and", "slept", "there"]) == 1
    assert pool.read(table) == SENTENCE, "the first table's tokens must not change"
    assert pool.append(table, ["again"]) == 0
    assert pool.read(table) == [*SENTENCE, "again"]
    assert pool.read(other) == [*SENTENCE, "and", "slept", "there"]


@quick
@example(block_size=4, num_tokens=6, new=3, free=1, others=[1, 1])
@given(
    block_size=st.integers(1, 6),
    num_tokens=st.integers(0, 20),
    new=st.integers(0, 20),
    free=st.integers(0, 8),
    others=st.lists(st.integers(0, 2), min_size=20, max_size=20),
)
def test_task_4_an_append_takes_the_missing_blocks_or_changes_nothing(
    block_size: int, num_tokens: int, new: int, free: int, others: list[int]
) -> None:
    """Oracle: the positions of the new tokens, one by one: every written block has one reference."""
    table = filled(num_tokens, num_blocks=-(-num_tokens // block_size) + free + 1, block_size=block_size)
    allocator = table.allocator
    allocator.allocate()  # another sequence's
    for block, number in zip(table.blocks, others, strict=False):
        for _ in range(number):
            allocator.add_ref(block)
    before, held, missing = state(table), list(table.blocks), missing_blocks(table, new)
    if missing > free:
        with pytest.raises(OutOfBlocksError):
            table.append_tokens(new)
        check_unchanged(before, table)
        return
    copies = table.append_tokens(new)
    assert allocator.num_free == free - missing
    assert table.num_tokens == num_tokens + new
    assert len(table.blocks) == len(set(table.blocks)) == -(-table.num_tokens // block_size)
    written = {position // block_size for position in range(num_tokens, num_tokens + new)}
    assert {holders(table)[place] for place in written} <= {1}
    changed = [place for place, block in enumerate(held) if table.blocks[place] != block]
    assert [(copy.src, copy.dst) for copy in copies] == [(held[at], table.blocks[at]) for at in changed]
    assert [copy.length for copy in copies] == [num_tokens % block_size for _ in changed]


# Task 5: BlockTable.slots


def test_task_5_a_slot_is_block_times_block_size_plus_offset() -> None:
    """Oracle: by hand: the sentence's table of 4-token blocks [7, 42]."""
    table = BlockTable(BlockAllocator(43), 4)
    table.blocks, table.num_tokens = [7, 42], 6
    assert table.slots(0, 6) == [28, 29, 30, 31, 168, 169]


def test_task_5_slots_of_any_range_are_in_token_order() -> None:
    """Oracle: by hand: within a block, across a block boundary, a single token."""
    table = BlockTable(BlockAllocator(10), 4)
    table.blocks, table.num_tokens = [9, 2, 5], 11
    assert table.slots(1, 3) == [37, 38]
    assert table.slots(3, 6) == [39, 8, 9]
    assert table.slots(2, 10) == [38, 39, 8, 9, 10, 11, 20, 21]
    assert table.slots(10, 11) == [22]


def test_task_5_an_empty_range_has_no_slots() -> None:
    """Oracle: by hand: at the start, in the middle, after the last token, and in an empty table."""
    table = filled(6)
    assert [table.slots(position, position) for position in (0, 3, 6)] == [[], [], []]
    assert filled(0).slots(0, 0) == []


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (6, 8), (7, 7), (0, 9), (-1, 2), (-2, -1), (3, 2)])
def test_task_5_positions_without_a_token_are_rejected(start: int, stop: int) -> None:
    """Oracle: the docstring: 6 tokens in two blocks of 4. The two free slots belong to no token."""
    with pytest.raises(ValueError):
        filled(6).slots(start, stop)


class TableWithPlaceholders(BlockTable):
    """A table whose first blocks were released: `physical_indices` has placeholders for them."""

    def physical_indices(self) -> list[int]:
        """Two placeholders, then the blocks."""
        return [0, 0, *self.blocks]


def test_task_5_slots_are_computed_from_blocks_and_not_from_physical_indices() -> None:
    """Oracle: the docstring: ids from `blocks`; `physical_indices`, which is for kernels, is longer here."""
    table = TableWithPlaceholders(BlockAllocator(10), 4)
    table.blocks, table.num_tokens = [9, 2], 6
    assert table.slots(3, 6) == [39, 8, 9]


def test_task_5_with_blocks_of_one_token_slots_are_block_ids() -> None:
    """Oracle: by hand: the slots are the blocks."""
    table = filled(3, block_size=1)
    assert table.slots(0, 3) == table.blocks


@quick
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.data())
def test_task_5_no_slot_belongs_to_two_tokens(
    block_size: int, one: int, two: int, data: st.DataObject
) -> None:
    """Oracle: counting: two tables have one slot per token; a range of tokens has that range of the slots."""
    allocator = BlockAllocator(62)
    first, second = (filled_from(allocator, num_tokens, block_size) for num_tokens in (one, two))
    slots = [*first.slots(0, one), *second.slots(0, two)]
    assert len(set(slots)) == one + two
    assert all(0 <= slot < 62 * block_size for slot in slots)
    assert all(allocator.ref_count(slot // block_size) == 1 for slot in slots)
    start = data.draw(st.integers(0, one))
    stop = data.draw(st.integers(start, one))
    assert first.slots(start, stop) == slots[start:stop]


# Task 6: BlockTable.fork


def test_task_6_a_fork_shares_all_blocks_and_allocates_none() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4. Common mistake: not counting the reference."""
    table = filled(6)
    held = list(table.blocks)
    child = table.fork()
    assert child is not table
    assert (child.blocks, child.num_tokens, child.block_size) == (held, 6, 4)
    assert (table.blocks, table.num_tokens) == (held, 6)
    assert [table.allocator.ref_count(block) for block in held] == [2, 2]
    assert table.allocator.num_free == 6


def test_task_6_a_fork_does_not_change_blocks_of_other_tables() -> None:
    """Oracle: by hand."""
    table = filled(6)
    other = filled_from(table.allocator, 5)
    table.fork()
    assert holders(other) == [1, 1]


def test_task_6_a_fork_of_an_empty_table_is_empty() -> None:
    """Oracle: by hand."""
    table = filled(0)
    child = table.fork()
    assert (len(child.blocks), child.num_tokens) == (0, 0)
    assert table.allocator.num_free == 8


def test_task_6_a_fork_can_be_forked() -> None:
    """Oracle: by hand: four references."""
    table = filled(5)
    child = table.fork()
    tables = [table, child, child.fork(), table.fork()]
    assert all(one.blocks == table.blocks for one in tables)
    assert holders(table) == [4, 4]


@pytest.mark.parametrize("num_tokens", [0, 3, 4, 6])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_task_6_parent_and_child_grow_independently(num_tokens: int, writer: str) -> None:
    """Oracle: by hand, blocks of 4.

    Common mistake: two tables that share one list.
    """
    table = filled(num_tokens)
    held, child = list(table.blocks), table.fork()
    writing, other = (table, child) if writer == "parent" else (child, table)
    writing.append_tokens(6)
    assert (other.blocks, other.num_tokens) == (held, num_tokens)
    assert writing.num_tokens == num_tokens + 6
    assert len(writing.blocks) == -(-writing.num_tokens // 4)
    full = num_tokens // 4
    assert writing.blocks[:full] == held[:full], "full blocks must stay shared"
    assert set(writing.blocks[full:]).isdisjoint(held[full:]), "written blocks must not be shared"


def test_task_6_three_completions_of_one_prompt_share_its_full_blocks() -> None:
    """Oracle: the tokens, in a pool of plain values; blocks by hand.

    A prompt of 10 tokens takes 3 blocks of 4. Three completions of 3 tokens copy the third block twice, and
    each takes one block more: 2 + 3 + 3 blocks instead of 12.
    """
    pool, allocator = SymbolicPool(), BlockAllocator(8)
    prompt = [f"prompt {i}" for i in range(10)]
    leader = BlockTable(allocator, 4)
    pool.append(leader, prompt)
    tables = [leader, leader.fork(), leader.fork()]
    copies = 0
    for step in range(3):
        for number, table in enumerate(tables):
            copies += pool.append(table, [f"word {step} of {number}"])
    assert copies == 2
    assert allocator.num_free == 0
    for number, table in enumerate(tables):
        assert pool.read(table) == [*prompt, *(f"word {step} of {number}" for step in range(3))]
    assert holders(leader) == [3, 3, 1, 1]


# Task 7: BlockTable.release


def test_task_7_releasing_a_table_frees_every_block_and_empties_it() -> None:
    """Oracle: by hand."""
    table = filled(6)
    table.release()
    assert (len(table.blocks), table.num_tokens) == (0, 0)
    assert table.allocator.num_free == 8
    assert counts(table.allocator) == [0] * 8


def test_task_7_releasing_twice_frees_once() -> None:
    """Oracle: by hand: at the second call the blocks belong to another table."""
    table = filled(8, num_blocks=2)
    table.release()
    other = filled_from(table.allocator, 8)
    table.release()
    assert holders(other) == [1, 1]
    assert table.allocator.num_free == 0
    filled(0).release()


def test_task_7_shared_blocks_stay_with_the_other_holders() -> None:
    """Oracle: by hand: parent and child share one full block and have one more each."""
    table = filled(4)
    child = table.fork()
    table.append_tokens(1)
    child.append_tokens(1)
    child.release()
    assert holders(table) == [1, 1]
    assert table.allocator.num_free == 6
    table.release()
    assert table.allocator.num_free == 8


def test_task_7_the_last_holder_writes_in_place_after_the_others_have_released() -> None:
    """Oracle: by hand: the last block was shared until the others were released."""
    table = filled(6)
    child, grandchild = table.fork(), table.fork()
    table.release()
    child.release()
    held = list(grandchild.blocks)
    assert grandchild.append_tokens(2) == []
    assert grandchild.blocks == held


def test_task_7_a_released_table_can_be_used_again() -> None:
    """Oracle: by hand, a pool of two blocks of 4: the whole pool is free again after each of three rounds."""
    table = BlockTable(BlockAllocator(2), 4)
    for _ in range(3):
        table.append_tokens(8)
        assert sorted(table.blocks) == [0, 1]
        table.release()


class Tables(RuleBasedStateMachine):
    """Tables grow, fork and are released in any order, on a pool that is often too small."""

    allocator: BlockAllocator
    texts: list[tuple[BlockTable, list[int]]]  # each table, and the tokens that its blocks must hold

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.pool = BlockAllocator(num_blocks), SymbolicPool()
        self.fresh: Iterator[int] = count()
        self.texts = [(BlockTable(self.allocator, block_size), [])]

    @rule(which=st.integers(0, 4), num_new_tokens=st.integers(0, 9))
    def grow(self, which: int, num_new_tokens: int) -> None:
        self.append(*self.texts[which % len(self.texts)], num_new_tokens)

    @rule()
    def grow_all_by_one(self) -> None:
        for table, text in self.texts:
            self.append(table, text, 1)

    @precondition(lambda self: len(self.texts) < 5)
    @rule(which=st.integers(0, 4))
    def fork(self, which: int) -> None:
        table, text = self.texts[which % len(self.texts)]
        free = self.allocator.num_free
        self.texts.append((table.fork(), list(text)))
        assert self.allocator.num_free == free

    @precondition(lambda self: len(self.texts) > 1)
    @rule(which=st.integers(0, 4))
    def release(self, which: int) -> None:
        table, _ = self.texts.pop(which % len(self.texts))
        table.release()

    @precondition(lambda self: len(self.texts) == 5)
    @rule()
    def release_all(self) -> None:
        for table, text in self.texts:
            table.release()
            text.clear()
        assert self.allocator.num_free == self.allocator.num_blocks, "blocks are missing from the pool"

    def append(self, table: BlockTable, text: list[int], num_new_tokens: int) -> None:
        tokens = [next(self.fresh) for _ in range(num_new_tokens)]
        if missing_blocks(table, num_new_tokens) <= self.allocator.num_free:
            self.pool.append(table, tokens)
            text.extend(tokens)
            return
        before = state(*(one for one, _ in self.texts))
        with pytest.raises(OutOfBlocksError):
            table.append_tokens(num_new_tokens)
        check_unchanged(before, *(one for one, _ in self.texts))

    @invariant()
    def check(self) -> None:
        held = Counter(block for table, _ in self.texts for block in table.physical_indices())
        listed = [held[block] for block in range(self.allocator.num_blocks)]
        assert counts(self.allocator) == listed, "a count is not the number of tables that list the block"
        assert self.allocator.num_free + len(held) == self.allocator.num_blocks
        for table, text in self.texts:
            assert self.pool.read(table) == text, "a table reads the tokens of another"
            assert len(table.blocks) == len(set(table.blocks)) == -(-len(text) // table.block_size)


def test_task_7_blocks_are_conserved_in_any_order_of_operations() -> None:
    """Oracle: a count of every table's blocks, and a pool of plain values.

    Free and allocated blocks make up the whole pool; a block's reference count is the number of tables that
    contain it; each table reads its own tokens; an append that does not fit changes nothing; at the end all
    blocks are free.
    """
    run_state_machine_as_test(Tables, settings=settings(quick, max_examples=60, stateful_step_count=30))
