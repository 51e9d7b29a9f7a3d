"""KVPool: the only holder of the pool's arrays; reads return copies, and a write costs one token's bytes."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.kernels import twins
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import PagedContext, Span, pack_batch
from tiny_llm.sampling_params import SamplingParams

from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_model import random_prompt, tiny_config, tiny_model

BLOCK = 4


def pool_of(num_blocks: int, config: ModelConfig | None = None) -> KVPool:
    return KVPool.for_model(config or tiny_config(), num_blocks, BLOCK, mx.float32)


def write(pool: KVPool, table: BlockTable, start: int, stop: int, value: float, layer: int = 0) -> None:
    """Store `value` for the positions start .. stop - 1, lazily: `pool.evaluate` must follow."""
    context = PagedContext(pool, pack_batch([Span(table, start, stop)]), 1.0, None)
    fresh = mx.full((1, 2, stop - start, 32), value)
    context.attend(layer, mx.zeros((1, 4, stop - start, 32)), fresh, fresh + 0.5)


def filled(pool: KVPool, tokens: int, value: float) -> BlockTable:
    table = BlockTable(BlockAllocator(pool.num_blocks), BLOCK)
    table.append_tokens(tokens)
    for layer in range(2):
        write(pool, table, 0, tokens, value, layer)
    pool.evaluate()
    return table


def test_the_bytes_of_a_pool_are_those_of_its_tokens() -> None:
    assert pool_of(3).nbytes == 3 * BLOCK * tiny_config().kv_bytes_per_token(4)


def test_a_read_returns_what_was_written() -> None:
    pool = pool_of(3)
    table = filled(pool, 6, 7.0)
    keys, values = pool.read_blocks(1, table.blocks)
    assert keys.shape == (2, 2, BLOCK, 32)
    assert mx.all(keys[0] == 7.0).item()
    assert mx.all(values[1, :, :2] == 7.5).item()
    assert mx.all(keys[1, :, 2:] == 0.0).item(), "nothing was written after the last token"


def test_blocks_are_copied_in_every_layer_as_if_all_were_read_first() -> None:
    pool = pool_of(3)
    table = filled(pool, 3 * BLOCK, 0.0)
    for i, _ in enumerate(table.blocks):
        for layer in range(2):
            write(pool, table, i * BLOCK, (i + 1) * BLOCK, 10.0 * layer + i, layer)
            pool.evaluate()
    a, b, c = table.blocks
    pool.copy_blocks([BlockCopy(a, b, BLOCK), BlockCopy(b, c, 2)])
    for layer in range(2):
        keys, values = pool.read_blocks(layer, [a, b, c])
        assert keys[:2].tolist() == mx.full(keys[:2].shape, 10.0 * layer).tolist()
        assert mx.all(keys[2, :, :2] == 10.0 * layer + 1).item(), "b was read before a was written to it"
        assert mx.all(values[2, :, :2] == 10.0 * layer + 1.5).item()


def test_an_empty_copy_changes_nothing() -> None:
    pool = pool_of(2)
    pool.copy_blocks([])
    assert mx.all(pool.read_blocks(0, [0, 1])[0] == 0).item()


@pytest.mark.parametrize("readable", [True, False])
def test_a_later_write_does_not_change_what_was_read(readable: bool) -> None:
    """The copy is evaluated at the read; a lazy one would silently show the later write."""
    with twins() if readable else mx.stream(mx.cpu):
        pool = pool_of(2)
        table = filled(pool, BLOCK, 1.0)
        keys, values = pool.read_blocks(0, table.blocks)
        derived = keys * 2  # lazy, on top of the copy
        write(pool, table, 0, BLOCK, 9.0)
        pool.evaluate()
    assert mx.all(derived == 2.0).item()
    assert mx.all(keys == 1.0).item()
    assert mx.all(values == 1.5).item()
    assert mx.all(pool.read_blocks(0, table.blocks)[0] == 9.0).item()


@pytest.mark.parametrize("readable", [True, False])
def test_a_read_sees_an_earlier_write_that_is_not_evaluated(readable: bool) -> None:
    with twins() if readable else mx.stream(mx.cpu):
        pool = pool_of(2)
        table = filled(pool, BLOCK, 1.0)
        write(pool, table, 0, 1, 9.0)
        keys, _ = pool.read_blocks(0, table.blocks)
    assert keys[0, 0, :, 0].tolist() == [9.0, 1.0, 1.0, 1.0]


def test_two_writes_of_one_evaluation_happen_in_order() -> None:
    pool = pool_of(2)
    table = filled(pool, BLOCK, 1.0)
    write(pool, table, 0, 2, 5.0)
    write(pool, table, 1, 3, 6.0)
    pool.evaluate()
    assert pool.read_blocks(0, table.blocks)[0][0, 0, :, 0].tolist() == [5.0, 6.0, 6.0, 1.0]


def test_a_copy_waits_for_an_unevaluated_write() -> None:
    pool = pool_of(2)
    table = filled(pool, BLOCK, 1.0)
    [source] = table.blocks
    write(pool, table, 0, BLOCK, 3.0)
    pool.copy_blocks([BlockCopy(source, 1 - source, BLOCK)])
    assert mx.all(pool.read_blocks(0, [1 - source])[0] == 3.0).item()


def test_a_step_does_not_copy_the_pool() -> None:
    """Prefill, fork, copy on write and decode: peak memory stays within the pool's size and a little."""
    manager = PagedBatchManager(8000, 16, 4, model=tiny_model())
    assert manager.pool is not None
    manager.add_request(random_prompt(40, 1), "a", SamplingParams(n=3, max_tokens=20))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(5):
        logits = manager.process_batch()
        manager.commit({seq_id: int(np.argmax(np.array(row))) for seq_id, row in logits.items()})
    one_array = manager.pool.nbytes / 4
    assert mx.get_peak_memory() - before < one_array / 4, "an array of the pool was copied"
    assert mx.get_active_memory() - before < one_array / 4


def test_tokens_are_written_and_read_by_slot() -> None:
    pool = KVPool(3, BLOCK, num_heads=2, head_dim=5, num_layers=2, dtype=mx.float32)
    slots = mx.array([9, 0, 6])
    keys = mx.random.normal((3, 2, 5), key=mx.random.key(1))
    pool.write(1, slots, keys, keys + 1)
    assert [array.tolist() for array in pool.read(1, slots)] == [keys.tolist(), (keys + 1).tolist()]
    blocks, _ = pool.read_blocks(1, [2, 0, 1])
    assert [blocks[0, :, 1].tolist(), blocks[1, :, 0].tolist(), blocks[2, :, 2].tolist()] == keys.tolist()
    assert mx.sum(mx.any(blocks != 0, axis=(1, 3))).item() == 3, "only three slots were written"
    assert not mx.any(pool.read_blocks(0, [0, 1, 2])[0]).item(), "the other layer is untouched"
