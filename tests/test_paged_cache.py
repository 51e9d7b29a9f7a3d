"""Slots and the paged cache: compared with a plain dict of lists, and as a view of a running engine."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.slot_mapping import flat_slots

from tiny_llm import BlockAllocator, BlockTable, KVPool, OutOfBlocksError, PagedBatchManager, PagedKVCache
from tiny_model import examples, random_prompt, tiny_model

HEADS, D = 2, 3
Pair = tuple[mx.array, mx.array]


def make_cache(total_blocks: int = 12, block_size: int = 4) -> PagedKVCache:
    return PagedKVCache(total_blocks, block_size, HEADS, D, mx.float32)


def token(number: float) -> Pair:
    """A token's key and value [HEADS, D]; each token and each head has different numbers."""
    k = number + mx.arange(HEADS * D, dtype=mx.float32).reshape(HEADS, D) / 16
    return k, -k


def write(cache: PagedKVCache, seq_id: str, start: int, numbers: list[int]) -> None:
    for position, number in enumerate(numbers, start):
        cache.write_token(seq_id, position, *token(number))


def add_sequence(cache: PagedKVCache, seq_id: str, numbers: list[int]) -> None:
    cache.allocate(seq_id, len(numbers))
    write(cache, seq_id, 0, numbers)


def expect(read: Pair, numbers: list[int]) -> None:
    """Check that these tokens, keys and values, were read, [HEADS, tokens, D] each."""
    for array, kind in zip(read, (0, 1), strict=True):
        assert array.shape == (HEADS, len(numbers), D)
        for i, number in enumerate(numbers):
            assert array[:, i].tolist() == token(number)[kind].tolist()


# ---- flat slots ----


def mixed_tables(totals: list[int], block_size: int, seed: int) -> list[BlockTable]:
    """Tables of these lengths, their blocks allocated alternately from a pool that was full before."""
    rng = np.random.default_rng(seed)
    allocator = BlockAllocator(max(1, sum(-(-total // block_size) for total in totals)))
    for _ in range(allocator.num_blocks):
        allocator.allocate()
    for block in rng.permutation(allocator.num_blocks):
        allocator.free(int(block))
    tables = [BlockTable(allocator, block_size) for _ in totals]
    for row in rng.permutation(np.repeat(np.arange(len(totals)), totals)):
        tables[row].append_tokens(1)
    return tables


@settings(max_examples=examples(60))
@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 9), st.integers(0, 99), st.data())
def test_flat_slots_match_the_tables(
    totals: list[int], block_size: int, seed: int, data: st.DataObject
) -> None:
    tables = mixed_tables(totals, block_size, seed)
    lengths = [data.draw(st.integers(0, total)) for total in totals]
    slots = flat_slots(tables, lengths)
    assert slots.dtype == mx.int32
    assert slots.shape == (sum(lengths),)
    assert slots.tolist() == [
        slot for table, n in zip(tables, lengths, strict=True) for slot in table.slots(0, n)
    ]


def test_the_flat_slots_equal_those_of_the_labs_example() -> None:
    """Blocks 23, 64 and 87 of 16 tokens: token 25 is in block 64 at offset 9."""
    table = BlockTable(BlockAllocator(100), 16)
    table.append_tokens(40)
    table.blocks = [23, 64, 87]
    assert flat_slots([table], [40])[25].item() == 64 * 16 + 9


@pytest.mark.parametrize("length", [-1, 6, 8])
def test_a_length_that_differs_from_the_tables_is_rejected(length: int) -> None:
    """8 tokens would fit into its two blocks, but it has 5."""
    with pytest.raises(ValueError, match=f"length of {length} .* 5 tokens"):
        flat_slots(mixed_tables([5], 4, 0), [length])


def test_there_must_be_a_length_for_each_table() -> None:
    with pytest.raises(ValueError, match="2 tables and 1 lengths"):
        flat_slots(mixed_tables([5, 5], 4, 0), [3])


def test_tables_of_different_pools_are_rejected() -> None:
    with pytest.raises(ValueError, match="block size: 4 and 3"):
        flat_slots([*mixed_tables([5], 4, 0), *mixed_tables([5], 3, 0)], [5, 5])


# ---- allocate ----


def test_a_growing_sequence_keeps_its_blocks_and_tokens() -> None:
    """The lab replaced the old table by a new one: blocks leaked, tokens were lost."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    before = cache.tables["a"].physical_indices()
    after = cache.allocate("a", 4)
    assert after[:2] == before
    assert len(after) == 3
    write(cache, "a", 5, [6, 7, 8, 9])
    expect(cache.read_blocks("a", 0, 9), list(range(1, 10)))
    assert cache.allocator.num_free == 9


def test_growth_within_a_block_allocates_no_block() -> None:
    cache = make_cache()
    first = cache.allocate("a", 1)
    assert cache.allocate("a", 3) == first
    assert cache.allocate("a", 0) == first
    assert len(cache.allocate("a", 1)) == 2


def test_the_returned_list_is_a_copy_of_the_tables() -> None:
    cache = make_cache()
    cache.allocate("a", 5).clear()
    assert len(cache.tables["a"].blocks) == 2


def test_a_sequence_that_does_not_fit_allocates_nothing_and_is_not_added() -> None:
    cache = make_cache(total_blocks=3)
    cache.allocate("a", 4)
    with pytest.raises(OutOfBlocksError):
        cache.allocate("b", 9)
    assert list(cache.tables) == ["a"]
    with pytest.raises(OutOfBlocksError):
        cache.allocate("a", 9)
    assert cache.tables["a"].num_tokens == 4
    assert cache.allocator.num_free == 2


def test_a_negative_number_of_tokens_is_rejected() -> None:
    cache = make_cache()
    cache.allocate("a", 5)
    for seq_id in ("a", "b"):
        with pytest.raises(ValueError, match="at least 0, not -1"):
            cache.allocate(seq_id, -1)
    assert list(cache.tables) == ["a"]
    assert cache.tables["a"].num_tokens == 5


def test_growth_copies_a_shared_last_block() -> None:
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    blocks = cache.allocate("b", 1)
    assert blocks[0] == cache.tables["a"].blocks[0]
    assert blocks[1] != cache.tables["a"].blocks[1]
    write(cache, "b", 5, [6])
    expect(cache.read_blocks("b", 0, 6), [1, 2, 3, 4, 5, 6])
    expect(cache.read_blocks("a", 0, 5), [1, 2, 3, 4, 5])


# ---- write and read ----


@pytest.mark.parametrize("position", [0, 3, 4, 9])
def test_a_shared_block_is_copied_before_it_is_written(position: int) -> None:
    cache = make_cache()
    numbers = list(range(1, 11))
    add_sequence(cache, "a", numbers)
    cache.tables["b"] = cache.tables["a"].fork()
    cache.write_token("b", position, *token(99))
    expect(cache.read_blocks("a", 0, 10), numbers)
    expect(cache.read_blocks("b", 0, 10), [*numbers[:position], 99, *numbers[position + 1 :]])
    assert cache.allocator.num_free == 12 - 3 - 1
    cache.write_token("b", position, *token(98))
    assert cache.allocator.num_free == 12 - 3 - 1, "an unshared block is written in place"


def test_a_write_without_a_free_block_for_its_copy_changes_nothing() -> None:
    cache = make_cache(total_blocks=2)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    with pytest.raises(OutOfBlocksError):
        cache.write_token("b", 1, *token(9))
    expect(cache.read_blocks("b", 0, 5), [1, 2, 3, 4, 5])
    assert cache.tables["a"].blocks == cache.tables["b"].blocks


def test_stored_values_have_the_pools_type() -> None:
    cache = PagedKVCache(4, 4, HEADS, D)
    cache.allocate("a", 1)
    k, v = mx.random.normal((2, HEADS, D), key=mx.random.key(1))
    cache.write_token("a", 0, k, v)
    keys, values = cache.read_blocks("a", 0, 1)
    assert keys.dtype == values.dtype == mx.bfloat16
    assert mx.array_equal(keys[:, 0], k.astype(mx.bfloat16)).item()
    assert mx.array_equal(values[:, 0], v.astype(mx.bfloat16)).item()


def test_a_later_write_does_not_change_an_earlier_read() -> None:
    cache = make_cache()
    add_sequence(cache, "a", [1, 2])
    read = cache.read_blocks("a", 0, 2)
    write(cache, "a", 0, [7, 8])
    expect(read, [1, 2])


def test_a_write_costs_only_a_tokens_bytes() -> None:
    """A write that copied the pool would show in peak memory."""
    cache = PagedKVCache(4000, 16, 8, 64, mx.float32)
    cache.allocate("a", 64)
    k = mx.ones((8, 64))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for position in range(64):
        cache.write_token("a", position, k, k)
    assert mx.get_peak_memory() - before < cache.pool.nbytes // 20


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 6), (5, 1), (2, -1), (6, 0)])
def test_a_range_outside_the_tokens_is_rejected(start: int, count: int) -> None:
    """Even if it is within the blocks."""
    cache = make_cache()
    cache.allocate("a", 5)
    with pytest.raises(ValueError, match="not within the table's 5 tokens"):
        cache.read_blocks("a", start, count)


def test_a_read_of_no_tokens_gives_arrays_of_length_0() -> None:
    cache = make_cache()
    cache.allocate("a", 5)
    cache.allocate("none", 0)
    expect(cache.read_blocks("a", 5, 0), [])
    expect(cache.read_blocks("none", 0, 0), [])


@pytest.mark.parametrize("position", [-1, 5, 7])
def test_a_position_without_a_token_cannot_be_written(position: int) -> None:
    cache = make_cache()
    cache.allocate("a", 5)
    with pytest.raises(ValueError, match=f"position {position} .* 5 tokens"):
        cache.write_token("a", position, *token(1))


@pytest.mark.parametrize("shape", [(D,), (1, D), (HEADS, 1), (HEADS, D + 1), (1, HEADS, D), (D, HEADS)])
def test_a_token_of_another_shape_is_rejected_before_a_block_is_copied(shape: tuple[int, ...]) -> None:
    """Most of these would broadcast."""
    cache = make_cache()
    add_sequence(cache, "a", [1])
    cache.tables["b"] = cache.tables["a"].fork()
    good, wrong = mx.zeros((HEADS, D)), mx.zeros(shape)
    for k, v in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
            cache.write_token("b", 0, k, v)
    assert cache.allocator.num_free == 11


# ---- windows ----


def test_the_labs_example_reads_only_its_window() -> None:
    """Token 500, blocks of 16, 4 blocks: 448 .. 500. The lab read up to 511, eleven tokens too far."""
    cache = make_cache(40, 16)
    add_sequence(cache, "a", list(range(512)))
    expect(cache.read_sparse("a", 500, 4), list(range(448, 501)))


@settings(max_examples=examples(40))
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 7), st.data())
def test_a_window_starts_at_a_block_and_ends_with_the_token(
    block_size: int, total: int, window: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, total - 1))
    cache = make_cache(20, block_size)
    add_sequence(cache, "a", list(range(total)))
    last_blocks = [n for n in range(position + 1) if n // block_size > position // block_size - window]
    expect(cache.read_sparse("a", position, window), last_blocks)


@pytest.mark.parametrize(("position", "window"), [(-1, 2), (5, 2), (3, 0), (3, -1)])
def test_an_invalid_window_is_rejected(position: int, window: int) -> None:
    cache = make_cache()
    cache.allocate("a", 5)
    with pytest.raises(ValueError, match=r"position|window_blocks"):
        cache.read_sparse("a", position, window)


# ---- slots ----


def test_a_slot_mapping_finds_the_tokens_in_the_pool() -> None:
    cache = make_cache()
    for start in (0, 3):
        for seq_id, first in (("a", 100), ("b", 200)):
            cache.allocate(seq_id, 3)
            write(cache, seq_id, start, [first + start + i for i in range(3)])
    slots = cache.build_flat_slot_mapping([("b", 5), ("a", 6), ("b", 1)])
    keys, values = cache.pool.read(0, slots)
    expect((keys.swapaxes(0, 1), values.swapaxes(0, 1)), [*range(200, 205), *range(100, 106), 200])
    assert cache.build_flat_slot_mapping([]).tolist() == []


def test_a_mapping_of_more_tokens_than_the_sequence_has_is_rejected() -> None:
    cache = make_cache()
    cache.allocate("a", 5)
    with pytest.raises(ValueError, match=r"6 .* 5 tokens"):
        cache.build_flat_slot_mapping([("a", 6)])


# ---- free ----


def test_a_freed_sequences_shared_blocks_stay_with_their_other_holders() -> None:
    """The lab returned shared blocks to the free list while the other sequence still used them."""
    cache = make_cache(total_blocks=3)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    cache.free_sequence("a")
    assert cache.allocator.num_free == 1
    add_sequence(cache, "c", [7, 8, 9])
    expect(cache.read_blocks("b", 0, 5), [1, 2, 3, 4, 5])
    cache.free_sequence("b")
    cache.free_sequence("c")
    assert cache.allocator.num_free == 3


def test_an_id_can_be_reused_after_free() -> None:
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.free_sequence("a")
    add_sequence(cache, "a", [6])
    expect(cache.read_blocks("a", 0, 1), [6])


def test_an_unknown_sequence_is_an_error_in_every_method() -> None:
    cache = make_cache()
    add_sequence(cache, "a", [1])
    cache.free_sequence("a")
    for call in (
        lambda: cache.free_sequence("a"),
        lambda: cache.write_token("a", 0, *token(1)),
        lambda: cache.read_blocks("a", 0, 0),
        lambda: cache.read_sparse("a", 0, 1),
        lambda: cache.build_flat_slot_mapping([("a", 0)]),
    ):
        with pytest.raises(KeyError, match="a"):
            call()


# ---- random calls, against a dict ----


class AgainstADict(RuleBasedStateMachine):
    """Any calls, in any order: a dict of lists holds the expected reads; None was never written."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(total_blocks=9, block_size=3)
        self.lists: dict[str, list[int | None]] = {}
        self.next_number = 1

    def some_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.lists)))

    @rule(seq_id=st.sampled_from("abcd"), count=st.integers(0, 8))
    def allocate(self, seq_id: str, count: int) -> None:
        try:
            blocks = self.cache.allocate(seq_id, count)
        except OutOfBlocksError:
            return
        self.lists.setdefault(seq_id, []).extend([None] * count)
        assert len(blocks) == -(-len(self.lists[seq_id]) // 3)

    @precondition(lambda self: any(self.lists.values()))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(i for i, tokens in self.lists.items() if tokens)))
        position = data.draw(st.integers(0, len(self.lists[seq_id]) - 1))
        try:
            self.cache.write_token(seq_id, position, *token(self.next_number))
        except OutOfBlocksError:
            return
        self.lists[seq_id][position] = self.next_number
        self.next_number += 1

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), fork=st.sampled_from("efg"))
    def share(self, data: st.DataObject, fork: str) -> None:
        seq_id = self.some_id(data)
        if fork not in self.lists:
            self.cache.tables[fork] = self.cache.tables[seq_id].fork()
            self.lists[fork] = list(self.lists[seq_id])

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq_id = self.some_id(data)
        self.cache.free_sequence(seq_id)
        del self.lists[seq_id]

    @invariant()
    def reads_are_what_was_written(self) -> None:
        for seq_id, tokens in self.lists.items():
            keys, values = self.cache.read_blocks(seq_id, 0, len(tokens))
            for i, number in enumerate(tokens):
                if number is not None:
                    assert keys[:, i].tolist() == token(number)[0].tolist()
                    assert values[:, i].tolist() == token(number)[1].tolist()

    @invariant()
    def blocks_are_conserved(self) -> None:
        held = {block for table in self.cache.tables.values() for block in table.blocks}
        assert self.cache.allocator.num_free == 9 - len(held)


def test_any_sequence_of_calls_reads_what_was_written() -> None:
    run_state_machine_as_test(
        AgainstADict, settings=settings(max_examples=examples(20), stateful_step_count=25, deadline=None)
    )


# ---- a view ----


def running_manager() -> PagedBatchManager:
    manager = PagedBatchManager(40, 4, 4, model=tiny_model(), kv_dtype=mx.float32)
    manager.add_request(random_prompt(13, 1), "a", SamplingParams(max_tokens=20))
    manager.add_request(random_prompt(6, 2), "b", SamplingParams(n=2, max_tokens=20))
    for _ in range(4):
        logits = manager.process_batch()
        manager.commit({seq_id: int(mx.argmax(row)) for seq_id, row in logits.items()})
    return manager


@pytest.mark.parametrize("layer", [0, 1])
def test_a_view_reads_what_a_running_engine_stored(layer: int) -> None:
    manager = running_manager()
    pool, tables = manager.pool, {s.seq_id: s.table for s in manager.running}
    assert pool is not None
    view = PagedKVCache.of(pool, manager.allocator, tables, layer)
    assert set(tables) == {"a", "b/0", "b/1"}
    for seq_id, table in tables.items():
        keys, values = view.read_blocks(seq_id, 0, table.num_tokens)
        assert mx.any(keys != 0).item()
        for array, blocks in zip((keys, values), pool.read_blocks(layer, table.blocks), strict=True):
            whole = blocks.swapaxes(0, 1).reshape(array.shape[0], -1, array.shape[2])
            assert mx.array_equal(array, whole[:, : table.num_tokens]).item()


def test_a_view_follows_the_engine_without_changing_it() -> None:
    manager, untouched = running_manager(), running_manager()
    assert manager.pool is not None
    view = PagedKVCache.of(manager.pool, manager.allocator, {s.seq_id: s.table for s in manager.running})
    for _ in range(3):
        length = view.tables["a"].num_tokens
        view.read_sparse("a", length - 1, 2)
        view.build_flat_slot_mapping([("a", length), ("b/1", 3)])
        rows = [m.process_batch() for m in (manager, untouched)]
        for seq_id in rows[0]:
            assert mx.array_equal(rows[0][seq_id], rows[1][seq_id]).item()
        for m, step in zip((manager, untouched), rows, strict=True):
            m.commit({seq_id: int(mx.argmax(row)) for seq_id, row in step.items()})
        assert view.tables["a"].num_tokens == length + 1
    assert manager.capacity == untouched.capacity


def test_a_write_through_a_view_copies_a_shared_block_in_every_layer() -> None:
    """Beams and completions share whole blocks of all layers, whichever layer the view shows."""
    pool, allocator = KVPool(6, 2, HEADS, D, num_layers=2, dtype=mx.float32), BlockAllocator(6)
    tables = {"a": BlockTable(allocator, 2)}
    layers = [PagedKVCache.of(pool, allocator, tables, layer) for layer in range(2)]
    layers[0].allocate("a", 3)
    for layer, cache in enumerate(layers):
        write(cache, "a", 0, [10 * layer + i for i in range(3)])
    tables["b"] = tables["a"].fork()
    layers[1].write_token("b", 0, *token(99))
    expect(layers[0].read_blocks("b", 0, 3), [0, 1, 2])
    expect(layers[1].read_blocks("b", 0, 3), [99, 11, 12])
    expect(layers[1].read_blocks("a", 0, 3), [10, 11, 12])


def test_a_view_of_mismatched_parts_is_rejected() -> None:
    pool, allocator = KVPool(6, 2, HEADS, D), BlockAllocator(6)
    with pytest.raises(ValueError, match="allocator has 5 blocks, but the pool has 6"):
        PagedKVCache.of(pool, BlockAllocator(5), {})
    for table in (BlockTable(allocator, 3), BlockTable(BlockAllocator(6), 2)):
        with pytest.raises(ValueError, match="the table of 'x' must have blocks of 2 tokens"):
            PagedKVCache.of(pool, allocator, {"x": table})
    with pytest.raises(IndexError):
        PagedKVCache.of(pool, allocator, {}, layer=1)
