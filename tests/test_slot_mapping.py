"""Slots: flat addresses of tokens. The oracle is the definition, block * block_size + offset."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.slot_mapping import slots


@given(st.integers(1, 17), st.integers(0, 60), st.data())
def test_a_slot_is_the_tokens_block_and_offset(block_size: int, num_tokens: int, data: st.DataObject) -> None:
    table = BlockTable(BlockAllocator(60), block_size)
    table.append_tokens(num_tokens)
    start = data.draw(st.integers(0, num_tokens))
    stop = data.draw(st.integers(start, num_tokens))
    blocks = table.physical_indices()
    expected = [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]
    assert slots(table, start, stop) == expected
    assert len(set(slots(table, 0, num_tokens))) == num_tokens


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 7), (7, 7)])
def test_positions_outside_the_table_have_no_slots(start: int, stop: int) -> None:
    table = BlockTable(BlockAllocator(4), 4)
    table.append_tokens(6)
    with pytest.raises(ValueError, match="the table's 6 tokens"):
        slots(table, start, stop)
