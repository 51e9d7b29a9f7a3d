"""The compiled kernels reject invalid arguments with a ValueError that names the argument.

Every test runs for each instruction set of this processor.
"""

from collections.abc import Callable

import mlx.core as mx
import pytest

import tiny_llm_kernels as kernels
from kernel_inputs import isa

__all__ = ["isa"]

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_unavailable() or "")

Arguments = dict[str, object]


def valid_attention() -> Arguments:
    token = mx.zeros(3, mx.int32)
    return {
        "q": mx.zeros((1, 4, 3, 32)), "k": mx.zeros((1, 2, 3, 32)), "v": mx.zeros((1, 2, 3, 32)),
        "key_pool": mx.zeros((5, 2, 16, 32)), "value_pool": mx.zeros((5, 2, 16, 32)), "slots": token,
        "tables": mx.zeros((1, 2), mx.int32), "row_of_token": token, "positions": token, "scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": mx.zeros((1, 4, 3, 32), mx.float16)}, "q must be float32, got float16"),
        ({"q": mx.zeros((4, 3, 32))}, "q must have 4 axes"),
        ({"q": mx.zeros((2, 4, 3, 32))}, r"q must have shape \[1, H, T, D\]"),
        ({"q": mx.zeros((1, 5, 3, 32))}, "multiple of Hkv, got H = 5 and Hkv = 2"),
        ({"q": mx.zeros((1, 4, 3, 33))}, "even, from 2 to 512, got 33"),
        ({"q": mx.zeros((1, 4, 3, 514))}, "even, from 2 to 512, got 514"),
        ({"k": mx.zeros((1, 2, 4, 32))}, "k must have shape"),
        ({"v": mx.zeros((1, 1, 3, 32))}, "v must have shape"),
        ({"key_pool": mx.zeros((5, 2, 16, 32), mx.int32)}, "float32, float16 or bfloat16, got int32"),
        ({"key_pool": mx.zeros((5, 1, 16, 32))}, "key_pool must have shape"),
        ({"key_pool": mx.zeros((0, 2, 16, 32))}, "key_pool must not be empty"),
        ({"value_pool": mx.zeros((5, 2, 16, 32), mx.float16)}, "value_pool must be float32"),
        ({"value_pool": mx.zeros((6, 2, 16, 32))}, "value_pool must have the shape of key_pool"),
        ({"slots": mx.zeros(3)}, "slots must be int32"),
        ({"slots": mx.zeros(2, mx.int32)}, "slots must have shape"),
        ({"tables": mx.zeros(2, mx.int32)}, "tables must have 2 axes"),
        ({"row_of_token": mx.zeros(4, mx.int32)}, "row_of_token must have shape"),
        ({"positions": mx.zeros(3, mx.int64)}, "positions must be int32"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -7}, "window must be at least 1, got -7"),
    ],
)
def test_write_and_attend_rejects_invalid_arguments(wrong: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.write_and_attend(**(valid_attention() | wrong))


READING = ("q", "key_pool", "value_pool", "tables", "row_of_token", "positions", "scale")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": mx.zeros((1, 4, 3, 32), mx.float16)}, "q must be float32, got float16"),
        ({"q": mx.zeros((4, 3, 32))}, "q must have 4 axes"),
        ({"q": mx.zeros((2, 4, 3, 32))}, r"q must have shape \[1, H, T, D\]"),
        ({"q": mx.zeros((1, 5, 3, 32))}, "multiple of Hkv, got H = 5 and Hkv = 2"),
        ({"q": mx.zeros((1, 4, 3, 64))}, "key_pool must have shape"),
        ({"key_pool": mx.zeros((2, 16, 32))}, "key_pool must have 4 axes"),
        ({"value_pool": mx.zeros((5, 2, 16, 32), mx.float16)}, "value_pool must be float32"),
        ({"row_of_token": mx.zeros(4, mx.int32)}, "row_of_token must have shape"),
        ({"positions": mx.zeros(3, mx.int64)}, "positions must be int32"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -7}, "window must be at least 1, got -7"),
    ],
)
def test_paged_attention_rejects_invalid_arguments(wrong: Arguments, message: str) -> None:
    valid = {name: value for name, value in valid_attention().items() if name in READING}
    with pytest.raises(ValueError, match=message):
        kernels.paged_attention(**(valid | wrong))


def flash(q: tuple[int, ...], kv: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    k = mx.zeros(kv, dtype)
    return kernels.flash_attention(mx.zeros(q, dtype), k, k, 1.0, True)


WEIGHT, HALF = mx.zeros((16, 8), mx.uint32), mx.zeros((16, 2), mx.float16)
BLOB = mx.zeros((2, 1, 320), mx.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=48, bits=4), "group_size 48 is not supported"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=128, bits=4), "group_size 128 does not divide"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=64, bits=4), "scales must have shape"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=32, bits=7), "bits 7"),
        (lambda: flash((1, 3, 4, 8), (1, 2, 4, 8)), "q has 3 heads, expected a multiple of the 2"),
        (lambda: flash((1, 2, 5, 8), (1, 2, 4, 8)), "q has 5 rows, expected at most the 4 positions"),
        (lambda: flash((1, 2, 4, 8), (1, 2, 0, 8)), "k and v must have at least one position"),
        (lambda: flash((1, 2, 4, 8), (2, 2, 4, 8)), "k must have shape"),
        (lambda: flash((1, 2, 4, 8), (1, 2, 4, 8), mx.float16), "q must be float32"),
        (lambda: kernels.pack(WEIGHT.astype(mx.int32), HALF, HALF, group_size=32, bits=4), "weight must be"),
        (
            lambda: kernels.pack(WEIGHT, HALF.astype(mx.bfloat16), HALF, group_size=32, bits=4),
            "scales must be",
        ),
        (
            lambda: kernels.pack(WEIGHT, HALF.astype(mx.float32), HALF, group_size=32, bits=4),
            "biases must be float32",
        ),
        (lambda: kernels.pack(WEIGHT, HALF, HALF[:, :1], group_size=32, bits=4), "biases must have shape"),
        (lambda: kernels.pack(WEIGHT[:, :6], HALF, HALF, group_size=32, bits=4), "multiple of 4 words"),
        (lambda: kernels.pack(WEIGHT[0], HALF, HALF, group_size=32, bits=4), "weight must have 2 axes"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 20, bits=5), "bits 5"),
        (
            lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 20, bits=8),
            "packed must have 8-bit weights",
        ),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 33, bits=4), "out_features 33"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 16, bits=4), "out_features 16"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 64)), BLOB, 20, bits=4), "K = 32"),
        (
            lambda: kernels.quantized_matmul(mx.zeros((1, 32), mx.float16), BLOB, 20, bits=4),
            "x must be float32",
        ),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((4, 31))), "K = 31"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((4, 32), mx.int8)), "bfloat16, got int8"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32), mx.float16), mx.zeros((4, 32))), "x must be float32"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((0, 32))), "weight must not be empty"),
        (lambda: kernels.dequantize_rows(BLOB, mx.zeros(1), 32, bits=4), "ids must be int32"),
        (lambda: kernels.dequantize_rows(BLOB, mx.zeros(1, mx.int32), 64, bits=4), "in_features 64"),
        (lambda: kernels.rms_norm(mx.zeros((2, 8)), mx.zeros(9), 1e-5), "weight must have shape"),
        (lambda: kernels.rms_norm(mx.zeros((2, 8), mx.float16), mx.zeros(8), 1e-5), "x must be float32"),
        (lambda: kernels.rms_norm(mx.array(1.0), mx.zeros(1), 1e-5), "last axis"),
        (lambda: kernels.swiglu(mx.zeros((2, 8)), mx.zeros((2, 9))), "up must have the shape of gate"),
        (lambda: kernels.rope(mx.zeros((1, 1, 2, 7)), mx.zeros(2, mx.int32), mx.zeros(3)), "even last axis"),
        (
            lambda: kernels.rope(mx.zeros((1, 1, 2, 8)), mx.zeros(3, mx.int32), mx.zeros(4)),
            "positions must have",
        ),
        (
            lambda: kernels.rope(mx.zeros((1, 1, 2, 8)), mx.zeros(2, mx.int32), mx.zeros(3)),
            "inv_freq must have",
        ),
        (lambda: kernels.rope(mx.zeros((1, 2, 8)), mx.zeros(2, mx.int32), mx.zeros(4)), "x must have 4 axes"),
        (lambda: kernels.set_num_threads(0), "from 1 to 1024, got 0"),
        (lambda: kernels.integer_peak(4, 1), "activation_bits 4 is not supported"),
        (lambda: kernels.integer_peak(8, 0), "rounds must be at least 1, got 0"),
        (lambda: kernels.zeros(0, (2, 3), mx.float16), "count must be at least 1, got 0"),
        (lambda: kernels.stack_packed([]), "parts must not be empty"),
        (
            lambda: kernels.stack_packed([mx.zeros((1, 2, 320), mx.uint8), mx.zeros((1, 3, 320), mx.uint8)]),
            "parts must have shape .* got .1, 3, 320",
        ),
        (lambda: kernels.select_instruction_set("mmx"), "'mmx' is not supported here"),
    ],
)
def test_operators_reject_invalid_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
