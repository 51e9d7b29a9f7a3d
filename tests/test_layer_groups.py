"""Layers in groups of one size, and the maximum number of blocks in a group's table.

Oracles: groups written by hand, invariants of any division, and tables that grow step by step.
"""

import doctest
from itertools import pairwise

import pytest
import tiny_llm.layer_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.layer_groups import LayerGroup, group_layers, layers_per_block
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator

from tiny_model import examples

Windows = tuple[int | None, ...]
W = 512


def in_rows(windows: Windows) -> list[tuple[int | None, tuple[int, ...]]]:
    """Each group's window and its layers, in order."""
    return [(group.window, group.layers) for group in group_layers(windows)]


# ---- groups ----


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_layers_of_one_kind_form_one_group(window: int | None, num_layers: int) -> None:
    """Oracle: by hand."""
    assert in_rows((window,) * num_layers) == [(window, tuple(range(num_layers)))]


def test_gemma_3_270m_is_six_groups_of_three() -> None:
    """Oracle: its configuration: 18 layers, of which every sixth has full attention."""
    windows = ((W,) * 5 + (None,)) * 3
    assert in_rows(windows) == [
        (None, (5, 11, 17)),
        (W, (0, 1, 2)),
        (W, (3, 4, 6)),
        (W, (7, 8, 9)),
        (W, (10, 12, 13)),
        (W, (14, 15, 16)),
    ]
    assert layers_per_block(group_layers(windows)) == 3


def test_gemma_3_1b_leaves_two_places_of_its_last_group_empty() -> None:
    """Oracle: its configuration: 26 layers, 4 with full attention; 22 are five groups of 4 and 2 more."""
    windows = (((W,) * 5 + (None,)) * 5)[:26]
    groups = group_layers(windows)
    assert groups[0] == LayerGroup((5, 11, 17, 23))
    assert [len(group.layers) for group in groups] == [4, 4, 4, 4, 4, 4, 2]
    assert layers_per_block(groups) == 4


@pytest.mark.parametrize("num_layers", [2, 8, 26])
def test_alternating_layers_form_two_groups(num_layers: int) -> None:
    """Oracle: by hand."""
    odd, even = tuple(range(1, num_layers, 2)), tuple(range(0, num_layers, 2))
    assert in_rows((W, None) * (num_layers // 2)) == [(None, odd), (W, even)]


@pytest.mark.parametrize(
    ("num_full", "num_windowed", "sizes"),
    [
        (5, 6, [5, 6]),
        (6, 5, [6, 5]),
        (20, 24, [20, 24]),
        (2, 3, [2, 2, 1]),
        (3, 2, [2, 1, 2]),
        (1, 4, [1, 1, 1, 1, 1]),
    ],
)
def test_nearly_equal_kinds_leave_places_empty_instead_of_forming_many_groups(
    num_full: int, num_windowed: int, sizes: list[int]
) -> None:
    """Oracle: by hand: up to a quarter more of one kind is nearly equal."""
    groups = group_layers((None,) * num_full + (W,) * num_windowed)
    assert [len(group.layers) for group in groups] == sizes


@settings(max_examples=examples(200))
@given(st.lists(st.sampled_from([None, 4, 512, 4096]), min_size=1, max_size=60))
def test_every_layer_is_in_one_group_with_layers_of_the_same_window(windows: list[int | None]) -> None:
    """Oracle: invariants of any division; the last group of a kind may have fewer layers than the others."""
    groups = group_layers(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    for group in groups:
        assert group.layers
        assert {windows[layer] for layer in group.layers} == {group.window}
        assert list(group.layers) == sorted(group.layers)
    for one, two in pairwise(groups):
        if one.window == two.window:
            assert one.layers[-1] < two.layers[0]
            assert len(one.layers) == layers_per_block(groups)
    sees_all = [group.window is None for group in groups]
    assert sees_all == sorted(sees_all, reverse=True), "layers with full attention come first"
    assert len({group.window for group in groups}) == len(set(windows))


# ---- how many blocks ----


def peak(group: LayerGroup, num_tokens: int, block_size: int, most_at_once: int, first: int) -> int:
    """The most blocks that a table holds at any time, if it computes at full speed after its first step."""
    layout = PageLayout((group,), block_size, most_at_once)
    [table] = layout.tables(BlockAllocator(num_tokens))
    most = position = 0
    while position < num_tokens:
        count = min(most_at_once if position else first, num_tokens - position)
        table.append_tokens(count)
        position += count
        most = max(most, len(table.blocks))
        layout.release_passed([table], position)
    return most


@settings(max_examples=examples(300))
@given(
    window=st.none() | st.integers(1, 40),
    num_tokens=st.integers(1, 70),
    block_size=st.integers(1, 17),
    most_at_once=st.integers(1, 20),
)
def test_the_block_limit_of_a_group_is_the_worst_case_of_its_tables(
    window: int | None, num_tokens: int, block_size: int, most_at_once: int
) -> None:
    """Oracle: tables that grow in steps from any offset: none holds more, and one holds exactly as many."""
    group = LayerGroup((0,), window)
    held = [peak(group, num_tokens, block_size, most_at_once, first) for first in range(1, most_at_once + 1)]
    assert group.max_blocks(num_tokens, block_size, most_at_once) == max(held)


@settings(max_examples=examples(100))
@given(
    window=st.integers(1, 40),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    block_size=st.integers(1, 17),
)
def test_steps_of_any_sizes_stay_within_the_block_limit(
    window: int, chunks: list[int], block_size: int
) -> None:
    """Oracle: the blocks of the positions that a step's queries see, counted one by one."""
    group, position, most = LayerGroup((0,), window), 0, 0
    for chunk in chunks:
        seen = range(max(0, position - window + 1), position + chunk)
        most = max(most, len({seen_from // block_size for seen_from in seen}))
        position += chunk
    assert most <= group.max_blocks(position, block_size, max(chunks))


def test_a_window_limits_the_number_of_blocks_for_a_text_of_any_length() -> None:
    """Oracle: by hand: a step of 512 tokens and the 511 before it span at most 65 blocks of 16."""
    group = LayerGroup((0,), W)
    assert [group.max_blocks(n, 16, 512) for n in (1, 16, 17, 512, 1024, 1025, 10**6)] == [
        1,
        1,
        2,
        32,
        64,
        65,
        65,
    ]
    assert LayerGroup((0,)).max_blocks(10**6, 16, 512) == 62_500


def test_the_examples_in_docstrings_are_right() -> None:
    """Oracle: the results in the docstrings."""
    results = doctest.testmod(tiny_llm.layer_groups)
    assert results.attempted >= 2
    assert results.failed == 0
