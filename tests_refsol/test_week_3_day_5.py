"""Day 3.5: layers whose queries see the last W tokens alone, and pages that go back while the text goes on.

When it passes, you have windows on pages: what no query can see any more is neither read nor held; layers
that see everything share one pool with layers that do not; and a prefix is found where each of them has what
it still needs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_llm.grouped_attention import grouped_query_attention
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup, group_layers
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import PackedBatch, Span, pack_batch
from tiny_llm.policies import Policies
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.sliding_window import (
    NOWHERE,
    WindowedContext,
    WindowedTable,
    first_visible,
    sliding_window_mask,
    windowed_attention,
)
from tiny_llm.windowed_prefix import WindowedPrefixSharing

from tiny_llm_checkpoints.model_config import ModelConfig

# The model runs with and without compiled kernels; the warning that there are none is not this day's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")

# The same examples in every run, and no file that remembers the last failure.
quick = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
NOBODYS = 30.0  # what stands where no token is: large enough that whoever looks at it notices


def seen_from(position: int, window: int) -> list[int]:
    """The positions that a query sees, written down: the last `window` of all up to its own."""
    return list(range(position + 1))[-window:]


# Task 1: first_visible


@pytest.mark.parametrize(
    ("position", "window", "first"),
    [(5, 3, 3), (3, 3, 1), (2, 3, 0), (0, 3, 0), (1, 3, 0), (7, 1, 7), (0, 1, 0), (9, 100, 0)],
)
def test_task_1_a_query_sees_its_own_token_and_those_before_it(
    position: int, window: int, first: int
) -> None:
    """Oracle: by hand: with a window of 3, position 5 sees 3, 4 and 5.

    `position - window` is the mistake: one token too many; and no position is negative.
    """
    assert first_visible(position, window) == first


@pytest.mark.parametrize("window", [1, 2, 5, 16, 60])
def test_task_1_the_last_so_many_of_all_positions(window: int) -> None:
    """Oracle: a list of all positions, cut."""
    for position in range(50):
        assert first_visible(position, window) == seen_from(position, window)[0]


def test_task_1_what_a_window_saves() -> None:
    """Oracle: counted by hand: 8 blocks, and a window of 3: 1 + 2 + 3 * 6 = 21 pairs of 36 causal ones.

    Counting what lies before the first block (3 * 8 = 24), or what no causal mask lets through (8 * 8 = 64),
    are the mistakes.
    """
    pairs = sum(block - first_visible(block, 3) + 1 for block in range(8))
    causal = sum(block - first_visible(block, 8) + 1 for block in range(8))
    assert (pairs, causal) == (21, 36)
    assert round(100 * (1 - pairs / causal)) == 42


@pytest.mark.parametrize("window", [0, -1])
def test_task_1_a_window_without_a_token_is_refused(window: int) -> None:
    """Oracle: the docstring."""
    for position in (0, 5):
        with pytest.raises(ValueError):
            first_visible(position, window)


# Task 2: sliding_window_mask

NO = -float("inf")


def test_task_2_each_token_sees_two() -> None:
    """Oracle: by hand: four tokens, a window of 2."""
    mask = sliding_window_mask(4, 4, 2)
    assert mask.tolist() == [[0, NO, NO, NO], [0, 0, NO, NO], [NO, 0, 0, NO], [NO, NO, 0, 0]]


def test_task_2_the_tokens_are_the_last_ones() -> None:
    """Oracle: by hand: the last two of five, a window of 3. Rows that begin at position 0 are the mistake."""
    assert sliding_window_mask(2, 5, 3).tolist() == [[NO, 0, 0, 0, NO], [NO, NO, 0, 0, 0]]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 9), (4, 4), (3, 9), (9, 9), (8, 9)])
def test_task_2_what_is_seen_and_nothing_else(length: int, total: int, window: int) -> None:
    """Oracle: a loop over all pairs; a window larger than the text is a causal mask."""
    mask = np.array(sliding_window_mask(length, total, window))
    assert mask.shape == (length, total)
    for row, position in enumerate(range(total - length, total)):
        seen = seen_from(position, window)
        assert mask[row].tolist() == [0 if other in seen else NO for other in range(total)]


def test_task_2_added_to_scores_it_leaves_what_is_seen() -> None:
    """Oracle: by hand: of equal scores each that is seen has the same weight, and the others have none."""
    weights = mx.softmax(mx.zeros((2, 3, 3)) + sliding_window_mask(3, 3, 2), axis=-1)
    np.testing.assert_allclose(np.array(weights)[1], [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]], atol=1e-6)


# Task 3: WindowedTable.let_go


def table_of(
    blocks: Sequence[int], num_tokens: int, *, start: int = 0, block_size: int = 4, num_blocks: int = 10
) -> WindowedTable:
    """A table over just these blocks, `num_tokens` from `start` on, put together by hand; others are free."""
    allocator = BlockAllocator(num_blocks)
    for _ in range(num_blocks):
        allocator.allocate()
    for block in set(range(num_blocks)) - set(blocks):
        allocator.free(block)
    table = WindowedTable(allocator, block_size)
    table.blocks, table.num_tokens, table.start = list(blocks), num_tokens, start
    return table


def counts(allocator: BlockAllocator) -> list[int]:
    """How many holders each block of the pool has."""
    return [allocator.ref_count(block) for block in range(allocator.num_blocks)]


def state(table: WindowedTable) -> tuple[object, ...]:
    """All that there is to know of a table and its pool."""
    return table.start, table.num_tokens, list(table.blocks), counts(table.allocator)


def expect(table: WindowedTable, start: int, num_tokens: int, blocks: Sequence[int]) -> None:
    """A table that alone holds just these blocks of its pool."""
    assert (table.start, table.num_tokens, list(table.blocks)) == (start, num_tokens, list(blocks))
    assert counts(table.allocator) == [int(block in blocks) for block in range(table.allocator.num_blocks)]


def test_task_3_blocks_that_end_before_a_position_go_back() -> None:
    """Oracle: by hand: 10 tokens in blocks 7, 2 and 5 of 4; from position 8 on, the third is needed alone."""
    table = table_of([7, 2, 5], 10)
    assert list(table.let_go(8)) == [7, 2]
    expect(table, 8, 2, [5])
    assert table.allocator.num_free == 9


@pytest.mark.parametrize(
    ("position", "gone"), [(0, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2), (9, 2), (10, 2), (100, 2)]
)
def test_task_3_a_block_goes_when_all_of_it_is_passed(position: int, gone: int) -> None:
    """Oracle: by hand, blocks of 4; a last one that is not full stays, however far the position is."""
    table, blocks = table_of([7, 2, 5], 10), [7, 2, 5]
    assert list(table.let_go(position)) == blocks[:gone]
    expect(table, 4 * gone, 10 - 4 * gone, blocks[gone:])


@pytest.mark.parametrize(("position", "gone"), [(0, 0), (8, 0), (11, 0), (12, 1), (16, 2), (18, 2), (99, 2)])
def test_task_3_positions_are_those_of_the_text(position: int, gone: int) -> None:
    """Oracle: by hand: a table that begins at 8 and holds 8 .. 17. Counting from the table is the mistake."""
    table, blocks = table_of([3, 9, 6], 10, start=8), [3, 9, 6]
    assert list(table.let_go(position)) == blocks[:gone]
    expect(table, 8 + 4 * gone, 10 - 4 * gone, blocks[gone:])


def test_task_3_a_last_block_that_is_full_goes_too() -> None:
    """Oracle: by hand: 8 tokens, and none of them is seen any more; the text goes on in a new block."""
    table = table_of([7, 2], 8)
    assert list(table.let_go(8)) == [7, 2]
    expect(table, 8, 0, [])
    table.append_tokens(3)
    assert (table.start, table.num_tokens, len(table.blocks)) == (8, 3, 1)


def test_task_3_what_has_gone_does_not_go_again() -> None:
    """Oracle: by hand: a second reference would be another's by then."""
    table = table_of([7, 2, 5], 10)
    table.let_go(5)
    before = state(table)
    for position in (5, 4, 0, 7):
        assert list(table.let_go(position)) == []
        assert state(table) == before


def test_task_3_what_others_hold_stays_with_them() -> None:
    """Oracle: by hand: blocks 7 and 5 have a second holder; only 2 is free afterwards."""
    table = table_of([7, 2, 5], 12)
    table.allocator.add_ref(7)
    table.allocator.add_ref(5)
    assert list(table.let_go(12)) == [7, 2, 5]
    assert [table.allocator.ref_count(block) for block in (7, 2, 5)] == [1, 0, 1]


@quick
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=20),
)
def test_task_3_a_text_that_grows_and_forgets(block_size: int, steps: list[tuple[bool, int]]) -> None:
    """Oracle: a dict from positions to blocks, from which whole blocks are deleted one by one."""
    table, home, end = WindowedTable(BlockAllocator(200), block_size), dict[int, int](), 0
    for grows, number in steps:
        if grows:
            table.append_tokens(number % 9)
            new, end = range(end, end + number % 9), end + number % 9
            home |= {p: table.blocks[(p - table.start) // block_size] for p in new}
        else:
            passed = []
            while home and len(home) >= block_size and min(home) + block_size <= number:
                first = min(home)
                passed.append(home[first])
                home = {position: block for position, block in home.items() if position >= first + block_size}
            assert list(table.let_go(number)) == passed
        assert list(table.blocks) == list(dict.fromkeys(home.values()))
        assert (table.num_tokens, table.start) == (len(home), end - len(home))
        assert Counter(counts(table.allocator))[1] == len(table.blocks) == 200 - table.allocator.num_free


def test_task_3_a_text_of_a_hundred_tokens_lives_in_three_blocks() -> None:
    """Oracle: by hand: a window of 5 and 4 new tokens at once lie in at most 3 blocks of 4.

    The engine's bookkeeping, without a model; the whole text would be 25 blocks.
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


def test_task_4_a_table_goes_on_further_behind() -> None:
    """Oracle: by hand: 6 tokens in two blocks, and on at 12: both blocks go back."""
    table = table_of([7, 2], 6)
    assert list(table.skip_to(12)) == [7, 2]
    expect(table, 12, 0, [])
    table.append_tokens(5)
    assert (table.start, table.num_tokens, len(table.blocks)) == (12, 5, 2)


@pytest.mark.parametrize(
    ("num_tokens", "start", "position"), [(8, 0, 8), (8, 8, 16), (5, 8, 16), (0, 0, 0), (0, 8, 8), (0, 8, 20)]
)
def test_task_4_an_edge_at_the_end_or_behind_it(num_tokens: int, start: int, position: int) -> None:
    """Oracle: by hand, blocks of 4: also where there is nothing to let go, or nothing to skip."""
    blocks = [3, 9][: -(-num_tokens // 4)]
    table = table_of(blocks, num_tokens, start=start)
    assert list(table.skip_to(position)) == blocks
    expect(table, position, 0, [])


@pytest.mark.parametrize("position", [0, 4, 8, 12, 13, 14, 15, 17])
def test_task_4_another_position_is_refused_and_nothing_changes(position: int) -> None:
    """Oracle: the docstring: a table that holds 8 .. 13; an edge within it, and positions between edges."""
    table = table_of([3, 9], 6, start=8)
    before = state(table)
    with pytest.raises(ValueError):
        table.skip_to(position)
    assert state(table) == before


def test_task_4_what_others_hold_stays_with_them() -> None:
    """Oracle: by hand."""
    table = table_of([7, 2], 8)
    table.allocator.add_ref(2)
    assert list(table.skip_to(8)) == [7, 2]
    assert [table.allocator.ref_count(block) for block in (7, 2)] == [0, 1]


# Task 5: WindowedTable.slots


def test_task_5_positions_of_the_text_are_found_behind_what_has_gone() -> None:
    """Oracle: by hand: blocks 7 and 2 hold 8 .. 13: position 9 is in block 7, at offset 1.

    Position 9 counted from the table's first token would lie behind its end: the mistake.
    """
    table = table_of([7, 2], 6, start=8)
    assert list(table.slots(9, 13)) == [29, 30, 31, 8]
    assert list(table.slots(8, 14)) == [28, 29, 30, 31, 8, 9]
    assert list(table.slots(13, 14)) == [9]


def test_task_5_a_table_that_let_nothing_go_is_as_any_other() -> None:
    """Oracle: by hand."""
    assert list(table_of([7, 2], 6).slots(2, 6)) == [30, 31, 8, 9]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 4), (4, 8), (7, 9), (7, 8), (8, 15), (14, 15), (0, 14), (10, 9)]
)
def test_task_5_what_has_gone_has_no_address(start: int, stop: int) -> None:
    """Oracle: the contract of `BlockTable.slots`: ValueError outside the table's tokens, here 8 .. 13.

    A list's negative index answers for position 7 with the last block: another token's address.
    """
    with pytest.raises(ValueError):
        table_of([7, 2], 6, start=8).slots(start, stop)


@pytest.mark.parametrize("position", [8, 11, 14])
def test_task_5_no_positions_have_no_addresses(position: int) -> None:
    """Oracle: by hand."""
    assert list(table_of([7, 2], 6, start=8).slots(position, position)) == []


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_task_5_every_position_has_the_slot_that_it_had(block_size: int) -> None:
    """Oracle: a dict of all positions, block by block, before the first blocks went."""
    blocks, end = [6, 1, 8, 3, 0], 5 * block_size
    slot_of = {p: blocks[p // block_size] * block_size + p % block_size for p in range(end)}
    for gone in range(5):
        start = gone * block_size
        table = table_of(blocks[gone:], end - start, start=start, block_size=block_size)
        for position in range(start, end):
            assert list(table.slots(position, end)) == [slot_of[p] for p in range(position, end)]


# Task 6: WindowedTable.physical_indices


def test_task_6_a_hole_for_each_block_that_has_gone() -> None:
    """Oracle: by hand: position 8 is in the third logical block, wherever the table begins.

    A list without holes would make block 7 the home of position 0: the mistake.
    """
    assert list(table_of([7, 2], 6, start=8).physical_indices()) == [NOWHERE, NOWHERE, 7, 2]


def test_task_6_a_whole_table_has_no_hole() -> None:
    """Oracle: by hand: the list is the caller's own."""
    blocks = [7, 2]
    table = table_of(blocks, 6)
    table.physical_indices().clear()
    assert list(table.physical_indices()) == list(table.blocks) == blocks


def test_task_6_a_table_without_a_block_is_holes_alone() -> None:
    """Oracle: by hand."""
    assert list(table_of([], 0, start=12).physical_indices()) == [NOWHERE] * 3
    assert list(table_of([], 0).physical_indices()) == []


def test_task_6_a_step_is_packed_with_its_holes() -> None:
    """Oracle: by hand: the last of 14 tokens beside 3 tokens of another table; the shorter row is padded."""
    long, short = table_of([7, 2], 6, start=8), table_of([5], 3)
    batch = pack_batch([Span(long, 13, 14), Span(short, 0, 3)])
    assert batch.tables.tolist() == [[NOWHERE, NOWHERE, 7, 2], [5, 0, 0, 0]]
    assert batch.slots.tolist() == [9, 20, 21, 22]
    assert batch.positions.tolist() == [13, 0, 1, 2]


# Task 7: WindowedTable.fork


def test_task_7_a_fork_holds_the_same_blocks_from_the_same_position_on() -> None:
    """Oracle: by hand: each block has one holder more, and none is taken."""
    table = table_of([7, 2], 6, start=8)
    free = table.allocator.num_free
    child = table.fork()
    assert isinstance(child, WindowedTable)
    assert child is not table
    assert (child.start, child.num_tokens, child.block_size) == (8, 6, 4)
    assert list(child.blocks) == list(table.blocks)
    assert [table.allocator.ref_count(block) for block in (7, 2)] == [2, 2]
    assert table.allocator.num_free == free
    assert child.allocator is table.allocator


def test_task_7_each_forgets_alone() -> None:
    """Oracle: by hand: a block that is free while the other one reads it is the mistake."""
    blocks = [7, 2, 5]
    table = table_of(blocks, 10)
    child = table.fork()
    child.let_go(8)
    assert (table.start, table.num_tokens, list(table.blocks)) == (0, 10, blocks)
    assert [table.allocator.ref_count(block) for block in blocks] == [1, 1, 2]
    table.let_go(8)
    assert [table.allocator.ref_count(block) for block in blocks] == [0, 0, 2]


def test_task_7_who_writes_copies_the_block_in_which_they_part() -> None:
    """Oracle: by hand: 8 .. 13 in blocks 7 and 2; the second is half full and shared.

    One list of blocks for both is the mistake.
    """
    blocks = [7, 2]
    table = table_of(blocks, 6, start=8)
    child = table.fork()
    [copy] = child.append_tokens(1)
    assert (copy.src, copy.dst, copy.length) == (2, child.blocks[-1], 2)
    assert table.append_tokens(2) == []
    assert (list(table.blocks), table.num_tokens, child.num_tokens) == (blocks, 8, 7)
    assert child.blocks[0] == table.blocks[0]
    assert child.blocks[1] != table.blocks[1]


def test_task_7_all_that_was_held_goes_back() -> None:
    """Oracle: by hand: a fork of a fork, and a fork of nothing."""
    table = table_of([7, 2], 6, start=8)
    tables = [table, table.fork(), table.fork().fork(), table_of([], 0, start=8).fork()]
    assert (tables[3].start, len(tables[3].blocks)) == (8, 0)
    assert counts(table.allocator)[7] == 4
    for one in tables[:3]:
        one.release()
    assert counts(table.allocator)[7] == 1, "the fork in between still holds it"


# Task 8: windowed_attention


def seen_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None
) -> np.ndarray:
    """The last L of S tokens in float64, one query at a time: q [H, L, D], k, v [Hkv, S, D] -> [H, L, D]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group, before = q.shape[0] // k.shape[0], k.shape[1] - q.shape[1]
    out = np.zeros_like(q)
    for h, i in np.ndindex(q.shape[:2]):
        seen = seen_from(before + i, window or k.shape[1])
        scores = k[h // group, seen] @ q[h, i] * scale
        weights = np.exp(scores - scores.max())
        out[h, i] = weights / weights.sum() @ v[h // group, seen]
    return out


def floats(array: mx.array) -> np.ndarray:
    """A float array of any type in NumPy."""
    return np.array(array.astype(mx.float32))


def numbers(*values: float) -> mx.array:
    """A pool of one head of size 2 with blocks of 2 tokens: a number and a zero for each token, in order."""
    return mx.array([[value, 0] for value in values], mx.float32).reshape(-1, 1, 2, 2)


def queries(heads: int, length: int) -> mx.array:
    """Queries of size 2 that find all keys alike, where these are zero: [1, H, L, 2]."""
    return mx.ones((1, heads, length, 2))


def plain_table(blocks: list[int], num_tokens: int, block_size: int) -> BlockTable:
    """An ordinary table over just these blocks."""
    table = BlockTable(BlockAllocator(max(blocks) + 1), block_size)
    table.blocks, table.num_tokens = blocks, num_tokens
    return table


def packed(
    spans: Sequence[tuple[list[int], int, int]], block_size: int, holes: Sequence[int] = ()
) -> PackedBatch:
    """A step over tables of these blocks, start and stop; `holes[i]` first blocks of row i are nowhere."""
    batch = pack_batch(
        [Span(plain_table(blocks, stop, block_size), start, stop) for blocks, start, stop in spans]
    )
    rows = [
        [NOWHERE] * gone + row[gone:] for gone, row in zip(holes, batch.tables.tolist(), strict=bool(holes))
    ]
    return replace(batch, tables=mx.array(rows, mx.int32)) if holes else batch


def test_task_8_a_token_sees_the_last_two_wherever_the_blocks_lie() -> None:
    """Oracle: by hand: 2, 4, 9 and 5 are in blocks 2 and 0; with equal keys the means of two.

    Without a window they are 2, 3, 5 and 5; with one too large it is the fourth that tells.
    """
    values = numbers(9, 5, NOBODYS, NOBODYS, 2, 4)
    out = windowed_attention(
        queries(1, 4), mx.zeros_like(values), values, packed([([2, 0], 0, 4)], 2), 1.0, 2
    )
    assert out.shape == (1, 1, 4, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 6.5, 7], rtol=1e-6)


def test_task_8_only_the_tokens_of_the_step_are_asked_for() -> None:
    """Oracle: by hand: the last of four tokens, with windows of 1 to 5."""
    values, batch = numbers(9, 5, NOBODYS, NOBODYS, 2, 4), packed([([2, 0], 3, 4)], 2)
    found = [
        windowed_attention(queries(1, 1), mx.zeros_like(values), values, batch, 1.0, window)[
            0, 0, 0, 0
        ].item()
        for window in (1, 2, 3, 4, 5)
    ]
    np.testing.assert_allclose(found, [5, 7, 6, 5, 5], rtol=1e-6)


def test_task_8_every_span_has_a_past_and_a_window_of_its_own() -> None:
    """Oracle: by hand: 6 of one sequence, then 1, 3 and 8 of another, of which the last two are asked for."""
    values = numbers(1, 3, 6, NOBODYS, 8, NOBODYS)
    batch = packed([([1], 0, 1), ([0, 2], 1, 3)], 2)
    out = windowed_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [6, 2, 5.5], rtol=1e-6)


@pytest.mark.parametrize("hole", [NOWHERE, 3], ids=["nowhere", "anothers_block"])
def test_task_8_a_block_behind_the_window_is_not_read(hole: int) -> None:
    """Oracle: by hand: block 3 is another's by now and holds NaN, and it is the last: -1 finds it too.

    Reading everything and giving what is not seen a weight of zero is the mistake: 0 * NaN is NaN.
    """
    nan = float("nan")
    values = numbers(9, 5, NOBODYS, NOBODYS, 2, 4, nan, nan)
    batch = packed([([1, 2, 0], 4, 6)], 2)
    batch = replace(batch, tables=mx.array([[hole, 2, 0]], mx.int32))
    out = windowed_attention(queries(1, 2), values, values, batch, 0.0, 3)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [5, 6], rtol=1e-6)


def test_task_8_a_chunk_reads_what_its_first_token_sees() -> None:
    """Oracle: by hand: 1, 2, 4, 8, 16 with a window of 2, the last three: what the last one sees is less."""
    values = numbers(1, 2, 4, 8, 16, NOBODYS)
    out = windowed_attention(
        queries(1, 3), mx.zeros_like(values), values, packed([([0, 1, 2], 2, 5)], 2), 1.0, 2
    )
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [3, 6, 12], rtol=1e-6)


SHAPES = {
    "blocks_of_one": {"totals": [5, 1, 9], "block_size": 1},
    "just_full": {"totals": [8, 4, 12]},
    "one_behind": {"totals": [9, 5, 1]},
    "larger_than_the_text": {"totals": [3, 1, 30], "block_size": 32},
    "odd_blocks": {"totals": [23, 2, 14], "block_size": 7},
    "groups_of_three": {"totals": [9, 6], "heads": (9, 3)},
    "one_head_for_all": {"totals": [9, 6], "heads": (4, 1)},
    "heads_of_20": {"totals": [9, 6], "size": 20},
    "stored_in_float16": {"totals": [9, 6, 17], "dtype": mx.float16},
    "stored_in_bfloat16": {"totals": [9, 6, 17], "dtype": mx.bfloat16},
    "long": {"totals": [100, 1, 65], "block_size": 16},
}


@dataclass
class Pool:
    """Sequences in mixed blocks, one layer of keys and values, and the same in one piece.

    The last block of the pool is another's, and holds NaN.
    """

    totals: Sequence[int]
    heads: tuple[int, int] = (4, 2)
    size: int = 8
    block_size: int = 4
    dtype: mx.Dtype = mx.float32
    blocks: list[list[int]] = field(init=False)
    streams: list[np.ndarray] = field(init=False)  # keys and values [2, Hkv, tokens, D], as they are stored
    stored: tuple[mx.array, mx.array] = field(init=False)

    def __post_init__(self) -> None:
        rng, kv_heads = np.random.default_rng(0), self.heads[1]
        lengths = [-(-total // self.block_size) for total in self.totals]
        ids = iter((1 + rng.permutation(sum(lengths))).tolist())
        self.blocks = [[next(ids) for _ in range(length)] for length in lengths]
        layer = np.full((2, sum(lengths) + 2, kv_heads, self.block_size, self.size), NOBODYS, np.float32)
        layer[:, -1] = np.nan
        self.streams = []
        for total, blocks in zip(self.totals, self.blocks, strict=True):
            tokens = floats(mx.array(rng.normal(size=(2, kv_heads, total, self.size)), self.dtype))
            for position in range(total):
                block, offset = blocks[position // self.block_size], position % self.block_size
                layer[:, block, :, offset] = tokens[:, :, position]
            self.streams.append(tokens)
        self.stored = (mx.array(layer[0], self.dtype), mx.array(layer[1], self.dtype))

    def check(self, spans: Sequence[tuple[int, int, int]], window: int, scale: float = 0.4) -> None:
        """Attention of these spans (which sequence, start, stop) is that of each sequence in one piece.

        What no token of a span sees is nowhere.
        """
        length = sum(stop - start for _, start, stop in spans)
        q = mx.random.normal((1, self.heads[0], length, self.size), key=mx.random.key(7))
        holes = [seen_from(start, window)[0] // self.block_size for _, start, _ in spans]
        batch = packed([(self.blocks[i], start, stop) for i, start, stop in spans], self.block_size, holes)
        out = windowed_attention(q, *self.stored, batch, scale, window)
        assert (out.shape, out.dtype) == (q.shape, mx.float32)
        expected, row = [], 0
        for i, start, stop in spans:
            keys, values = self.streams[i][:, :, :stop]
            rows = floats(q)[0, :, row : row + stop - start]
            expected.append(seen_attention(rows, keys, values, scale, window))
            row += stop - start
        np.testing.assert_allclose(np.array(out)[0], np.concatenate(expected, axis=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 4, 7, 33, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_8_prompts_chunks_and_decodes_side_by_side(shape: dict, window: int) -> None:
    """Oracle: each sequence in one piece, NumPy in float64, one query at a time.

    Windows of one token, smaller and larger than a block or as large, and larger than the text; first blocks
    that have gone.
    """
    pool = Pool(**shape)
    ends = list(enumerate(shape["totals"]))
    pool.check([(i, 0, total) for i, total in ends], window)
    pool.check([(i, total - 1, total) for i, total in ends], window)
    pool.check([(i, i * total // (i + 1), total) for i, total in ends], window)
    pool.check([(i, total // 3, total // 3 + 1) for i, total in reversed(ends)], window)


@pytest.mark.parametrize("scale", [0.0, 0.125, 1.7])
def test_task_8_scores_are_scaled_as_they_are_told(scale: float) -> None:
    """Oracle: NumPy in float64."""
    Pool([9, 6]).check([(0, 2, 9), (1, 3, 6)], 3, scale)


def test_task_8_reading_writes_nothing() -> None:
    """Oracle: the pool as it was."""
    pool = Pool([9, 6])
    before = [np.array(x) for x in pool.stored]
    pool.check([(0, 2, 9), (1, 3, 6)], 3)
    for now, was in zip(pool.stored, before, strict=True):
        np.testing.assert_array_equal(np.array(now), was)


# Task 9: WindowedContext.attend


def test_task_9_each_layer_sees_as_far_as_its_group() -> None:
    """Oracle: by hand: 2, 4, 9 and 5 with equal keys: the means of two in layer 0, of all in layer 1.

    Both groups write to the only layer of the pool, each to blocks of its own.
    """
    groups = (LayerGroup((1,), None), LayerGroup((0,), 2))
    pool, allocator = KVPool(4, 2, 1, 2, dtype=mx.float32), BlockAllocator(4)
    tables = [BlockTable(allocator, 2), WindowedTable(allocator, 2)]
    for table in tables:
        table.append_tokens(4)
    context = WindowedContext(pool, groups, [pack_batch([Span(table, 0, 4)]) for table in tables], 1.0, None)
    k, v = mx.zeros((1, 1, 4, 2)), mx.array([[[[2.0, 0], [4, 0], [9, 0], [5, 0]]]])
    first = np.array(context.attend(0, queries(1, 4), k, v))
    second = np.array(context.attend(1, queries(1, 4), k, v))
    np.testing.assert_allclose(first[0, 0, :, 0], [2, 3, 6.5, 7], rtol=1e-6)
    np.testing.assert_allclose(second[0, 0, :, 0], [2, 3, 5, 5], rtol=1e-6)


class Lender(KVPool):
    """A pool that lends copies: what does not come back is lost."""

    def lend(self, layer: int) -> tuple[mx.array, mx.array]:
        """Copies of a layer's keys and values."""
        keys, values = (array + 0 for array in super().lend(layer))
        mx.eval(keys, values)
        return keys, values


def test_task_9_a_layer_writes_to_its_place_in_the_group() -> None:
    """Oracle: by hand: layers 2 and 0 are the first and second of their group, layers 1 and 3 of theirs.

    Four layers in a pool of two: the layer's number, or the group's, as the place is the mistake; or arrays
    that are not put back.
    """
    groups = (LayerGroup((2, 0), None), LayerGroup((1, 3), 2))
    pool, allocator = Lender(2, 2, 1, 2, num_layers=2, dtype=mx.float32), BlockAllocator(2)
    tables = [BlockTable(allocator, 2), WindowedTable(allocator, 2)]
    for table in tables:
        table.append_tokens(2)
    context = WindowedContext(pool, groups, [pack_batch([Span(table, 0, 2)]) for table in tables], 1.0, None)
    for layer in range(4):
        x = mx.full((1, 1, 2, 2), float(layer + 1))
        mx.eval(context.attend(layer, queries(1, 2), x, -x))
    for table, group in zip(tables, groups, strict=True):
        for place, layer in enumerate(group.layers):
            keys, values = pool.read(place, mx.array(table.slots(0, 2), mx.int32))
            assert keys.tolist() == (-values).tolist() == np.full((2, 1, 2), layer + 1).tolist()


MIXED = (LayerGroup((1, 4), None), LayerGroup((0, 2), 3), LayerGroup((3,), 6), LayerGroup((5, 6), 1))


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
def test_task_9_texts_grow_while_their_pages_go_back(block_size: int, dtype: mx.Dtype) -> None:
    """Oracle: each text in one piece, NumPy in float64; the keys as they are stored.

    Two sequences in chunks of 1 to 4 tokens, seven layers in four groups; what a window has passed is given
    back and written over at once. In the pool there are not enough blocks for all that was ever there.
    """
    rng, lengths = np.random.default_rng(1), (33, 20)
    needed = sum(group.most_blocks(n, block_size, 4) for group in MIXED for n in lengths)
    pool = KVPool(needed, block_size, 2, 8, num_layers=2, dtype=dtype)
    allocator, texts = BlockAllocator(needed), rng.normal(size=(2, 7, 3, 4, 33, 8)).astype(np.float32)
    texts[:, :, 1:] = floats(mx.array(texts[:, :, 1:], dtype))
    layout = PageLayout(MIXED, block_size, 4)
    tables, done = [layout.tables(allocator) for _ in lengths], [0, 0]
    while done != list(lengths):
        stops = [min(n, now + int(rng.integers(1, 5))) for n, now in zip(lengths, done, strict=True)]
        steps = [
            (i, start, stop) for i, (start, stop) in enumerate(zip(done, stops, strict=True)) if stop > start
        ]
        for i, start, stop in steps:
            for table in tables[i]:
                table.append_tokens(stop - start)
        batches = [
            pack_batch([Span(tables[i][g], start, stop) for i, start, stop in steps]) for g in range(4)
        ]
        context = WindowedContext(pool, MIXED, batches, 0.4, None)
        for group in MIXED:
            for layer in group.layers:
                q, k, v = (
                    np.concatenate(
                        [texts[i, layer, part, :heads, start:stop] for i, start, stop in steps], axis=1
                    )
                    for part, heads in enumerate((4, 2, 2))
                )
                out = np.array(context.attend(layer, *(mx.array(x[None]) for x in (q, k, v))))[0]
                parts, row = [], 0
                for i, start, stop in steps:
                    keys, values = texts[i, layer, 1:, :2, :stop]
                    rows = q[:, row : row + stop - start]
                    parts.append(seen_attention(rows, keys, values, 0.4, group.window))
                    row += stop - start
                np.testing.assert_allclose(out, np.concatenate(parts, axis=1), rtol=0, atol=2e-5)
        for i, _, stop in steps:
            for block in layout.let_go(tables[i], stop):
                write_over(pool, block)
        done = stops


def write_over(pool: KVPool, block: int) -> None:
    """Somebody else has the block now, and writes to all of it."""
    slots = mx.arange(block * pool.block_size, (block + 1) * pool.block_size)
    others = mx.full((pool.block_size, 2, 8), NOBODYS)
    for layer in range(2):
        pool.write(layer, slots, others, others)


# Task 10: WindowedPrefixSharing.first_needed


def blocks_needed(num_blocks: int, window: int | None) -> int:
    """The first block that the token behind so many blocks of 4 sees, position by position."""
    return seen_from(4 * num_blocks, window or 10**6)[0] // 4


@dataclass
class Setup:
    """A policy for groups with these windows, one layer each, in blocks of 4; nothing is kept yet."""

    windows: tuple[int | None, ...]
    num_blocks: int = 100

    def __post_init__(self) -> None:
        groups = tuple(LayerGroup((layer,), window) for layer, window in enumerate(self.windows))
        self.allocator = BlockAllocator(self.num_blocks)
        self.layout = PageLayout(groups, 4, 16)
        self.sharing = WindowedPrefixSharing(self.allocator, 4, groups)

    def sequence(self, tokens: Sequence[int], outputs: Sequence[int] = (), **params: object) -> PagedSequence:
        """A sequence with these tokens, of which none is computed."""
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
        """Keep some blocks of a text for one group, as if somebody had computed them; which, in order."""
        stream = self.layout.streams(salt)[group]
        stream.extend(tokens)
        kept = []
        for index in indices:
            table = BlockTable(self.allocator, 4)
            table.append_tokens(4)
            self.sharing.cache.keep(table, stream.tail(index), 0, 1)
            kept += table.blocks
            table.release()
            self.sharing.released(kept[-1:])
        return kept

    def start(self, sequence: PagedSequence, count: int) -> None:
        """Compute the first tokens of a sequence, and keep what is full by hand."""
        sequence.append_tokens(count)
        sequence.num_computed = count
        for table, stream in zip(sequence.tables, self.layout.streams(""), strict=True):
            stream.extend(sequence.tokens(0, count))
            self.sharing.cache.keep(table, stream, 0, count // 4)

    def compute(self, sequence: PagedSequence, count: int) -> None:
        """Compute the next tokens of a sequence as a step does it: keep, then let go."""
        start = sequence.num_computed
        sequence.append_tokens(count)
        sequence.num_computed += count
        self.sharing.keep(sequence, start)
        self.sharing.released(self.layout.let_go(sequence.tables, sequence.num_computed))

    def end(self, sequence: PagedSequence) -> None:
        """A sequence ends."""
        blocks = sequence.blocks
        sequence.give_up_pages()
        self.sharing.released(blocks)

    def found(self, group: int, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The indices of those blocks of a text that are kept for a group, holes or not."""
        stream = self.layout.streams(salt)[group]
        stream.extend(tokens)
        return [i for i in range(len(stream)) if self.sharing.cache.match(stream, i, i + 1)]

    def check(self, *sequences: PagedSequence) -> None:
        """All tables of a sequence end where it is; every reference is a table's or the cache's."""
        for sequence in sequences:
            ends = {table.num_tokens + getattr(table, "start", 0) for table in sequence.tables}
            assert ends == {sequence.num_computed}, "the groups do not end at the same token"
        held = Counter(block for one in sequences for table in one.tables for block in table.blocks)
        kept = self.sharing.blocks
        assert self.sharing.num_idle == len(set(kept) - set(held))
        held.update(kept)
        assert counts(self.allocator) == [held[block] for block in range(self.num_blocks)]


@pytest.mark.parametrize(
    ("window", "num_blocks", "first"),
    [(6, 3, 1), (5, 3, 2), (4, 3, 2), (2, 3, 2), (1, 3, 3), (9, 3, 1), (10, 3, 0), (6, 1, 0), (6, 0, 0)],
)
def test_task_10_the_next_token_says_what_is_needed(window: int, num_blocks: int, first: int) -> None:
    """Oracle: by hand, blocks of 4: behind 3 blocks comes token 12; with a window of 6 it sees 7 .. 12.

    Counting from the last token that is there, 11, is the mistake: one block too many for a window of 5.
    """
    assert Setup((None, window)).sharing.first_needed(1, num_blocks) == first


def test_task_10_who_sees_everything_needs_everything() -> None:
    """Oracle: by hand: the first group has no window."""
    sharing = Setup((None, 3)).sharing
    assert [sharing.first_needed(0, num_blocks) for num_blocks in (0, 1, 9)] == [0, 0, 0]


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8, 9, 13, 100])
def test_task_10_the_block_of_the_first_position_in_sight(window: int | None) -> None:
    """Oracle: a list of the positions in sight. Each group has its own window."""
    sharing = Setup((None, 7, window)).sharing
    for num_blocks in range(12):
        assert sharing.first_needed(2, num_blocks) == blocks_needed(num_blocks, window)
        assert sharing.first_needed(1, num_blocks) == blocks_needed(num_blocks, 7)


# Task 11: WindowedPrefixSharing.longest_hit


TEXT = list(range(100, 133))  # 8 full blocks of 4, and one token more


def test_task_11_all_is_there() -> None:
    """Oracle: by hand."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 8
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 3) == 3


def test_task_11_nothing_is_there() -> None:
    """Oracle: by hand: nothing at all, nothing of one group, another text."""
    setup = Setup((None, 6))
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 0
    setup.put(0, TEXT, range(8))
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 0
    setup.put(1, TEXT[::-1], range(8))
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 0


def test_task_11_a_window_never_asks_for_what_is_out_of_reach() -> None:
    """Oracle: by hand: token 32 sees 27 .. 32 with a window of 6: blocks 6 and 7. The first six have gone.

    Asking for the whole prefix in every group finds nothing: the mistake.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [6, 7])
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 8


def test_task_11_a_block_in_reach_that_is_missing_is_the_end() -> None:
    """Oracle: by hand: the window lacks block 6, so 7 is of no use; behind 6 blocks it needs 4 and 5."""
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [4, 5, 7])
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 6


def test_task_11_a_hit_falls_back_to_where_all_groups_have_what_they_need() -> None:
    """Oracle: by hand: who sees everything lacks block 5. Behind 5 blocks the window needs 3 and 4, and lacks
    4; behind 4 it needs 2 and 3, which are there.

    Taking the smallest of what each group finds by itself is the mistake: that is 5, without block 4.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, [0, 1, 2, 3, 4, 6, 7])
    setup.put(1, TEXT, [2, 3, 6, 7])
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 4


def test_task_11_a_group_that_was_asked_is_asked_again() -> None:
    """Oracle: by hand: of two windows the first has what it needs behind 8 blocks, the second lacks block 7.

    Behind 7 the first needs 6 and lacks it, behind 6 it needs 5 and lacks it; behind 5 it needs 4 and has it.
    """
    setup = Setup((None, 4, 2))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, [4, 7])
    setup.put(2, TEXT, [4, 5])
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 5


def test_task_11_what_the_sequence_has_is_not_asked_for() -> None:
    """Oracle: by hand: from block 3 on; what lies before is in its own tables, kept or not."""
    setup = Setup((None, 6))
    setup.put(0, TEXT, [3, 4])
    setup.put(1, TEXT, [3, 4])
    sequence = setup.sequence(TEXT)
    assert setup.sharing.longest_hit(sequence, 3, 8) == 5
    assert setup.sharing.longest_hit(sequence, 2, 8) == 2


def test_task_11_a_window_of_one_token_needs_no_block() -> None:
    """Oracle: by hand: the next token sees itself alone."""
    setup = Setup((None, 1))
    setup.put(0, TEXT, range(5))
    assert setup.sharing.longest_hit(setup.sequence(TEXT), 0, 8) == 5


def test_task_11_looking_is_not_holding() -> None:
    """Oracle: by hand."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    sequence = setup.sequence(TEXT)
    setup.sharing.longest_hit(sequence, 0, 8)
    setup.check(sequence)
    assert setup.sharing.num_idle == 16


@settings(quick, max_examples=150)
@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 4, 5, 8, 9, 14]), min_size=1, max_size=3),
    missing=st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=3, max_size=3),
    first=st.integers(0, 8),
    stop=st.integers(0, 8),
)
def test_task_11_the_largest_of_all_that_would_do(
    windows: list[int | None], missing: list[set[int]], first: int, stop: int
) -> None:
    """Oracle: all numbers from the largest down, each looked at block by block in every group."""
    first, stop = min(first, stop), max(first, stop)
    setup = Setup(tuple(windows))
    kept = [set(range(8)) - gone for gone in missing[: len(windows)]]
    for group, indices in enumerate(kept):
        setup.put(group, TEXT, sorted(indices))
    enough = (
        n
        for n in range(stop, first - 1, -1)
        if all(
            set(range(max(first, blocks_needed(n, window)), n)) <= there
            for window, there in zip(windows, kept, strict=True)
        )
    )
    assert setup.sharing.longest_hit(setup.sequence(TEXT), first, stop) == next(enough)


# Task 12: WindowedPrefixSharing.adopt


def test_task_12_each_table_gets_what_its_layers_need() -> None:
    """Oracle: by hand: 12 of 13 tokens may be shared: 3 blocks, and for a window of 6 the last two."""
    setup = Setup((None, 6))
    everything, windowed = setup.put(0, TEXT, range(8)), setup.put(1, TEXT, range(8))
    sequence = setup.sequence(TEXT[:13])
    setup.sharing.adopt(sequence)
    full, near = sequence.tables
    assert list(full.blocks) == everything[:3]
    assert list(near.blocks) == windowed[1:3]
    assert isinstance(near, WindowedTable)
    assert (full.num_tokens, near.start, near.num_tokens) == (12, 4, 8)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (12, 12)
    assert setup.sharing.num_idle == 16 - 5
    setup.check(sequence)


def test_task_12_a_block_out_of_reach_may_be_gone_and_is_nobodys() -> None:
    """Oracle: by hand: the window has blocks 6 and 7 alone; 33 tokens are 8 blocks and one to compute.

    Holes that are filled up with blocks of other places are the mistake.
    """
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(8))
    windowed = setup.put(1, TEXT, [6, 7])
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 32
    assert list(sequence.tables[1].physical_indices()) == [NOWHERE] * 6 + windowed
    setup.check(sequence)


def test_task_12_all_groups_end_at_the_same_token() -> None:
    """Oracle: by hand: one group has 7 blocks, the window of 6 lacks block 4; behind 4 it has what it needs.

    A table that goes further than another reads tokens that the other does not have: the mistake.
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
def test_task_12_the_last_token_is_left_to_compute(length: int, adopted: int) -> None:
    """Oracle: by hand, blocks of 4 that are all kept."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    sequence = setup.sequence(TEXT[:length])
    setup.sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (adopted, adopted)
    setup.check(sequence)


def test_task_12_what_no_group_can_go_on_from_is_not_shared() -> None:
    """Oracle: by hand: the window lacks every block of the first five, so nothing changes at all."""
    setup = Setup((None, 6))
    setup.put(0, TEXT, range(5))
    setup.put(1, TEXT, [5, 6, 7])
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (0, 0)
    assert [(len(table.blocks), table.num_tokens) for table in sequence.tables] == [(0, 0), (0, 0)]
    setup.check(sequence)


def test_task_12_a_sequence_under_way_goes_on_behind_its_own_blocks() -> None:
    """Oracle: by hand: one block is its own. Behind 2 blocks a window of 6 still needs block 0 and 1.

    A window that throws away what is in reach is the mistake.
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


def test_task_12_what_a_window_has_passed_goes_back() -> None:
    """Oracle: by hand: two blocks are its own, and the hit is 8: the window needs blocks 6 and 7 of others.

    Its own two are kept and idle then, which the cache has to be told: nobody could give them up otherwise.
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


def test_task_12_a_window_of_one_token_takes_no_block() -> None:
    """Oracle: by hand: its table begins where the hit ends."""
    setup = Setup((None, 1))
    setup.put(0, TEXT, range(8))
    setup.put(1, TEXT, range(8))
    sequence = setup.sequence(TEXT)
    setup.sharing.adopt(sequence)
    near = sequence.tables[1]
    assert isinstance(near, WindowedTable)
    assert (near.start, near.num_tokens, len(near.blocks)) == (32, 0, 0)
    setup.check(sequence)


def test_task_12_within_a_block_nothing_is_shared() -> None:
    """Oracle: by hand: 6 tokens are computed; a whole block would not fit behind half of one."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 6)
    for group in (0, 1):
        setup.put(group, TEXT, range(1, 8))
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 6
    setup.check(sequence)


def test_task_12_who_is_asked_for_log_probabilities_of_the_prompt_computes_it() -> None:
    """Oracle: by hand: logits exist only for tokens that are computed."""
    setup = Setup((None, 6))
    for group in (0, 1):
        setup.put(group, TEXT, range(8))
    sequence = setup.sequence(TEXT, prompt_logprobs=1)
    setup.sharing.adopt(sequence)
    assert sequence.num_computed == 0
    setup.check(sequence)


def test_task_12_salts_keep_tenants_apart() -> None:
    """Oracle: by hand."""
    setup, adopted = Setup((None, 6)), []
    for group in (0, 1):
        setup.put(group, TEXT, range(8), salt="one")
    for salt in ("one", "two", ""):
        sequence = setup.sequence(TEXT, cache_salt=salt)
        setup.sharing.adopt(sequence)
        adopted.append(sequence.num_computed)
    assert adopted == [32, 0, 0]


# Task 13: WindowedPrefixSharing.keep


def test_task_13_full_blocks_of_every_group_are_kept() -> None:
    """Oracle: by hand: 10 tokens are two full blocks in each of two groups."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(10)
    sequence.num_computed = 10
    setup.sharing.keep(sequence, 0)
    assert len(setup.sharing.blocks) == 4
    assert [setup.found(group, TEXT) for group in (0, 1)] == [[0, 1], [0, 1]]
    setup.check(sequence)


def test_task_13_groups_never_find_each_others_blocks() -> None:
    """Oracle: by hand: the same tokens, other layers: a block of one group is wrong numbers for the other."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(8)
    sequence.num_computed = 8
    setup.sharing.keep(sequence, 0)
    for group, table in enumerate(sequence.tables):
        stream = setup.layout.streams("")[group]
        stream.extend(TEXT)
        assert list(setup.sharing.cache.match(stream, 0, 8)) == list(table.blocks)


def test_task_13_a_table_that_begins_later_keeps_the_right_blocks() -> None:
    """Oracle: by hand: the window's table begins at 8 when its blocks 2 and 3 become full.

    A list of blocks counts from the table's start, the hashes from the text's: mixing these is the mistake.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 12)
    near = sequence.tables[1]
    assert isinstance(near, WindowedTable)
    setup.sharing.released(near.let_go(8))
    setup.compute(sequence, 5)
    assert setup.found(0, TEXT) == setup.found(1, TEXT) == [0, 1, 2, 3]
    stream = setup.layout.streams("")[1]
    stream.extend(TEXT)
    assert list(setup.sharing.cache.match(stream, 3, 4)) == list(near.blocks[:1])
    assert near.start == 12
    setup.check(sequence)


def test_task_13_what_a_table_has_let_go_is_not_kept() -> None:
    """Oracle: by hand: 16 tokens since the beginning, of which the window's table has 8 to 15.

    First less the table's first block is negative then, and counts from the end of a list: the mistake.
    """
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    sequence.append_tokens(16)
    sequence.num_computed = 16
    near = sequence.tables[1]
    assert isinstance(near, WindowedTable)
    near.let_go(8)
    setup.sharing.keep(sequence, 0)
    assert (setup.found(0, TEXT), setup.found(1, TEXT)) == ([0, 1, 2, 3], [2, 3])
    setup.check(sequence)


@pytest.mark.parametrize(("start", "count", "kept"), [(0, 3, 0), (4, 3, 1), (5, 2, 1), (5, 3, 2), (7, 10, 4)])
def test_task_13_a_block_is_kept_when_it_is_full(start: int, count: int, kept: int) -> None:
    """Oracle: by hand, blocks of 4: what was full before is kept already."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, start)
    setup.compute(sequence, count)
    assert setup.found(0, TEXT) == setup.found(1, TEXT) == list(range(kept))
    setup.check(sequence)


def test_task_13_what_others_have_computed_by_now_is_in_the_pool_once() -> None:
    """Oracle: by hand: block 1 was kept for each group while this one was computing it: its own go back."""
    setup = Setup((None, 6))
    sequence = setup.sequence(TEXT)
    setup.start(sequence, 4)
    others = [setup.put(group, TEXT, [1])[0] for group in (0, 1)]
    setup.compute(sequence, 4)
    assert [table.blocks[-1] for table in sequence.tables] == others
    assert len(setup.sharing.blocks) == 4
    setup.check(sequence)


def test_task_13_one_group_with_a_window_is_enough() -> None:
    """Oracle: by hand: a model whose layers all have a window of 6."""
    setup = Setup((6,))
    first = setup.sequence(TEXT)
    for count in (7, 9, 1, 1, 15):
        setup.compute(first, count)
    setup.end(first)
    assert setup.found(0, TEXT) == list(range(8))
    second = setup.sequence(TEXT)
    setup.sharing.adopt(second)
    assert (second.num_computed, len(second.table.blocks)) == (32, 2)
    setup.check(second)


@quick
@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 4, 6, 9]), min_size=1, max_size=3),
    texts=st.lists(st.tuples(st.integers(0, 33), st.integers(1, 9)), min_size=1, max_size=5),
    given_up=st.integers(0, 12),
)
def test_task_13_what_is_kept_is_found(
    windows: list[int | None], texts: list[tuple[int, int]], given_up: int
) -> None:
    """Oracle: a list of what was computed and not given up; all references counted.

    Texts that begin alike, one after the other, in chunks: each adopts what it finds, computes the rest, and
    ends. After each some idle blocks are given up; nothing else ever is.
    """
    setup = Setup(tuple(windows), num_blocks=300)
    for alike, chunk in texts:
        text = [*TEXT[:alike], *range(5, 40)]
        sequence, there = setup.sequence(text), [setup.found(group, text) for group in range(len(windows))]
        setup.sharing.adopt(sequence)
        setup.check(sequence)
        longest = (len(text) - 1) // 4
        assert sequence.num_computed == 4 * max(
            n
            for n in range(longest + 1)
            if all(
                set(range(blocks_needed(n, window), n)) <= set(kept)
                for window, kept in zip(windows, there, strict=True)
            )
        )
        begun = sequence.num_computed // 4
        while sequence.num_uncomputed:
            setup.compute(sequence, min(chunk, sequence.num_uncomputed))
            setup.check(sequence)
        for group, kept in enumerate(there):
            assert setup.found(group, text) == sorted({*kept, *range(begun, len(text) // 4)})
        setup.end(sequence)
        setup.check()
        setup.sharing.evict(given_up)


def serve(
    manager: PagedBatchManager, prompts: dict[str, list[int]], max_tokens: int
) -> dict[str, list[np.ndarray]]:
    """Serve prompts together, the likeliest token each time; the rows of logits of each.

    After each step a table holds no block that its layers cannot see, and all references are counted.
    """
    for name, prompt in prompts.items():
        assert manager.add_request(prompt, name, SamplingParams(max_tokens=max_tokens))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in prompts}
    while manager.has_work:
        known = {sequence.seq_id: sequence for sequence in [*manager.running, *manager.waiting]}
        for name, row in manager.process_batch().items():
            rows[name].append(np.array(row))
            manager.commit({name: int(np.argmax(rows[name][-1]))})
            if len(rows[name]) == max_tokens:
                manager.finish(name)
        held = Counter(block for sequence in manager.running for block in sequence.blocks)
        held.update(manager.prefix.blocks)
        total = manager.allocator.num_blocks
        assert counts(manager.allocator) == [held[block] for block in range(total)]
        for sequence in known.values():
            for table in sequence.tables[1:]:
                assert len(table.blocks) <= 2, "5 tokens before the next one are in two blocks of 4"
    return rows


class NewestGivesWay:
    """Preemption as a later day has it: whoever came last gives way."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and a block to grow into."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Sequence[PagedSequence]) -> PagedSequence:
        """The last."""
        return candidates[-1]


@quick
@given(
    num_blocks=st.integers(24, 40),
    budget=st.integers(4, 30),
    crowds=st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5), max_size=3
    ),
)
def test_task_13_crowds_that_share_lose_no_block(
    num_blocks: int, budget: int, crowds: list[list[tuple[int, int]]]
) -> None:
    """Oracle: a count of all holders after each step; in the end free and kept blocks are the whole pool."""
    groups = (LayerGroup((0,), None), LayerGroup((1,), 6))
    policies = Policies(preemption=NewestGivesWay(), prefix=partial(WindowedPrefixSharing, groups=groups))
    manager = PagedBatchManager(
        num_blocks, 4, 4, max_batched_tokens=budget, max_model_len=40, policies=policies, groups=groups
    )
    for crowd in crowds:
        for name, (alike, own) in enumerate(crowd):
            manager.add_request([*TEXT[:alike], *range(own)], str(name), SamplingParams(max_tokens=3))
        while manager.has_work:
            for name in list(manager.process_batch()):
                manager.commit({name: 7})
                if manager.sequence(name).num_tokens == manager.sequence(name).max_len:
                    manager.finish(name)
            held = Counter(block for sequence in manager.running for block in sequence.blocks)
            held.update(manager.prefix.blocks)
            assert counts(manager.allocator) == [held[block] for block in range(num_blocks)]
    kept = len(manager.prefix.blocks)
    assert manager.prefix.evict(num_blocks) == kept
    assert manager.allocator.num_free == num_blocks


@cache
def tiny_model() -> Model:
    """Three layers of random float32 matrices, the first and last with a window of 6 tokens.

    Four query heads on two key and value heads of 8, a vocabulary of 50; strong enough in attention that the
    past decides what comes.
    """
    config = ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        sliding_window=6,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    )
    rng, linears, vectors = np.random.default_rng(0), {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    return build_model(config, linears, vectors)


class MaskedContext:
    """A pass over a whole text: no cache, no pages, a mask for each layer, written down pair by pair."""

    def __init__(self, length: int, scale: float, windows: Sequence[int | None]) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows = None
        self.scale = scale
        self.masks = [
            mx.array(
                [
                    [0.0 if other in seen_from(position, window or length) else NO for other in range(length)]
                    for position in range(length)
                ]
            )
            for window in windows
        ]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """All tokens at once, as far as the layer's mask lets them see."""
        return grouped_query_attention(q, k, v, self.scale, self.masks[layer])


@pytest.mark.parametrize("budget", [64, 7])
def test_task_13_a_model_with_windows_answers_from_pages_as_with_masks(budget: int) -> None:
    """Oracle: the same model over each whole text at once, every mask written down pair by pair.

    Three prompts that begin alike come together, then one of them again: all but its last block is found. In
    the windowed layers nobody ever holds more than two blocks between two steps.
    """
    model = tiny_model()
    groups = group_layers(model.config.windows)
    manager = PagedBatchManager(
        60,
        4,
        4,
        model=model,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        policies=Policies(prefix=partial(WindowedPrefixSharing, groups=groups)),
    )
    assert [len(group.layers) for group in groups] == [1, 1, 1]
    rng = np.random.default_rng(2)
    beginning = rng.integers(0, 50, 17).tolist()
    prompts = {
        name: [*beginning, *rng.integers(0, 50, n).tolist()] for name, n in (("a", 4), ("b", 1), ("c", 9))
    }
    served = [
        (prompts, serve(manager, prompts, 12)),
        ({"a": prompts["a"]}, serve(manager, {"a": prompts["a"]}, 12)),
    ]
    assert manager.prefix_stats.hits >= 16 + 16 + 20, (
        "two of three found the beginning, and the last all of it"
    )
    for asked, rows in served:
        for name, prompt in asked.items():
            tokens = [*prompt, *(int(np.argmax(row)) for row in rows[name])]
            context = MaskedContext(len(tokens), model.config.attention_scale, model.config.windows)
            expected = np.array(model(mx.array([tokens], mx.int32), context))[0, len(prompt) - 1 : -1]
            np.testing.assert_allclose(np.stack(rows[name]), expected, rtol=0, atol=2e-3)
    kept = len(manager.prefix.blocks)
    assert manager.prefix.evict(60) == kept
    assert manager.allocator.num_free == 60
