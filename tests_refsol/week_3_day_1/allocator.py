"""Day 3.1, tasks 1 and 2: blocks are allocated, shared and freed."""

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.errors import DoubleFreeError, OutOfBlocksError, UnknownBlockError
from tiny_llm.paged_attention import BlockAllocator

from common.blocks import counts
from common.examples import quick

# Task 1: BlockAllocator.allocate


class Watched:
    """A container that counts how many of its items are looked at; a search counts as a look at each."""

    num_looked_at = 0

    def __getitem__(self, place: Any) -> Any:
        self.num_looked_at += 1 if isinstance(place, int) else len(self)  # type: ignore[arg-type]
        return super().__getitem__(place)  # type: ignore[misc]

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():  # type: ignore[misc]
            self.num_looked_at += 1
            yield item

    def search(self, item: object, name: str) -> Any:
        """Call the method of that name, which looks at every item."""
        self.num_looked_at += len(self)  # type: ignore[arg-type]
        return getattr(super(), name)(item)

    def __contains__(self, item: object) -> bool:
        return bool(self.search(item, "__contains__"))

    def index(self, item: object) -> Any:
        return self.search(item, "index")

    def count(self, item: object) -> Any:
        return self.search(item, "count")

    def remove(self, item: object) -> None:
        self.search(item, "remove")


class WatchedDeque(Watched, deque[int]):
    """A watched queue of ids."""


class WatchedList(Watched, list[int]):
    """A watched list, of counts or of ids."""


def watch(allocator: BlockAllocator) -> list[Watched]:
    """Replace the allocator's queues and lists by watched ones, and return those."""
    watched: dict[str, Watched] = {}
    for name, value in vars(allocator).items():
        if isinstance(value, deque):
            watched[name] = WatchedDeque(value)
        elif isinstance(value, list):
            watched[name] = WatchedList(value)
    vars(allocator).update(watched)
    return list(watched.values())


def check_no_search(watched: list[Watched], num_calls: int, what: str) -> None:
    """Assert that a call has looked at a few ids and counts on average, however large the pool is."""
    mean = sum(one.num_looked_at for one in watched) / num_calls
    assert mean <= 10, (
        f"with {num_calls} blocks, a call of {what} looks at {mean:.0f} free ids and counts on average: "
        "it must not search, because a search takes longer in a larger pool"
    )


def test_task_1_every_block_is_allocated_once() -> None:
    """Oracle: by hand: the pool has the ids 0 to 4. Their order is the allocator's choice."""
    allocator = BlockAllocator(5)
    taken = [allocator.allocate() for _ in range(5)]
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_task_1_an_allocated_block_has_one_reference() -> None:
    """Oracle: by hand."""
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    assert allocator.ref_count(block) == 1
    assert sorted(counts(allocator)) == [0, 0, 1]
    assert allocator.num_free == 2


def test_task_1_an_exhausted_pool_raises_out_of_blocks_and_changes_nothing() -> None:
    """Oracle: the docstring: OutOfBlocksError, not an error of the container of free ids."""
    allocator = BlockAllocator(2)
    allocator.allocate()
    allocator.allocate()
    for _ in range(2):
        with pytest.raises(OutOfBlocksError):
            allocator.allocate()
    assert allocator.num_free == 0
    assert counts(allocator) == [1, 1]


def test_task_1_pools_are_independent() -> None:
    """Oracle: by hand."""
    first, second = BlockAllocator(2), BlockAllocator(2)
    first.allocate()
    assert (first.num_free, second.num_free) == (1, 2)


def test_task_1_a_shared_block_is_not_allocated_again() -> None:
    """Oracle: by hand: the other three blocks are free."""
    allocator = BlockAllocator(4)
    shared = allocator.allocate()
    allocator.add_ref(shared)
    assert sorted([shared, *(allocator.allocate() for _ in range(3))]) == [0, 1, 2, 3]
    with pytest.raises(OutOfBlocksError):
        allocator.allocate()


def test_task_1_allocate_does_not_search_the_pool() -> None:
    """Oracle: counting: the free ids and the counts that all 400 calls look at, at most 10 each.

    Common mistake: looking for the smallest free id, or for a count of 0.
    """
    allocator = BlockAllocator(400)
    watched = watch(allocator)
    taken = [allocator.allocate() for _ in range(400)]
    check_no_search(watched, 400, "`allocate`")
    assert len(set(taken)) == 400


# Task 2: BlockAllocator.free


def test_task_2_a_freed_block_can_be_allocated_again() -> None:
    """Oracle: by hand: it is the only free block, and its reference count starts at 1."""
    allocator = BlockAllocator(3)
    taken = [allocator.allocate() for _ in range(3)]
    allocator.free(taken[1])
    assert (allocator.num_free, allocator.ref_count(taken[1])) == (1, 0)
    assert allocator.allocate() == taken[1]
    assert counts(allocator) == [1, 1, 1]


def test_task_2_a_shared_block_is_free_after_its_last_reference() -> None:
    """Oracle: by hand: three references are freed one by one. Common mistake: free after the first."""
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.add_ref(block)
    allocator.add_ref(block)
    seen = []
    for _ in range(3):
        allocator.free(block)
        seen.append((allocator.ref_count(block), allocator.num_free))
    assert seen == [(2, 1), (1, 1), (0, 2)]
    assert sorted([allocator.allocate(), allocator.allocate()]) == [0, 1]


def test_task_2_a_free_block_cannot_be_freed() -> None:
    """Oracle: the docstring. Common mistake: a block that is in the free list twice gets two owners."""
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    allocator.free(block)
    for free in (block, 0, 1, 2):
        with pytest.raises(DoubleFreeError):
            allocator.free(free)
    assert counts(allocator) == [0, 0, 0]
    assert allocator.num_free == 3
    assert sorted(allocator.allocate() for _ in range(3)) == [0, 1, 2]
    with pytest.raises(OutOfBlocksError):
        allocator.allocate()


def test_task_2_free_does_not_search_the_pool() -> None:
    """Oracle: counting, as for `allocate`. Common mistake: looking for the id among the free ones."""
    allocator = BlockAllocator(400)
    taken = [allocator.allocate() for _ in range(400)]
    watched = watch(allocator)
    for block in taken:
        allocator.free(block)
    check_no_search(watched, 400, "`free`")
    assert allocator.num_free == 400


@pytest.mark.parametrize("block", [-1, -3, 3, 100])
def test_task_2_a_block_id_outside_the_pool_cannot_be_freed(block: int) -> None:
    """Oracle: the docstring: all blocks stay allocated."""
    allocator = BlockAllocator(3)
    for _ in range(3):
        allocator.allocate()
    with pytest.raises(UnknownBlockError):
        allocator.free(block)
    assert counts(allocator) == [1, 1, 1]
    assert allocator.num_free == 0


@quick
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["allocate", "add_ref", "free"]), st.integers(-2, 7)), max_size=40),
)
def test_task_2_reference_counts_match_a_counter(num_blocks: int, calls: list[tuple[str, int]]) -> None:
    """Oracle: a Counter: each call changes it in the same way or raises the documented error."""
    allocator, held = BlockAllocator(num_blocks), Counter[int]()
    for name, block in calls:
        if name == "allocate":
            if all(held[b] for b in range(num_blocks)):
                with pytest.raises(OutOfBlocksError):
                    allocator.allocate()
            else:
                taken = allocator.allocate()
                assert held[taken] == 0, "the block was already allocated"
                held[taken] += 1
        elif held[block]:
            getattr(allocator, name)(block)
            held[block] += 1 if name == "add_ref" else -1
        else:
            with pytest.raises(DoubleFreeError if 0 <= block < num_blocks else UnknownBlockError):
                getattr(allocator, name)(block)
        assert counts(allocator) == [held[b] for b in range(num_blocks)]
        assert allocator.num_free == counts(allocator).count(0)
