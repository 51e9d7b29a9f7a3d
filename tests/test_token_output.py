"""The most likely tokens at a position, as reported with `logprobs`."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.token_output import BLOCK, likeliest


@pytest.mark.parametrize("vocab_size", [1, 5, BLOCK, 3 * BLOCK, 20 * BLOCK + 7, 200 * BLOCK, 49_152])
@pytest.mark.parametrize("num_top", [0, 1, 2, 20, 130])
def test_the_likeliest_tokens_are_the_largest_logits_in_descending_order(
    vocab_size: int, num_top: int
) -> None:
    """Oracle: NumPy's sort. Half of the row is sorted, so that one block contains all its large values."""
    rng = np.random.default_rng(vocab_size + num_top)
    row = rng.permutation(vocab_size).astype(np.float32)
    row[: vocab_size // 2] = np.sort(row[: vocab_size // 2])
    expected = np.argsort(-row)[:num_top]
    assert likeliest(mx.array(row), num_top) == [(int(i), float(row[i])) for i in expected]


def test_tokens_with_equal_or_infinite_logits_are_each_returned_once() -> None:
    row = np.full(10 * BLOCK + 3, -np.inf, np.float32)
    row[::BLOCK] = 1.0
    found = likeliest(mx.array(row), 15)
    assert [value for _, value in found] == [1.0] * 11 + [-np.inf] * 4
    assert len({token for token, _ in found}) == 15
    assert all(row[token] == value for token, value in found)
