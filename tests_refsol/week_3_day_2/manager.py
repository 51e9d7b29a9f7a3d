"""Day 3.2, tasks 14 and 15: requests are queued or refused, and memory is given back."""

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


def test_task_14_a_table_is_of_the_kind_that_its_layers_need() -> None:
    """Oracle: by hand: layers with a window need another kind than layers that see everything."""
    groups = (LayerGroup((0,)), LayerGroup((1,), window=8))
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=groups)
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    full, windowed = manager.sequence("a").tables
    assert type(full) is not type(windowed)


def test_task_14_a_request_waits_without_a_page() -> None:
    """Oracle: by hand: pages are taken when it is its turn."""
    manager = manager_of()
    assert not manager.has_work
    assert manager.add_request([5, 6, 7], "a", limits(), seed=9) is True
    assert manager.has_work
    assert (ids(manager.waiting), ids(manager.running)) == (["a"], [])
    assert manager.capacity.num_free == 8
    sequence = manager.sequence("a")
    assert (sequence.seq_id, sequence.request_id, sequence.prompt) == ("a", "a", (5, 6, 7))
    assert (sequence.params, sequence.seed) == (limits(), 9), "the parameters or the seed of the leader"
    assert (sequence.outputs, sequence.num_computed, sequence.num_forks) == ([], 0, 0)
    assert (len(sequence.table.blocks), sequence.table.num_tokens, sequence.table.block_size) == (0, 0, 4)
    assert not sequence.is_beam


def test_task_14_requests_wait_in_the_order_of_their_arrival() -> None:
    """Oracle: by hand; that of their names or lengths is another."""
    manager = manager_of()
    for name, length in (("m", 3), ("z", 1), ("a", 2)):
        manager.add_request([1] * length, name, limits())
    assert ids(manager.waiting) == ["m", "z", "a"]


def test_task_14_a_prompt_is_what_it_was_when_it_came() -> None:
    """Oracle: by hand: the caller may use the list again."""
    manager, tokens = manager_of(), [5, 6, 7]
    manager.add_request(tokens, "a", limits())
    tokens.append(8)
    assert manager.sequence("a").prompt == (5, 6, 7)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (4, 7), (29, 32), (None, 32)])
def test_task_14_the_length_is_limited_by_the_request_or_the_context(
    max_tokens: int | None, max_len: int
) -> None:
    """Oracle: by hand: 3 prompt tokens and the outputs, or all 32 of the context."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a", limits(max_tokens))
    assert manager.sequence("a").max_len == max_len


def test_task_14_without_parameters_there_are_the_usual_ones() -> None:
    """Oracle: by hand: `SamplingParams()` asks for 16 tokens, one completion."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a")
    assert manager.sequence("a").params == SamplingParams()
    assert manager.sequence("a").max_len == 19


@pytest.mark.parametrize("is_beam", [False, True])
def test_task_14_completions_and_beams_wait_as_one_sequence(is_beam: bool) -> None:
    """Oracle: by hand: three are a leader and two to come, known by all their ids."""
    manager = manager_of()
    manager.add_request([5, 6], "a", limits(n=3), beam_search=is_beam)
    assert ids(manager.waiting) == ["a/0"]
    leader = manager.sequence("a/0")
    assert (leader.request_id, leader.num_forks) == ("a", 2), "the leader of three has two to come"
    assert leader.is_beam is is_beam, "the leader's `is_beam` is the argument `beam_search`"
    assert manager.sequence("a/1") is manager.sequence("a/2") is leader


def test_task_14_a_salt_keeps_streams_apart() -> None:
    """Oracle: the docstring of `TokenBlocks`: another salt, another hash; the same one, the same."""
    manager = manager_of()
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        manager.add_request([5, 6], name, SamplingParams(max_tokens=4, cache_salt=salt))
    first = {name: manager.sequence(name).stream.parent(0) for name in "abc"}
    assert first["a"] != first["b"] == first["c"]
    assert manager.sequence("a").stream.block_size == 4


def test_task_14_an_empty_prompt_is_refused() -> None:
    """Oracle: the docstring; nothing changes."""
    manager = manager_of()
    with pytest.raises(ValueError):
        manager.add_request([], "a", limits())
    assert not manager.has_work


TOO_LARGE = {
    "context": (20, limits(13), False),
    "no_place_for_an_output": (32, limits(1), False),
    "prompt_alone": (40, limits(None), False),
    "seats": (2, limits(n=5), False),
    "pages": (14, limits(12), False),
    "pages_of_completions": (4, limits(17, n=2), False),
    "pages_of_beams": (4, limits(9, n=4), True),
}


@pytest.mark.parametrize(("length", "params", "is_beam"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_task_14_what_could_never_run_is_refused(length: int, params: SamplingParams, is_beam: bool) -> None:
    """Oracle: by hand, for 6 blocks of 4, 4 seats and a context of 32.

    26 tokens are 7 blocks; 21 tokens twice are 6 and 5, with one block shared; 13 tokens four times are
    4 and three times 3. Nothing changes: the id is free for a request that can run.
    """
    manager = manager_of(blocks=6)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * length, "a", params, beam_search=is_beam)
    assert not manager.has_work
    assert manager.add_request([1] * 12, "a", limits(12))
    assert ids(manager.waiting) == ["a"]


@pytest.mark.parametrize("is_beam", [False, True])
def test_task_14_more_completions_or_beams_than_run_at_once_are_refused(is_beam: bool) -> None:
    """Oracle: by hand: 2 sequences run at once, and 64 blocks are enough for any number of completions.

    Three would wait for ever. Two run.
    """
    manager = manager_of(blocks=64, seats=2)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1, 2], "a", limits(n=3), beam_search=is_beam)
    assert not manager.has_work
    assert manager.add_request([1, 2], "a", limits(n=2), beam_search=is_beam)


def test_task_14_a_request_that_is_wrong_in_two_ways_gets_the_first_error() -> None:
    """Oracle: the docstring's order: what `longest` refuses, then the id, then the blocks."""
    manager = manager_of(blocks=6)
    manager.add_request([1, 2], "a", limits())
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * 20, "a", limits(13))  # longer than the context of 32
    with pytest.raises(DuplicateRequestError):
        manager.add_request([1] * 14, "a", limits(12))  # 7 blocks, one more than there are
    assert ids(manager.waiting) == ["a"]


@pytest.mark.parametrize(
    ("name", "n"), [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b/0", 1), ("b/1", 1), ("c", 2)]
)
def test_task_14_an_id_in_use_is_refused(name: str, n: int) -> None:
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


class KeptByHand(NoPrefixSharing):
    """A prefix cache that keeps the blocks that a test gives it; the test says how many are idle."""

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


KEEPING = Policies(prefix=KeptByHand)


def keep_last(manager: PagedBatchManager, num_blocks: int, num_idle: int = 0) -> KeptByHand:
    """Let a manager's prefix cache keep the last blocks of the pool."""
    kept, allocator = manager.prefix, manager.allocator
    assert isinstance(kept, KeptByHand)
    all_blocks = sorted(allocator.allocate() for _ in range(allocator.num_free))
    for block in all_blocks[: len(all_blocks) - num_blocks]:
        allocator.free(block)
    kept.blocks, kept.num_idle = all_blocks[len(all_blocks) - num_blocks :], num_idle
    return kept


def test_task_15_an_unused_pool_halves_down_to_what_it_began_with() -> None:
    """Oracle: by hand: 20, 10, 5; the half of 5 is less than the 4 that it began with."""
    manager, sizes = manager_of(blocks=64, min_pages=4), []
    manager.allocator.resize(20)
    for _ in range(4):
        manager.shrink_pool()
        sizes.append(manager.allocator.num_blocks)
    assert sizes == [10, 5, 5, 5]


def test_task_15_a_pool_that_never_grows_never_shrinks() -> None:
    """Oracle: by hand: without `min_pages` it has all its blocks always. The half may be just `min_pages`."""
    manager = manager_of(blocks=64)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == 64
    manager = manager_of(blocks=64, min_pages=8)
    manager.allocator.resize(16)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == 8


IN_A_POOL_OF_16 = {  # held, idle ones among them; the size afterwards, and how many are held then
    "4_in_use_are_a_quarter": (4, 0, 16, 4),
    "3_in_use_are_less": (3, 0, 8, 3),
    "5_held_and_1_of_them_idle": (5, 1, 16, 5),
    "6_held_and_3_of_them_idle": (6, 3, 8, 6),
    "10_held_and_8_of_them_idle_so_2_go": (10, 8, 8, 8),
    "16_held_and_all_idle_so_8_go": (16, 16, 8, 8),
    "16_held_and_12_of_them_idle_are_a_quarter_in_use": (16, 12, 16, 16),
}


@pytest.mark.parametrize(("held", "idle", "size", "held_then"), IN_A_POOL_OF_16.values(), ids=IN_A_POOL_OF_16)
def test_task_15_idle_blocks_are_not_in_use_and_go_only_if_they_must(
    held: int, idle: int, size: int, held_then: int
) -> None:
    """Oracle: by hand, 16 blocks: 4 in use are a quarter, 3 are less; 8 held ones fit into the half."""
    case = f"a pool of 16 blocks, {held} held, {idle} of them idle, so {held - idle} in use"
    manager = PagedBatchManager(64, 4, 4, min_pages=2, policies=KEEPING)
    manager.allocator.resize(16)
    kept = keep_last(manager, held, idle)
    manager.shrink_pool()
    assert manager.allocator.num_blocks == size, f"{case}: the pool has another size now"
    assert len(kept.blocks) == held_then, f"{case}: another number of blocks is held now"
    assert len(set(kept.blocks)) == held_then, f"{case}: two of the held blocks became one"
    assert manager.allocator.num_free == size - held_then
    assert sum(counts(manager.allocator)) == held_then


def test_task_15_keys_and_values_move_with_the_blocks_that_are_held() -> None:
    """Oracle: what was in the last two of 16 blocks, in both layers; the pool has the new size too."""
    manager = with_model(min_pages=2, policies=KEEPING)
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
            np.array(found), want, err_msg="a held block has other keys or values after the pool was halved"
        )
