"""Converts ggml's quantized blocks to MLX's layout: the same numbers, packed in another order.

A block holds 32 values: a float16 scale d, in some types a float16 minimum m, then the values in 4, 5 or 8
bits. In Q4_K, 256 values share d and m, and each group of 32 has two integers that multiply them. MLX writes
every value as scale * q + bias with q >= 0. Source: ggml's quantization formats.
"""

from collections.abc import Callable

import mlx.core as mx

from .gguf_format import GGMLType
from .quantized import Quantized


def q4_0(blocks: mx.array) -> Quantized:
    """d * (q - 8): blocks [N, K/32, 2 + 16] uint8."""
    scales = _float16(blocks, 0)
    return Quantized(quants(blocks, 4), scales, -8 * scales, 32, 4)


def q4_1(blocks: mx.array) -> Quantized:
    """d * q + m: blocks [N, K/32, 2 + 2 + 16] uint8."""
    return Quantized(quants(blocks, 4), _float16(blocks, 0), _float16(blocks, 1), 32, 4)


def q5_0(blocks: mx.array) -> Quantized:
    """d * (q - 16): blocks [N, K/32, 2 + 4 + 16] uint8, with the fifth bits in 4 bytes; stored as 8 bits."""
    fifth = ((blocks[..., 2:6, None] >> mx.arange(8, dtype=mx.uint8)) & 1).reshape(*blocks.shape[:2], 32)
    values = mx.concatenate([blocks[..., 6:] & 0x0F, blocks[..., 6:] >> 4], axis=-1) | (fifth << 4)
    scales = _float16(blocks, 0)
    return Quantized(_words(values), scales, -16 * scales, 32, 8)


def q4_k(blocks: mx.array) -> Quantized:
    """d * s * q - m * t with 6-bit s and t per 32 values: blocks [N, K/256, 2 + 2 + 12 + 128] uint8.

    The scales d * s and biases -m * t need float32 to be exact.
    """
    first, second, rest = mx.split(blocks[..., 4:16], 3, axis=-1)  # [N, K/256, 4] each
    s = mx.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=-1)
    t = mx.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=-1)
    d, m = (_float16(blocks, place).astype(mx.float32)[..., None] for place in (0, 1))
    rows = blocks.shape[0]
    # 32 bytes hold one group of 32 values in their low halves and the next group in their high halves.
    chunks = blocks[..., 16:].reshape(rows, -1, 1, 32)
    values = mx.concatenate([chunks & 0x0F, chunks >> 4], axis=2)
    words = _words(values[..., 0::2] | (values[..., 1::2] << 4))
    return Quantized(words, (d * s).reshape(rows, -1), (-m * t).reshape(rows, -1), 32, 4)


def q8_0(blocks: mx.array) -> Quantized:
    """d * q with q from -128 to 127: blocks [N, K/32, 2 + 32] uint8."""
    scales = _float16(blocks, 0)
    return Quantized(quants(blocks, 8), scales, -128 * scales, 32, 8)


QUANTIZED: dict[str, Callable[[mx.array], Quantized]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q4_K": q4_k,
    "Q5_0": q5_0,
    "Q8_0": q8_0,
}


def dequantized(rows: mx.array, kind: GGMLType) -> mx.array:
    """Dequantize a type that is not in `QUANTIZED`: rows [N, bytes] -> [N, K] float16. Uses ggml's `gguf`."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # values beyond float16's range become infinite, without a warning
        values = dequantize(np.array(rows), GGMLQuantizationType[kind.name])
        return mx.array(values.astype(np.float16))


def quants(blocks: mx.array, bits: int) -> mx.array:
    """Reorder the values as MLX packs them: blocks [N, K/32, bytes] uint8 -> [N, K * bits / 32] uint32.

    8 bits: two's complement + 128. 4 bits: in ggml, byte i has value i in its low and value i + 16 in its
    high half; in MLX, byte i has values 2i and 2i + 1.
    """
    if _compiled():
        import tiny_llm_kernels

        return tiny_llm_kernels.ggml_quants(blocks, bits=bits)
    return readable_quants(blocks, bits)


def readable_quants(blocks: mx.array, bits: int) -> mx.array:
    """`quants` in MLX operators: the kernel's oracle, and the implementation on other devices."""
    values = blocks[..., -4 * bits :]
    if bits == 8:
        values = values ^ 0x80
    else:
        both = mx.concatenate([values & 0x0F, values >> 4], axis=-1)  # [N, K/32, 32]
        values = both[..., 0::2] | (both[..., 1::2] << 4)
    return _words(values)


def _compiled() -> bool:
    """True if the compiled kernels are usable: they are built, and MLX's default device is the CPU."""
    import tiny_llm_kernels

    return mx.default_device() == mx.Device(mx.cpu) and tiny_llm_kernels.available()


def _words(values: mx.array) -> mx.array:
    """Pack bytes [N, ...], already in MLX's order, into [N, words per row] uint32."""
    return mx.contiguous(values).reshape(values.shape[0], -1).view(mx.uint32)


def _float16(blocks: mx.array, place: int) -> mx.array:
    """The float16 number `place` of every block: [N, K/32]."""
    return mx.contiguous(blocks.view(mx.float16)[..., place])
