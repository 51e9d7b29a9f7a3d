"""Day 3.1, tasks 3 to 7: the blocks that a sequence's tokens are in, forked and released."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

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
    """A table with so many tokens on a pool of its own, put together by hand."""
    return filled_from(BlockAllocator(num_blocks), num_tokens, block_size)


def filled_from(allocator: BlockAllocator, num_tokens: int, block_size: int = 4) -> BlockTable:
    """The same on a pool that is there."""
    table = BlockTable(allocator, block_size)
    table.blocks = [allocator.allocate() for _ in range(-(-num_tokens // block_size))]
    table.num_tokens = num_tokens
    return table


def sharing(table: BlockTable) -> BlockTable:
    """A second table over the same blocks, put together by hand."""
    for block in table.blocks:
        table.allocator.add_ref(block)
    other = BlockTable(table.allocator, table.block_size)
    other.blocks, other.num_tokens = list(table.blocks), table.num_tokens
    return other


def state(*tables: BlockTable) -> tuple[object, ...]:
    """All that there is to know: every block's holders, how many blocks are free, what each table holds."""
    allocator = tables[0].allocator
    held = [(list(table.blocks), table.num_tokens) for table in tables]
    return counts(allocator), allocator.num_free, held


def missing_blocks(table: BlockTable, num_new_tokens: int) -> int:
    """Of the logical blocks that the new tokens are written to, those that it is not the only holder of."""
    new = range(table.num_tokens, table.num_tokens + num_new_tokens)
    written = {position // table.block_size for position in new}
    own = {place for place, number in enumerate(holders(table)) if number == 1}
    return len(written - own)


@pytest.mark.parametrize(
    ("num_tokens", "new", "blocks"),
    [(0, 1, 1), (0, 4, 1), (0, 5, 2), (1, 3, 0), (1, 4, 1), (4, 1, 1), (6, 2, 0), (6, 3, 1), (8, 9, 3)],
)
def test_task_3_tokens_take_the_blocks_that_the_last_one_has_no_room_for(
    num_tokens: int, new: int, blocks: int
) -> None:
    """Oracle: by hand, blocks of 4. Common mistake: rounding up only the new tokens."""
    assert filled(num_tokens).blocks_to_append(new) == blocks


@pytest.mark.parametrize(("new", "blocks"), [(1, 1), (2, 1), (3, 2), (6, 2), (7, 3)])
def test_task_3_a_shared_block_with_room_takes_one_more(new: int, blocks: int) -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: the last block holds 2 of them, and is to be copied."""
    table = filled(6)
    other = sharing(table)
    assert table.blocks_to_append(new) == blocks
    assert other.blocks_to_append(new) == blocks


@pytest.mark.parametrize(("new", "blocks"), [(1, 1), (4, 1), (5, 2)])
def test_task_3_full_shared_blocks_are_not_copied(new: int, blocks: int) -> None:
    """Oracle: by hand: 8 tokens fill two blocks of 4. Common mistake: to copy the second of them."""
    table = filled(8)
    assert sharing(table).blocks_to_append(new) == blocks


def test_task_3_only_the_last_block_matters() -> None:
    """Oracle: by hand: the first block is shared, the last one is not."""
    table = filled(6)
    table.allocator.add_ref(table.blocks[0])
    assert table.blocks_to_append(1) == 0


def test_task_3_no_tokens_take_no_blocks() -> None:
    """Oracle: by hand: nothing is written, so nothing is copied; an empty table has no last block."""
    table = filled(6)
    sharing(table)
    assert table.blocks_to_append(0) == 0
    assert filled(0).blocks_to_append(0) == 0


def test_task_3_it_only_looks() -> None:
    """Oracle: by hand; nor does it ask whether so many blocks are free."""
    table = filled(6, num_blocks=2)
    other = sharing(table)
    before = state(table, other)
    assert table.blocks_to_append(100) == 26
    assert state(table, other) == before


@quick
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.data())
def test_task_3_a_block_for_each_that_is_written_to_and_not_held_alone(
    block_size: int, num_tokens: int, new: int, data: st.DataObject
) -> None:
    """Oracle: the positions of the new tokens, one by one; any of the blocks may have other holders."""
    table = filled(num_tokens, num_blocks=40, block_size=block_size)
    for block in table.blocks:
        if data.draw(st.booleans()):
            table.allocator.add_ref(block)
    assert table.blocks_to_append(new) == missing_blocks(table, new)


# Task 4: BlockTable.append_tokens


class SymbolicPool:
    """What stands in each place of a pool, as plain values: copies and writes as arrays would do them."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], object] = {}  # by block and offset

    def append(self, table: BlockTable, tokens: Sequence[object]) -> int:
        """Append these tokens to a sequence: the copies first, then a write for each. How many copies."""
        start = table.num_tokens
        copies = table.append_tokens(len(tokens))
        for copy in copies:
            for offset in range(copy.length):
                assert (copy.src, offset) in self.held, "a place is copied in which no token is"
                self.held[copy.dst, offset] = self.held[copy.src, offset]
        for position, token in enumerate(tokens, start):
            self.held[self.place(table, position)] = token
        return len(copies)

    def read(self, table: BlockTable) -> list[object]:
        """What a sequence finds in the places of its tokens."""
        return [self.held[self.place(table, position)] for position in range(table.num_tokens)]

    def place(self, table: BlockTable, position: int) -> tuple[int, int]:
        """Block and offset of a position."""
        return table.physical_indices()[position // table.block_size], position % table.block_size


SENTENCE = ["The", "cat", "sat", "on", "the", "mat"]


def test_task_4_a_sentence_of_six_tokens_is_a_table_of_two_blocks() -> None:
    """Oracle: by hand, blocks of 4; other requests hold blocks too, so that the two lie anywhere."""
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


def test_task_4_the_last_block_is_filled_before_another_is_taken() -> None:
    """Oracle: by hand, blocks of 3: tokens 1, 4 and 7 take a block. What is held stays where it is."""
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
def test_task_4_many_tokens_at_once(num_tokens: int, new: int, blocks: int) -> None:
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
def test_task_4_all_tokens_find_room_or_none_does(num_tokens: int, new: int) -> None:
    """Oracle: by hand: the pool has 3 blocks of 4.

    Common mistake: taking what there is before the refusal.
    """
    table = filled(num_tokens, num_blocks=3)
    before = state(table)
    with pytest.raises(OutOfBlocksError):
        table.append_tokens(new)
    assert state(table) == before
    table.append_tokens(12 - num_tokens)
    assert sorted(table.blocks) == [0, 1, 2], "what does fit is taken afterwards"


def test_task_4_no_tokens_change_nothing() -> None:
    """Oracle: by hand: also where the last block is shared, and where no block is free."""
    table = filled(6, num_blocks=2)
    other, empty = sharing(table), BlockTable(table.allocator, 4)
    before = state(table, other, empty)
    assert [one.append_tokens(0) for one in (table, other, empty)] == [[], [], []]
    assert state(table, other, empty) == before


def test_task_4_a_shared_block_with_room_is_copied_and_no_other() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: the second block holds 2, and only these are copied."""
    table = filled(6)
    other = sharing(table)
    first, shared = table.blocks
    [copy] = other.append_tokens(1)
    assert (copy.src, copy.length) == (shared, 2)
    assert copy.dst not in (first, shared)
    assert other.blocks == [first, copy.dst]
    assert other.num_tokens == 7
    assert (table.blocks, table.num_tokens) == ([first, shared], 6), "the other owner sees nothing of it"
    assert [table.allocator.ref_count(block) for block in (first, shared, copy.dst)] == [2, 1, 1]
    assert table.allocator.num_free == 5


def test_task_4_it_is_copied_once() -> None:
    """Oracle: by hand: after the copy each has a block of its own, and writes in place."""
    table = filled(6)
    other = sharing(table)
    copies = [other.append_tokens(1), other.append_tokens(1), table.append_tokens(1), table.append_tokens(1)]
    assert [len(made) for made in copies] == [1, 0, 0, 0]
    assert [len(one.blocks) for one in (table, other)] == [2, 2]
    assert table.allocator.num_free == 5


def test_task_4_of_three_holders_the_last_writes_in_place() -> None:
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
    """Oracle: by hand: 8 tokens in blocks of 4: the next one goes to a block of its own for each."""
    table = filled(8)
    other, shared = sharing(table), list(table.blocks)
    assert table.append_tokens(3) == []
    assert other.append_tokens(3) == []
    assert table.blocks[:2] == other.blocks[:2] == shared
    assert table.blocks[2] != other.blocks[2]
    assert table.allocator.num_free == 4


def test_task_4_a_copy_and_new_blocks_at_once() -> None:
    """Oracle: by hand: of 7 tokens 2 go to the copy, 4 and 1 to new blocks. The length is 2."""
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
def test_task_4_a_copy_needs_a_block_as_well(free: int, new: int) -> None:
    """Oracle: by hand: 6 tokens in blocks of 4: a copy, and none, one or two blocks behind it.

    Common mistake: a copy before it is known that the rest fits, or one that was not counted,.
    """
    table = filled(6, num_blocks=2 + free)
    other = sharing(table)
    before = state(table, other)
    with pytest.raises(OutOfBlocksError):
        other.append_tokens(new)
    assert state(table, other) == before


def test_task_4_each_table_reads_its_own_tokens_after_a_copy() -> None:
    """Oracle: the words themselves, in a pool of plain values."""
    pool, table = SymbolicPool(), BlockTable(BlockAllocator(4), 4)
    pool.append(table, SENTENCE)
    other = sharing(table)
    assert pool.append(other, ["and", "slept", "there"]) == 1
    assert pool.read(table) == SENTENCE, "the first owner's words are untouched"
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
def test_task_4_an_append_takes_what_is_missing_or_changes_nothing(
    block_size: int, num_tokens: int, new: int, free: int, others: list[int]
) -> None:
    """Oracle: the positions of the new tokens, one by one: every block that is written to has one holder."""
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
        assert state(table) == before
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


def test_task_5_a_slot_is_block_and_offset_in_one_number() -> None:
    """Oracle: by hand: the sentence's table of 4-token blocks [7, 42]."""
    table = BlockTable(BlockAllocator(43), 4)
    table.blocks, table.num_tokens = [7, 42], 6
    assert table.slots(0, 6) == [28, 29, 30, 31, 168, 169]


def test_task_5_any_part_of_the_text_in_order() -> None:
    """Oracle: by hand: within a block, over its end, a single token."""
    table = BlockTable(BlockAllocator(10), 4)
    table.blocks, table.num_tokens = [9, 2, 5], 11
    assert table.slots(1, 3) == [37, 38]
    assert table.slots(3, 6) == [39, 8, 9]
    assert table.slots(2, 10) == [38, 39, 8, 9, 10, 11, 20, 21]
    assert table.slots(10, 11) == [22]


def test_task_5_an_empty_part_has_no_slots() -> None:
    """Oracle: by hand: at the start, in the middle, behind the last token; and in an empty table."""
    table = filled(6)
    assert [table.slots(position, position) for position in (0, 3, 6)] == [[], [], []]
    assert filled(0).slots(0, 0) == []


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (6, 8), (7, 7), (0, 9), (-1, 2), (-2, -1), (3, 2)])
def test_task_5_positions_without_a_token_have_no_slot(start: int, stop: int) -> None:
    """Oracle: the docstring: 6 tokens in two blocks of 4. The room for 7 and 8 is no token's yet."""
    with pytest.raises(ValueError):
        filled(6).slots(start, stop)


class Forgetful(BlockTable):
    """A table whose first tokens are forgotten: what a kernel is told has placeholders for their blocks."""

    def physical_indices(self) -> list[int]:
        """Two placeholders, and the blocks."""
        return [0, 0, *self.blocks]


def test_task_5_slots_are_in_the_blocks_that_the_table_has() -> None:
    """Oracle: the docstring: ids from `blocks`; `physical_indices` is for kernels, and has more here."""
    table = Forgetful(BlockAllocator(10), 4)
    table.blocks, table.num_tokens = [9, 2], 6
    assert table.slots(3, 6) == [39, 8, 9]


def test_task_5_blocks_of_one_token() -> None:
    """Oracle: by hand: the slots are the blocks."""
    table = filled(3, block_size=1)
    assert table.slots(0, 3) == table.blocks


@quick
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.data())
def test_task_5_no_slot_is_two_tokens(block_size: int, one: int, two: int, data: st.DataObject) -> None:
    """Oracle: counting: two tables' tokens have as many slots; a part of the text has that part of them."""
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


def test_task_6_a_fork_holds_the_same_blocks_and_takes_none() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4. Common mistake: a block whose new holder is not counted."""
    table = filled(6)
    held = list(table.blocks)
    child = table.fork()
    assert child is not table
    assert (child.blocks, child.num_tokens, child.block_size) == (held, 6, 4)
    assert (table.blocks, table.num_tokens) == (held, 6)
    assert [table.allocator.ref_count(block) for block in held] == [2, 2]
    assert table.allocator.num_free == 6


def test_task_6_blocks_of_other_tables_are_not_counted() -> None:
    """Oracle: by hand."""
    table = filled(6)
    other = filled_from(table.allocator, 5)
    table.fork()
    assert holders(other) == [1, 1]


def test_task_6_a_fork_of_nothing() -> None:
    """Oracle: by hand."""
    table = filled(0)
    child = table.fork()
    assert (len(child.blocks), child.num_tokens) == (0, 0)
    assert table.allocator.num_free == 8


def test_task_6_a_fork_of_a_fork() -> None:
    """Oracle: by hand: four holders."""
    table = filled(5)
    child = table.fork()
    tables = [table, child, child.fork(), table.fork()]
    assert all(one.blocks == table.blocks for one in tables)
    assert holders(table) == [4, 4]


@pytest.mark.parametrize("num_tokens", [0, 3, 4, 6])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_task_6_tables_go_on_independently(num_tokens: int, writer: str) -> None:
    """Oracle: by hand, blocks of 4.

    Common mistake: two tables that share one list see each other's blocks.
    """
    table = filled(num_tokens)
    held, child = list(table.blocks), table.fork()
    goes, stays = (table, child) if writer == "parent" else (child, table)
    goes.append_tokens(6)
    assert (stays.blocks, stays.num_tokens) == (held, num_tokens)
    assert goes.num_tokens == num_tokens + 6
    assert len(goes.blocks) == -(-goes.num_tokens // 4)
    full = num_tokens // 4
    assert goes.blocks[:full] == held[:full], "full blocks stay shared"
    assert set(goes.blocks[full:]).isdisjoint(held[full:]), "what is written to does not"


def test_task_6_three_completions_of_one_prompt() -> None:
    """Oracle: the words, in a pool of plain values; blocks by hand.

    10 tokens of a prompt are 3 blocks of 4. Three completions of 3 words: two copies of the third block, and
    each takes one more: 2 + 3 + 3 blocks instead of 12.
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


def test_task_7_every_block_goes_back_and_the_table_is_empty() -> None:
    """Oracle: by hand."""
    table = filled(6)
    table.release()
    assert (len(table.blocks), table.num_tokens) == (0, 0)
    assert table.allocator.num_free == 8
    assert counts(table.allocator) == [0] * 8


def test_task_7_releasing_twice_gives_back_once() -> None:
    """Oracle: by hand: by the second time the blocks are another table's."""
    table = filled(8, num_blocks=2)
    table.release()
    other = filled_from(table.allocator, 8)
    table.release()
    assert holders(other) == [1, 1]
    assert table.allocator.num_free == 0
    filled(0).release()


def test_task_7_what_others_hold_stays_with_them() -> None:
    """Oracle: by hand: parent and child share one full block, and each has one of its own."""
    table = filled(4)
    child = table.fork()
    table.append_tokens(1)
    child.append_tokens(1)
    child.release()
    assert holders(table) == [1, 1]
    assert table.allocator.num_free == 6
    table.release()
    assert table.allocator.num_free == 8


def test_task_7_the_last_holder_writes_in_place() -> None:
    """Oracle: by hand: the last block was shared until the others went."""
    table = filled(6)
    child, grandchild = table.fork(), table.fork()
    table.release()
    child.release()
    held = list(grandchild.blocks)
    assert grandchild.append_tokens(2) == []
    assert grandchild.blocks == held


def test_task_7_a_released_table_can_be_used_again() -> None:
    """Oracle: by hand, a pool of two blocks of 4: all of it is there again, for three times."""
    table = BlockTable(BlockAllocator(2), 4)
    for _ in range(3):
        table.append_tokens(8)
        assert sorted(table.blocks) == [0, 1]
        table.release()


class Tables(RuleBasedStateMachine):
    """Tables grow, fork and end in any order, on a pool that is often too small for them."""

    allocator: BlockAllocator
    texts: list[tuple[BlockTable, list[int]]]  # each table, and the tokens that it must find in its blocks

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
    def end(self, which: int) -> None:
        table, _ = self.texts.pop(which % len(self.texts))
        table.release()

    @precondition(lambda self: len(self.texts) == 5)
    @rule()
    def end_all(self) -> None:
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
        assert state(*(one for one, _ in self.texts)) == before, "a refusal changes nothing"

    @invariant()
    def check(self) -> None:
        held = Counter(block for table, _ in self.texts for block in table.physical_indices())
        assert counts(self.allocator) == [held[block] for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free + len(held) == self.allocator.num_blocks
        for table, text in self.texts:
            assert self.pool.read(table) == text, "a table reads another's tokens"
            assert len(table.blocks) == len(set(table.blocks)) == -(-len(text) // table.block_size)


def test_task_7_blocks_are_conserved_whatever_happens() -> None:
    """Oracle: a count of every table's blocks, and a pool of plain values.

    Free blocks and held ones are the whole pool; a block has as many holders as tables name it; each table
    reads its own tokens; what does not fit changes nothing; when all have ended, all blocks are free.
    """
    run_state_machine_as_test(Tables, settings=settings(quick, max_examples=60, stateful_step_count=30))
