"""Day 3.2, tasks 14 and 15: requests are queued or rejected, and an unused pool shrinks."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import DuplicateRequestError, RequestTooLargeError
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import NoPrefixSharing, Policies
from tiny_llm.sampling_params import SamplingParams

from common.blocks import counts
from common.paged_managers import manager_of, with_model
from common.toy_requests import ids, limits

# Task 14: PagedBatchManager.add_request


def test_task_14_a_sequence_has_a_table_and_a_stream_for_each_group_of_layers() -> None:
    """Oracle: by hand: two groups, so two tables and two streams."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=(LayerGroup((0,)), LayerGroup((1,))))
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    sequence = manager.sequence("a")
    assert (len(sequence.tables), len(sequence.streams)) == (2, 2)
    assert {table.num_tokens for table in sequence.tables} == {0}


def test_task_14_layers_with_and_without_a_window_get_different_kinds_of_tables() -> None:
    """Oracle: by hand: layers with a window need another kind of table than layers with full attention."""
    groups = (LayerGroup((0,)), LayerGroup((1,), window=8))
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=groups)
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    full, windowed = manager.sequence("a").tables
    assert type(full) is not type(windowed)


def test_task_14_a_new_request_waits_without_pages() -> None:
    """Oracle: by hand: pages are allocated when it is admitted."""
    manager = manager_of()
    assert not manager.has_work
    assert manager.add_request([5, 6, 7], "a", limits(), seed=9) is True
    assert manager.has_work
    assert (ids(manager.waiting), ids(manager.running)) == (["a"], [])
    assert manager.capacity.num_free == 8
    sequence = manager.sequence("a")
    assert (sequence.seq_id, sequence.request_id, sequence.prompt) == ("a", "a", (5, 6, 7))
    assert (sequence.params, sequence.seed) == (limits(), 9), (
        "the leader must have the request's parameters and seed"
    )
    assert (sequence.outputs, sequence.num_computed, sequence.num_forks) == ([], 0, 0)
    assert (len(sequence.table.blocks), sequence.table.num_tokens, sequence.table.block_size) == (0, 0, 4)
    assert not sequence.is_beam


def test_task_14_requests_wait_in_the_order_of_their_arrival() -> None:
    """Oracle: by hand; sorting by name or length gives another order."""
    manager = manager_of()
    for name, length in (("m", 3), ("z", 1), ("a", 2)):
        manager.add_request([1] * length, name, limits())
    assert ids(manager.waiting) == ["m", "z", "a"]


def test_task_14_the_prompt_is_copied() -> None:
    """Oracle: by hand: the caller may change the list later."""
    manager, tokens = manager_of(), [5, 6, 7]
    manager.add_request(tokens, "a", limits())
    tokens.append(8)
    assert manager.sequence("a").prompt == (5, 6, 7)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (4, 7), (29, 32), (None, 32)])
def test_task_14_max_len_is_limited_by_the_request_or_by_the_context(
    max_tokens: int | None, max_len: int
) -> None:
    """Oracle: by hand: 3 prompt tokens plus the outputs, or the context of 32."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a", limits(max_tokens))
    assert manager.sequence("a").max_len == max_len


def test_task_14_without_parameters_the_default_sampling_params_are_used() -> None:
    """Oracle: by hand: `SamplingParams()` means 16 tokens and one completion."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a")
    assert manager.sequence("a").params == SamplingParams()
    assert manager.sequence("a").max_len == 19


@pytest.mark.parametrize("is_beam", [False, True])
def test_task_14_completions_and_beams_wait_as_one_leader(is_beam: bool) -> None:
    """Oracle: by hand: three are a leader and two pending forks, and all three ids are known."""
    manager = manager_of()
    manager.add_request([5, 6], "a", limits(n=3), beam_search=is_beam)
    assert ids(manager.waiting) == ["a/0"]
    leader = manager.sequence("a/0")
    assert (leader.request_id, leader.num_forks) == ("a", 2), (
        "the leader of three must have two pending forks"
    )
    assert leader.is_beam is is_beam, "the leader's `is_beam` must be the argument `beam_search`"
    assert manager.sequence("a/1") is manager.sequence("a/2") is leader


def test_task_14_a_cache_salt_changes_the_block_hashes() -> None:
    """Oracle: the docstring of `TokenBlocks`: different salts give different hashes."""
    manager = manager_of()
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        manager.add_request([5, 6], name, SamplingParams(max_tokens=4, cache_salt=salt))
    first = {name: manager.sequence(name).stream.parent(0) for name in "abc"}
    assert first["a"] != first["b"] == first["c"]
    assert manager.sequence("a").stream.block_size == 4


def test_task_14_an_empty_prompt_is_rejected() -> None:
    """Oracle: the docstring; nothing changes."""
    manager = manager_of()
    with pytest.raises(ValueError):
        manager.add_request([], "a", limits())
    assert not manager.has_work


TOO_LARGE = {
    "longer_than_the_context": (20, limits(13), False),
    "no_position_for_an_output": (32, limits(1), False),
    "prompt_too_long": (40, limits(None), False),
    "more_completions_than_max_num_seqs": (2, limits(n=5), False),
    "too_few_pages": (14, limits(12), False),
    "too_few_pages_for_completions": (4, limits(17, n=2), False),
    "too_few_pages_for_beams": (4, limits(9, n=4), True),
}


@pytest.mark.parametrize(("length", "params", "is_beam"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_task_14_a_request_that_could_never_run_is_rejected(
    length: int, params: SamplingParams, is_beam: bool
) -> None:
    """Oracle: by hand, for 6 blocks of 4, 4 sequences at a time and a context of 32.

    26 tokens are 7 blocks; twice 21 tokens are 6 + 5 blocks, with one shared; four times 13 tokens
    are 4 + 3 * 3 blocks. Nothing changes: the id is free for a request that can run.
    """
    manager = manager_of(blocks=6)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * length, "a", params, beam_search=is_beam)
    assert not manager.has_work
    assert manager.add_request([1] * 12, "a", limits(12))
    assert ids(manager.waiting) == ["a"]


@pytest.mark.parametrize("is_beam", [False, True])
def test_task_14_more_completions_or_beams_than_max_num_seqs_are_rejected(is_beam: bool) -> None:
    """Oracle: by hand: 2 sequences run at a time, and 64 blocks are enough for all completions.

    Three would wait forever. Two can run.
    """
    manager = manager_of(blocks=64, max_seqs=2)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1, 2], "a", limits(n=3), beam_search=is_beam)
    assert not manager.has_work
    assert manager.add_request([1, 2], "a", limits(n=2), beam_search=is_beam)


def test_task_14_a_request_that_is_wrong_in_two_ways_gets_the_first_error() -> None:
    """Oracle: the docstring's order: the checks of `max_sequence_length`, then the id, then the blocks."""
    manager = manager_of(blocks=6)
    manager.add_request([1, 2], "a", limits())
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * 20, "a", limits(13))  # longer than the context of 32
    with pytest.raises(DuplicateRequestError):
        manager.add_request([1] * 14, "a", limits(12))  # 7 blocks, one more than the pool has
    assert ids(manager.waiting) == ["a"]


@pytest.mark.parametrize(
    ("name", "n"), [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b/0", 1), ("b/1", 1), ("c", 2)]
)
def test_task_14_an_id_in_use_is_rejected(name: str, n: int) -> None:
    """Oracle: the docstring: "a" is in use, "b", whose completions are "b/0" and "b/1", and "c/1".

    Two completions of a request "c" would be "c/0" and "c/1".
    """
    manager = manager_of()
    manager.add_request([1, 2], "a", limits())
    manager.add_request([3, 4], "b", limits(n=2))
    manager.add_request([7], "c/1", limits())
    with pytest.raises(DuplicateRequestError):
        manager.add_request([5, 6], name, limits(n=n))
    assert ids(manager.waiting) == ["a", "b/0", "c/1"]


# Task 15: PagedBatchManager.shrink_pool


class FakePrefixCache(NoPrefixSharing):
    """A prefix cache with the blocks and the number of idle blocks that a test sets."""

    num_idle: int = 0

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.allocator = allocator
        self.blocks: list[int] = []

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks."""
        count = max(0, min(num_blocks, self.num_idle))
        for _ in range(count):
            self.allocator.free(self.blocks.pop())
        self.num_idle -= count
        return count

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Use the blocks' new ids."""
        self.blocks = [moved.get(block, block) for block in self.blocks]


WITH_FAKE_CACHE = Policies(prefix=FakePrefixCache)


def keep_last(manager: PagedBatchManager, num_blocks: int, num_idle: int = 0) -> FakePrefixCache:
    """Let a manager's prefix cache hold the last blocks of the pool."""
    kept, allocator = manager.prefix, manager.allocator
    assert isinstance(kept, FakePrefixCache)
    all_blocks = sorted(allocator.allocate() for _ in range(allocator.num_free))
    for block in all_blocks[: len(all_blocks) - num_blocks]:
        allocator.free(block)
    kept.blocks, kept.num_idle = all_blocks[len(all_blocks) - num_blocks :], num_idle
    return kept


def test_task_15_an_unused_pool_is_halved_until_it_has_min_pages() -> None:
    """Oracle: by hand: 20, 10, 5; half of 5 is less than `min_pages`, 4."""
    manager, sizes = manager_of(blocks=64, min_pages=4), []
    manager.allocator.resize(20)
    for _ in range(4):
        manager.shrink_pool()
        sizes.append(manager.allocator.num_blocks)
    assert sizes == [10, 5, 5, 5]


def test_task_15_a_pool_without_min_pages_never_shrinks() -> None:
    """Oracle: by hand: without `min_pages` the pool always has all blocks.

    Half may be exactly `min_pages`.
    """
    manager = manager_of(blocks=64)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == 64
    manager = manager_of(blocks=64, min_pages=8)
    manager.allocator.resize(16)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == 8


IN_A_POOL_OF_16 = {  # held, idle among them; the size and the number of held blocks afterwards
    "4_in_use_are_a_quarter_so_it_stays": (4, 0, 16, 4),
    "3_in_use_are_less_so_it_halves": (3, 0, 8, 3),
    "5_held_1_idle_so_it_stays": (5, 1, 16, 5),
    "6_held_3_idle_so_it_halves": (6, 3, 8, 6),
    "10_held_8_idle_so_2_are_evicted": (10, 8, 8, 8),
    "16_held_16_idle_so_8_are_evicted": (16, 16, 8, 8),
    "16_held_12_idle_so_it_stays": (16, 12, 16, 16),
}


@pytest.mark.parametrize(
    ("held", "idle", "size", "held_after"), IN_A_POOL_OF_16.values(), ids=IN_A_POOL_OF_16
)
def test_task_15_idle_blocks_do_not_count_as_used_and_are_evicted_only_if_necessary(
    held: int, idle: int, size: int, held_after: int
) -> None:
    """Oracle: by hand, 16 blocks: 4 in use are a quarter, 3 are less; 8 held blocks fit into half."""
    case = f"a pool of 16 blocks, {held} held, {idle} of them idle, so {held - idle} in use"
    manager = PagedBatchManager(64, 4, 4, min_pages=2, policies=WITH_FAKE_CACHE)
    manager.allocator.resize(16)
    kept = keep_last(manager, held, idle)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == size, f"{case}: wrong size of the pool"
    assert len(kept.blocks) == held_after, f"{case}: wrong number of held blocks"
    assert len(set(kept.blocks)) == held_after, f"{case}: two held blocks became one"
    assert manager.allocator.num_free == size - held_after
    assert sum(counts(manager.allocator)) == held_after


def test_task_15_keys_and_values_move_with_the_blocks_that_are_held() -> None:
    """Oracle: what was in the last two of 16 blocks, in both layers; the pool has the new size too."""
    manager = with_model(min_pages=2, policies=WITH_FAKE_CACHE)
    manager.allocator.resize(16)
    assert manager.pool is not None
    manager.pool.resize(16)
    kept, before = keep_last(manager, 2), []
    slots = [block * 4 + offset for block in kept.blocks for offset in range(4)]
    for layer in range(2):
        k, v = mx.random.normal((2, 8, 2, 8), key=mx.random.key(layer))
        manager.pool.write(layer, mx.array(slots), k, v)
        before += [np.array(k), np.array(v)]
    manager.shrink_pool()
    assert manager.pool.num_blocks == manager.allocator.num_blocks == 8
    slots = [block * 4 + offset for block in kept.blocks for offset in range(4)]
    after = [array for layer in range(2) for array in manager.pool.read(layer, mx.array(slots))]
    for found, want in zip(after, before, strict=True):
        np.testing.assert_array_equal(
            np.array(found),
            want,
            err_msg="a held block has different keys or values after the pool was halved",
        )
