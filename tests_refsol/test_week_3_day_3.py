"""Day 3.3: slots, and a cache of named sequences on top of pages.

When it passes, you have the address of every token as one number, for whole batches at once, and the lab's
PagedKVCache as a view on pool, allocator and tables: it grows without losing tokens, never writes to a block
that another sequence holds, and reads exactly the tokens that it is asked for.
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable
from tiny_llm.paged_cache import PagedKVCache
from tiny_llm.slot_mapping import flat_slots

HEADS, D = 2, 3


def make_table(num_tokens: int, block_size: int = 4, blocks: Sequence[int] = ()) -> BlockTable:
    """A table of so many tokens; `blocks`, if given, stand for those that the allocator chose."""
    table = BlockTable(BlockAllocator(100), block_size)
    table.append_tokens(num_tokens)
    table.blocks = list(blocks) or table.blocks
    return table


def token(number: float) -> tuple[mx.array, mx.array]:
    """The key and value [HEADS, D] of a token: each number is another token, each head another row."""
    k = number + mx.arange(HEADS * D, dtype=mx.float32).reshape(HEADS, D) / 16
    return k, -k


def make_cache(total_blocks: int = 12, block_size: int = 4) -> PagedKVCache:
    return PagedKVCache(total_blocks, block_size, HEADS, D, mx.float32)


def fill(cache: PagedKVCache, seq_id: str, start: int, numbers: Sequence[float]) -> None:
    """Put tokens into the pool, at the slots that the sequence's table names: without `write_token`."""
    slots = cache.tables[seq_id].slots(start, start + len(numbers))
    keys, values = (mx.stack(parts) for parts in zip(*map(token, numbers), strict=True))
    cache.pool.write(cache.layer, mx.array(slots, mx.int32), keys, values)


def begin(cache: PagedKVCache, seq_id: str, numbers: Sequence[float]) -> None:
    """A new sequence with these tokens."""
    cache.allocate(seq_id, len(numbers))
    fill(cache, seq_id, 0, numbers)


def expect(read: tuple[mx.array, mx.array], numbers: Sequence[float]) -> None:
    """What was read is these tokens, in this order: [HEADS, tokens, D] each."""
    keys, values = read
    assert keys.shape == values.shape == (HEADS, len(numbers), D)
    expected = mx.array(list(numbers), mx.float32)[None, :, None] + token(0)[0][:, None]
    assert keys.tolist() == expected.tolist()
    assert values.tolist() == (-expected).tolist()


def expect_stored(cache: PagedKVCache, seq_id: str, numbers: Sequence[float]) -> None:
    """The sequence's tokens are these: read from the pool by slot, without `read_blocks`."""
    table = cache.tables[seq_id]
    assert table.num_tokens == len(numbers)
    slots = mx.array(table.slots(0, len(numbers)), mx.int32)
    keys, values = cache.pool.read(cache.layer, slots)
    expect((keys.swapaxes(0, 1), values.swapaxes(0, 1)), numbers)


def expect_conserved(cache: PagedKVCache) -> None:
    """Every block is free, or counted once for each table that holds it."""
    held = [block for table in cache.tables.values() for block in table.blocks]
    assert cache.allocator.num_free == cache.allocator.num_blocks - len(set(held))
    for block in set(held):
        assert cache.allocator.ref_count(block) == held.count(block)


# Task 1: flat_slots


def test_task_1_a_slot_is_the_place_in_a_pool_seen_as_a_list_of_tokens() -> None:
    """Oracle: by hand: blocks 23, 64 and 87 of 16 tokens; token 25 is in block 64 at offset 9."""
    slots = flat_slots([make_table(40, 16, [23, 64, 87])], [40]).tolist()
    assert slots[0] == 368
    assert slots[15] == 383
    assert slots[16] == 1024
    assert slots[25] == 1033
    assert slots[39] == 1399
    assert len(slots) == 40


def test_task_1_tables_follow_each_other() -> None:
    """Oracle: by hand, blocks of 4: what the first one's last block has left over is not in between."""
    tables = [make_table(6, 4, [7, 2]), make_table(3, 4, [5]), make_table(8, 4, [0, 9])]
    assert flat_slots(tables, [6, 3, 8]).tolist() == [
        *(28, 29, 30, 31, 8, 9),
        *(20, 21, 22),
        *(0, 1, 2, 3, 36, 37, 38, 39),
    ]


@pytest.mark.parametrize("length", range(10))
def test_task_1_every_length_around_the_ends_of_blocks(length: int) -> None:
    """Oracle: by hand: the first so many of nine slots; a length may be less than the table's tokens."""
    slots = flat_slots([make_table(9, 3, [4, 1, 6])], [length])
    assert slots.tolist() == [12, 13, 14, 3, 4, 5, 18, 19, 20][:length]


def test_task_1_slots_are_32_bit_integers() -> None:
    """Oracle: the docstring, also where there is nothing: an empty list makes floats of its own accord."""
    for slots in (flat_slots([make_table(5)], [5]), flat_slots([make_table(5)], [0]), flat_slots([], [])):
        assert slots.dtype == mx.int32
    assert flat_slots([], []).shape == (0,)


def test_task_1_a_table_without_tokens_between_two_others() -> None:
    """Oracle: by hand."""
    tables = [make_table(2, 4, [3]), make_table(0), make_table(1, 4, [6])]
    assert flat_slots(tables, [2, 0, 1]).tolist() == [12, 13, 24]
    assert flat_slots(tables, [2, 0, 0]).tolist() == [12, 13]


@pytest.mark.parametrize("length", [-1, 6, 8, 9])
def test_task_1_tokens_that_a_table_has_not_are_refused(length: int) -> None:
    """Oracle: the docstring: 5 tokens. Its two blocks of 4 have room for 8; nothing is stored behind 5."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3), make_table(5)], [3, length])


@pytest.mark.parametrize("lengths", [[], [3], [3, 5, 1]])
def test_task_1_there_is_a_length_for_every_table(lengths: list[int]) -> None:
    """Oracle: the docstring."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3), make_table(5)], lengths)


def test_task_1_tables_of_different_pools_are_refused() -> None:
    """Oracle: the docstring: the same number would name two tokens."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3, 4), make_table(3, 8)], [3, 3])


def test_task_1_many_tables_at_once() -> None:
    """Oracle: the definition, for each token: its table's block, times the block size, plus its offset."""
    rng = np.random.default_rng(1)
    for block_size in (1, 3, 16):
        totals = [int(total) for total in rng.integers(0, 60, 20)]
        allocator = BlockAllocator(sum(-(-total // block_size) for total in totals))
        tables = [BlockTable(allocator, block_size) for _ in totals]
        for row in rng.permutation(np.repeat(np.arange(20), totals)):
            tables[row].append_tokens(1)  # alternating, so that no sequence has its blocks side by side
        lengths = [int(rng.integers(0, total + 1)) for total in totals]
        expected = [
            table.blocks[i // block_size] * block_size + i % block_size
            for table, length in zip(tables, lengths, strict=True)
            for i in range(length)
        ]
        assert flat_slots(tables, lengths).tolist() == expected


def num_instructions(run: Callable[[], object]) -> int:
    """The number of Python's own instructions that a call takes; those inside C and MLX do not count."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def test_task_1_larger_blocks_are_no_more_work_for_python() -> None:
    """Oracle: by count: two tables of two blocks, of 4 and of 512 tokens. One token at a time is the mistake:
    `BlockTable.slots` gives the right slots, in more than a hundred times the instructions."""
    counts = []
    for block_size in (4, 512):
        tables, lengths = [make_table(2 * block_size, block_size) for _ in range(2)], [2 * block_size] * 2
        counts.append(num_instructions(lambda t=tables, n=lengths: flat_slots(t, n)))  # type: ignore[misc]
    small, large = counts
    assert large <= 2 * small, f"{large} instructions for blocks of 512 tokens, {small} for blocks of 4"


# Task 2: PagedKVCache.allocate


def test_task_2_a_new_sequence_gets_blocks_for_its_tokens() -> None:
    """Oracle: by hand, blocks of 16: 30 tokens are 2 blocks. Which ones is the allocator's choice."""
    cache = make_cache(100, 16)
    blocks = cache.allocate("A", 30)
    assert len(blocks) == len(set(blocks)) == 2
    assert cache.tables["A"].num_tokens == 30
    assert cache.tables["A"].physical_indices() == blocks
    expect_conserved(cache)


def test_task_2_sequences_share_no_block_that_was_not_shared() -> None:
    """Oracle: by hand: 2 blocks and 3 are the whole pool."""
    cache = make_cache(5)
    taken = cache.allocate("a", 8) + cache.allocate("b", 9)
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_task_2_a_known_sequence_grows() -> None:
    """Oracle: by hand, blocks of 4. A new table in the place of the old one loses blocks and tokens: that is
    the lab's mistake."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    before = cache.tables["a"].physical_indices()
    after = cache.allocate("a", 4)
    assert after[:2] == before
    assert len(after) == 3
    fill(cache, "a", 5, [6, 7, 8, 9])
    expect_stored(cache, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    expect_conserved(cache)


def test_task_2_all_blocks_are_returned_not_the_new_ones_alone() -> None:
    """Oracle: by hand, blocks of 4: 3 tokens, then 1 that fits into the same block, then 1 that does not."""
    cache = make_cache()
    counts = [len(cache.allocate("a", more)) for more in (3, 1, 1, 0, 7)]
    assert counts == [1, 1, 2, 2, 3]


def test_task_2_what_is_returned_is_the_callers() -> None:
    """Oracle: by hand: a list that the caller changes is not the table's own."""
    cache = make_cache()
    cache.allocate("a", 5).clear()
    assert len(cache.tables["a"].blocks) == 2


def test_task_2_a_sequence_may_begin_with_no_tokens() -> None:
    """Oracle: by hand."""
    cache = make_cache(1)
    cache.allocate("full", 4)
    assert cache.allocate("none", 0) == []
    assert "none" in cache.tables


def test_task_2_too_many_tokens_are_refused_and_nothing_is_taken() -> None:
    """Oracle: the docstring: 3 blocks of 4, one of them held; 9 tokens want three."""
    cache = make_cache(3)
    begin(cache, "a", [1, 2, 3, 4])
    for seq_id in ("new", "a"):
        with pytest.raises(OutOfBlocksError):
            cache.allocate(seq_id, 9)
        assert list(cache.tables) == ["a"], "a sequence that got nothing is not there"
        expect_stored(cache, "a", [1, 2, 3, 4])
        expect_conserved(cache)
    assert len(cache.allocate("new", 8)) == 2


def test_task_2_a_negative_number_is_refused() -> None:
    """Oracle: the docstring, for a new sequence and for one that is here."""
    cache = make_cache()
    cache.allocate("a", 5)
    for seq_id in ("a", "b"):
        with pytest.raises(ValueError):
            cache.allocate(seq_id, -2)
    assert list(cache.tables) == ["a"]
    assert cache.tables["a"].num_tokens == 5


def test_task_2_a_fork_that_grows_keeps_the_tokens_of_the_block_that_they_shared() -> None:
    """Oracle: by hand: the last block is copied, with what is in it, and the other sees nothing of it. Blocks
    whose copy is forgotten hold zeros."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5, 6])
    cache.tables["b"] = cache.tables["a"].fork()
    cache.allocate("b", 1)
    fill(cache, "b", 6, [70])
    cache.allocate("a", 1)
    fill(cache, "a", 6, [7])
    expect_stored(cache, "b", [1, 2, 3, 4, 5, 6, 70])
    expect_stored(cache, "a", [1, 2, 3, 4, 5, 6, 7])
    expect_conserved(cache)
    assert cache.allocator.num_free == 12 - 3, "the full block in front is still shared"


def test_task_2_blocks_come_back_and_the_name_is_free() -> None:
    """Oracle: by hand: the whole pool can be taken again, also under the same id."""
    cache = make_cache(3)
    begin(cache, "a", [1, 2, 3, 4, 5])
    cache.free_sequence("a")
    assert "a" not in cache.tables
    assert cache.allocator.num_free == 3
    begin(cache, "a", list(range(12)))
    expect_stored(cache, "a", list(range(12)))


def test_task_2_blocks_that_others_hold_survive() -> None:
    """Oracle: by hand. Blocks put back among the free ones while another reads them are the lab's mistake:
    the next sequence writes over them."""
    cache = make_cache(3)
    begin(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    cache.free_sequence("a")
    assert cache.allocator.num_free == 1
    begin(cache, "c", [7, 8, 9])
    expect_stored(cache, "b", [1, 2, 3, 4, 5])
    expect_conserved(cache)
    cache.free_sequence("b")
    assert cache.allocator.num_free == 2


def test_task_2_a_mapping_finds_the_tokens_of_a_batch_in_the_pool() -> None:
    """Oracle: Python lists: sequences that grew alternately, some of their tokens each, one of them twice."""
    cache = make_cache()
    for start in (0, 3):
        for seq_id, first in (("a", 100), ("b", 200), ("c", 300)):
            cache.allocate(seq_id, 3)
            fill(cache, seq_id, start, [first + start + i for i in range(3)])
    mapping = cache.build_flat_slot_mapping([("b", 5), ("a", 6), ("c", 0), ("b", 1)])
    keys, values = cache.pool.read(0, mapping)
    expect(
        (keys.swapaxes(0, 1), values.swapaxes(0, 1)),
        [200, 201, 202, 203, 204, 100, 101, 102, 103, 104, 105, 200],
    )


def test_task_2_a_mapping_is_of_32_bit_integers_with_a_slot_for_each_token() -> None:
    """Oracle: the docstring, for the lab's batch of 30 tokens and for an empty one."""
    cache = make_cache(100, 16)
    cache.allocate("A", 30)
    for batch, total in (([("A", 30)], 30), ([], 0)):
        mapping = cache.build_flat_slot_mapping(batch)
        assert mapping.shape == (total,)
        assert mapping.dtype == mx.int32


# Task 3: PagedKVCache.write_token


def test_task_3_tokens_are_stored_at_their_positions() -> None:
    """Oracle: a Python list; written in an order of their own, blocks of 4."""
    cache = make_cache()
    cache.allocate("a", 10)
    for position in (9, 0, 4, 3, 7, 1, 8, 2, 6, 5):
        cache.write_token("a", position, *token(10 + position))
    expect_stored(cache, "a", list(range(10, 20)))


def test_task_3_a_position_can_be_written_again() -> None:
    """Oracle: by hand; and no other position changes."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    cache.write_token("a", 3, *token(40))
    expect_stored(cache, "a", [1, 2, 3, 40, 5])


def test_task_3_sequences_do_not_write_over_each_other() -> None:
    """Oracle: by hand: they grow in turns, so that their blocks are mixed."""
    cache = make_cache(block_size=2)
    for position in range(5):
        for seq_id, first in (("a", 10), ("b", 20), ("c", 30)):
            cache.allocate(seq_id, 1)
            cache.write_token(seq_id, position, *token(first + position))
    for seq_id, first in (("a", 10), ("b", 20), ("c", 30)):
        expect_stored(cache, seq_id, list(range(first, first + 5)))


def test_task_3_nothing_else_in_the_pool_changes() -> None:
    """Oracle: the whole pool, before and after: one slot of 48 is another."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    before = cache.pool.read(0, mx.arange(48))
    cache.write_token("a", 4, *token(99))
    after = cache.pool.read(0, mx.arange(48))
    for old, new in zip(before, after, strict=True):
        assert mx.sum(mx.any(old != new, axis=(1, 2))).item() == 1


def test_task_3_keys_and_values_take_the_pools_type() -> None:
    """Oracle: MLX's own rounding to bfloat16, the type where none is given."""
    cache = PagedKVCache(4, 4, HEADS, D)
    cache.allocate("a", 2)
    k, v = mx.random.normal((2, HEADS, D), key=mx.random.key(3))
    cache.write_token("a", 1, k, v)
    keys, values = cache.pool.read(0, mx.array(cache.tables["a"].slots(1, 2), mx.int32))
    assert mx.array_equal(keys[0], k.astype(mx.bfloat16)).item()
    assert mx.array_equal(values[0], v.astype(mx.bfloat16)).item()


@pytest.mark.parametrize("position", [0, 3, 4, 7, 8, 9])
def test_task_3_a_shared_block_is_copied_before_it_is_written(position: int) -> None:
    """Oracle: a Python list for each of the two. Any block may be shared, not only the last one; its copy
    has all that was in it."""
    numbers = list(range(1, 11))
    changed = [*numbers[:position], 99, *numbers[position + 1 :]]
    for writer, reader in (("a", "b"), ("b", "a")):
        cache = make_cache()
        begin(cache, "a", numbers)
        cache.tables["b"] = cache.tables["a"].fork()
        cache.write_token(writer, position, *token(99))
        expect_stored(cache, writer, changed)
        expect_stored(cache, reader, numbers)
        expect_conserved(cache)


def test_task_3_only_what_is_shared_is_copied_and_only_once() -> None:
    """Oracle: by hand: 3 blocks, shared by two: a copy for the first write to each, none for others."""
    cache = make_cache()
    begin(cache, "a", list(range(10)))
    cache.write_token("a", 0, *token(0))
    assert cache.allocator.num_free == 9
    cache.tables["b"] = cache.tables["a"].fork()
    for position, num_free in ((5, 8), (6, 8), (0, 7), (3, 7), (9, 6)):
        cache.write_token("b", position, *token(50 + position))
        assert cache.allocator.num_free == num_free
    cache.write_token("a", 5, *token(5))
    assert cache.allocator.num_free == 6, "the first has its blocks for itself again"
    expect_conserved(cache)


def test_task_3_in_a_full_pool_a_block_of_ones_own_is_written_where_it_is() -> None:
    """Oracle: by hand: nothing is shared, so nothing is copied, and no block has to be free."""
    cache = make_cache(2)
    begin(cache, "a", [1, 2, 3, 4, 5])
    for position in range(5):
        cache.write_token("a", position, *token(10 + position))
    expect_stored(cache, "a", [10, 11, 12, 13, 14])


class NotingPool(KVPool):
    """A pool that notes the copies that it is asked for."""

    noted: tuple[BlockCopy, ...] = ()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Note them, and copy."""
        self.noted += tuple(copies)
        super().copy_blocks(copies)


@pytest.mark.parametrize("position", [0, 3, 4, 5])
def test_task_3_a_copy_is_of_all_the_blocks_tokens(position: int) -> None:
    """Oracle: by hand: 4, also of the last block, which has 2 tokens; `length` is only a promise to the pool,
    which copies whole blocks whatever it says."""
    pool, allocator = NotingPool(4, 4, HEADS, D, dtype=mx.float32), BlockAllocator(4)
    cache = PagedKVCache.of(pool, allocator, {"a": BlockTable(allocator, 4)})
    shared = cache.allocate("a", 6)[position // 4]
    cache.tables["b"] = cache.tables["a"].fork()
    cache.write_token("b", position, *token(9))
    assert pool.noted == (BlockCopy(shared, cache.tables["b"].blocks[position // 4], 4),)


def test_task_3_three_that_share_a_block() -> None:
    """Oracle: a Python list for each: the second copy leaves the block to the third."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3])
    for seq_id in ("b", "c"):
        cache.tables[seq_id] = cache.tables["a"].fork()
    for seq_id, number in (("a", 10), ("b", 20), ("c", 30)):
        cache.write_token(seq_id, 1, *token(number))
    for seq_id, number in (("a", 10), ("b", 20), ("c", 30)):
        expect_stored(cache, seq_id, [1, number, 3])
    assert cache.allocator.num_free == 9
    expect_conserved(cache)


def test_task_3_without_a_block_for_the_copy_nothing_changes() -> None:
    """Oracle: the docstring: two blocks, both shared, and none is free."""
    cache = make_cache(2)
    begin(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    with pytest.raises(OutOfBlocksError):
        cache.write_token("b", 4, *token(9))
    for seq_id in ("a", "b"):
        expect_stored(cache, seq_id, [1, 2, 3, 4, 5])
    expect_conserved(cache)


@pytest.mark.parametrize("position", [-1, 5, 7, 8])
def test_task_3_a_position_that_has_no_room_yet_is_refused(position: int) -> None:
    """Oracle: the docstring: 5 tokens. -1 would be the last one in Python, and 7 is in the last block."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.write_token("a", position, *token(9))
    expect_stored(cache, "a", [1, 2, 3, 4, 5])


@pytest.mark.parametrize("shape", [(D,), (1, D), (HEADS, 1), (D, HEADS), (1, HEADS, D), (HEADS, D + 1)])
def test_task_3_a_token_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Oracle: the docstring. Most of these would be stored by broadcasting; no block is copied for them."""
    cache = make_cache()
    begin(cache, "a", [1, 2])
    cache.tables["b"] = cache.tables["a"].fork()
    good, wrong = mx.ones((HEADS, D)), mx.ones(shape)
    for k, v in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError):
            cache.write_token("b", 0, k, v)
    expect_stored(cache, "b", [1, 2])
    assert cache.allocator.num_free == 11


def test_task_3_on_a_pool_of_many_layers_the_copy_is_of_all_of_them() -> None:
    """Oracle: by hand: a table is the same for all layers, so a fresh block needs every layer's numbers."""
    pool, allocator = KVPool(6, 2, HEADS, D, num_layers=3, dtype=mx.float32), BlockAllocator(6)
    tables = {"a": BlockTable(allocator, 2)}
    layers = [PagedKVCache.of(pool, allocator, tables, layer) for layer in range(3)]
    layers[0].allocate("a", 3)
    for layer, cache in enumerate(layers):
        fill(cache, "a", 0, [10 * layer + i for i in range(3)])
    tables["b"] = tables["a"].fork()
    layers[1].write_token("b", 0, *token(99))
    expect_stored(layers[0], "b", [0, 1, 2])
    expect_stored(layers[1], "b", [99, 11, 12])
    expect_stored(layers[2], "b", [20, 21, 22])
    expect_stored(layers[1], "a", [10, 11, 12])


# Task 4: PagedKVCache.read_blocks


@pytest.mark.parametrize("start", [0, 3, 4, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_task_4_any_range_of_tokens(start: int, count: int) -> None:
    """Oracle: a slice of a Python list: 14 tokens in blocks of 4."""
    cache = make_cache()
    begin(cache, "a", list(range(14)))
    expect(cache.read_blocks("a", start, count), list(range(14))[start : start + count])


def test_task_4_the_labs_read() -> None:
    """Oracle: by hand: tokens 20 to 29 are in the second block of 16, at offsets 4 to 13."""
    cache = make_cache(100, 16)
    begin(cache, "A", list(range(30)))
    expect(cache.read_blocks("A", 20, 10), list(range(20, 30)))


def test_task_4_the_order_is_that_of_the_tokens_not_of_the_block_ids() -> None:
    """Oracle: Python lists: three sequences grow in turns and are read whole."""
    cache = make_cache(block_size=2)
    for position in range(7):
        for first in (10, 20, 30):
            cache.allocate(str(first), 1)
            fill(cache, str(first), position, [first + position])
    for first in (30, 10, 20):
        expect(cache.read_blocks(str(first), 0, 7), list(range(first, first + 7)))


def test_task_4_what_was_read_stays_as_it_was() -> None:
    """Oracle: by hand: a later write does not reach into arrays that were read before."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3])
    read = cache.read_blocks("a", 0, 3)
    fill(cache, "a", 0, [7, 8, 9])
    expect(read, [1, 2, 3])


@pytest.mark.parametrize(("start", "count"), [(0, 6), (5, 1), (-1, 1), (-2, 2), (3, -1), (6, 0), (4, 3)])
def test_task_4_tokens_that_are_not_there_are_refused(start: int, count: int) -> None:
    """Oracle: the docstring: 5 tokens, though the last block has room for 8."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.read_blocks("a", start, count)


def test_task_4_each_layer_has_its_own() -> None:
    """Oracle: by hand: views on two layers of one pool, with the same tables."""
    pool, allocator = KVPool(4, 2, HEADS, D, num_layers=2, dtype=mx.float32), BlockAllocator(4)
    tables = {"a": BlockTable(allocator, 2)}
    layers = [PagedKVCache.of(pool, allocator, tables, layer) for layer in range(2)]
    layers[0].allocate("a", 3)
    fill(layers[0], "a", 0, [1, 2, 3])
    fill(layers[1], "a", 0, [4, 5, 6])
    expect(layers[0].read_blocks("a", 0, 3), [1, 2, 3])
    expect(layers[1].read_blocks("a", 0, 3), [4, 5, 6])


# Task 5: PagedKVCache.read_sparse


def test_task_5_the_labs_window() -> None:
    """Oracle: by hand: token 500 is in block 31 of 16; 4 blocks begin at 448, and what is behind 500 is not
    read: 53 tokens. Whole blocks would be 64, eleven of them too far."""
    cache = make_cache(40, 16)
    begin(cache, "A", list(range(512)))
    expect(cache.read_sparse("A", 500, 4), list(range(448, 501)))


@pytest.mark.parametrize(
    ("token_idx", "window_blocks", "first"),
    [(0, 1, 0), (3, 1, 0), (4, 1, 4), (7, 1, 4), (8, 2, 4), (11, 2, 4), (12, 2, 8), (13, 4, 0), (13, 9, 0)],
)
def test_task_5_both_edges_of_the_window(token_idx: int, window_blocks: int, first: int) -> None:
    """Oracle: by hand, blocks of 4: whole blocks before, and the token is the last that is read. A window
    that is longer than the text begins with it."""
    cache = make_cache()
    begin(cache, "a", list(range(14)))
    expect(cache.read_sparse("a", token_idx, window_blocks), list(range(first, token_idx + 1)))


def test_task_5_how_much_is_read_does_not_depend_on_how_much_there_is() -> None:
    """Oracle: by hand: 3 blocks of 4 that end with a full one are 12 tokens, at every length."""
    cache = make_cache(40)
    begin(cache, "a", list(range(160)))
    for token_idx in (11, 51, 159):
        expect(cache.read_sparse("a", token_idx, 3), list(range(token_idx - 11, token_idx + 1)))


@pytest.mark.parametrize(("token_idx", "window_blocks"), [(-1, 2), (5, 2), (7, 1), (3, 0), (3, -1)])
def test_task_5_a_window_that_cannot_be_is_refused(token_idx: int, window_blocks: int) -> None:
    """Oracle: the docstring: 5 tokens, and at least one block."""
    cache = make_cache()
    begin(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.read_sparse("a", token_idx, window_blocks)


def test_task_5_in_a_long_random_mix_nothing_is_mixed_up_and_nothing_is_lost() -> None:
    """Oracle: a Python list for each sequence, through every method; at the end all blocks are free."""
    rng, cache = np.random.default_rng(7), make_cache(10, block_size=3)
    written: dict[str, list[int]] = {}
    for number in range(200):
        action = rng.choice(["grow", "write", "fork", "free"], p=[0.4, 0.4, 0.1, 0.1])
        seq_id = str(rng.choice(list(written))) if written and action != "grow" else f"{rng.integers(3)}"
        try:
            if action == "grow":
                cache.allocate(seq_id, 1)
                written.setdefault(seq_id, []).append(number)
                fill_last = len(written[seq_id]) - 1
                cache.write_token(seq_id, fill_last, *token(number))
            elif action == "write" and written:
                position = int(rng.integers(len(written[seq_id])))
                cache.write_token(seq_id, position, *token(number))
                written[seq_id][position] = number
            elif action == "fork" and written and f"fork of {seq_id}" not in written and len(written) < 5:
                cache.tables[f"fork of {seq_id}"] = cache.tables[seq_id].fork()
                written[f"fork of {seq_id}"] = list(written[seq_id])
            elif action == "free" and written:
                cache.free_sequence(seq_id)
                del written[seq_id]
        except OutOfBlocksError:
            assert cache.allocator.num_free == 0
        expect_conserved(cache)
        for name, numbers in written.items():
            expect(cache.read_blocks(name, 0, len(numbers)), numbers)
            expect(cache.read_sparse(name, len(numbers) - 1, 1), numbers[(len(numbers) - 1) // 3 * 3 :])
    for name in list(written):
        cache.free_sequence(name)
    assert cache.allocator.num_free == 10
