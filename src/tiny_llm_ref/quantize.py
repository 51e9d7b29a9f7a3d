"""Weights in a few bits: a value is scale * q + bias, and groups of values share a scale and a bias.

q is an integer of a few bits. The layout is MLX's: a row is one stream of bits in uint32 words, lowest bits
first; groups are along the input axis. The readable matmul unpacks the weights; the fast ones never do.
"""

import mlx.core as mx

from tiny_llm_checkpoints.quantized import Quantized

from .kernels import accelerated


def pack_bits(q: mx.array, bits: int) -> mx.array:
    """Write each row of q [N, K] uint32 as one stream of bits -> words [N, K * bits / 32] uint32.

    bits: 2, 3, 4, 5, 6 or 8; each number is below 2^bits, and 32 divides K * bits. Number i takes the bits
    i * bits .. i * bits + bits - 1 of its row, its lowest bit first. Bit b of a row is bit b % 32 of word
    b // 32, counted from the lowest. So with 3, 5 or 6 bits a number may be split over two words.

    MLX trap: keep every array uint32 (`mx.arange` takes a dtype). uint32 combined with int32 gives int64.

    >>> row = mx.array([[1, 2, 3, 4, 5, 6, 7, 8]], mx.uint32)
    >>> hex(pack_bits(row, 4).item())
    '0x87654321'
    """
    stream = (q[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1  # [N, K, bits], lowest bit first
    words = stream.reshape(q.shape[0], -1, 32) << mx.arange(32, dtype=mx.uint32)
    return mx.sum(words, axis=-1)


def unpack_bits(words: mx.array, bits: int) -> mx.array:
    """Read the numbers that `pack_bits` wrote: words [..., W] uint32 -> [..., W * 32 / bits] uint32.

    bits: 2, 3, 4, 5, 6 or 8. There may be any number of leading axes, including none: [W] is one row.

    MLX traps, if you read each number from two words: an index past the end of an array raises nothing and
    reads other memory, so keep the second word's index within the row, even for a number that has only one
    word. A shift by 32 does not give 0.

    >>> unpack_bits(mx.array([0x87654321], mx.uint32), 4).tolist()
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    first_bit = mx.arange(words.shape[-1] * 32 // bits, dtype=mx.uint32) * bits  # [K]
    word, shift = first_bit // 32, first_bit % 32
    low = words[..., word] >> shift
    next_word = mx.minimum(word + 1, words.shape[-1] - 1)
    high = mx.where(shift + bits > 32, words[..., next_word] << (32 - shift), 0)
    return (low | high) & ((1 << bits) - 1)


def quantize(w: mx.array, group_size: int, bits: int) -> Quantized:
    """Round w [N, K] to 2^bits equally spaced values in each group of `group_size` neighbours of a row.

    bits: 2, 3, 4, 5, 6 or 8; group_size divides K, and 32 divides K * bits. A group's bias is its smallest
    value, and its scale is the step (largest - smallest) / (2^bits - 1); both are stored in w's type. Each
    value becomes the q from 0 to 2^bits - 1 whose scale * q + bias is nearest to it, computed in float32 with
    the stored scale and bias. Because the stored step is rounded, the largest value may give q = 2^bits: clip
    it.

    A stored scale is never 0. If the values of a group are equal, the step is 0: store a scale of 1, and the
    values come back exactly. If they are nearly equal, a 16-bit type may round the step to 0: store 1 too.
    `Quantized.weight` holds the q as `pack_bits` writes them. (`mx.quantize` chooses other scales; the layout
    is the same.)

    >>> w = mx.array([[0.5 * (i % 16) - 3 for i in range(32)]])
    >>> stored = quantize(w, group_size=32, bits=4)
    >>> stored.scales.tolist(), stored.biases.tolist(), hex(stored.weight[0, 0].item())
    ([[0.5]], [[-3.0]], '0x76543210')
    """
    groups = w.reshape(w.shape[0], -1, group_size)
    biases = mx.min(groups, axis=-1)
    scales = (mx.max(groups, axis=-1) - biases) / (2**bits - 1)
    scales = mx.where(scales == 0, 1, scales).astype(w.dtype)
    wide, scale, bias = (x.astype(mx.float32) for x in (groups, scales[..., None], biases[..., None]))
    q = mx.clip(mx.round((wide - bias) / scale), 0, 2**bits - 1).astype(mx.uint32)
    return Quantized(pack_bits(q.reshape(w.shape), bits), scales, biases, group_size, bits)


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """Compute scale * q + bias for every q: weight [..., K * bits / 32] uint32 -> [..., K] float32.

    scales and biases [..., K / group_size] in any float type; value i uses those at index i // group_size.
    Convert them to float32 before you compute, not afterwards. bits: 2, 3, 4, 5, 6 or 8.

    >>> words, scales, biases = mx.array([[0x3210] * 4], mx.uint32), mx.array([[0.5]]), mx.array([[-1.0]])
    >>> dequantize(words, scales, biases, group_size=32, bits=4)[0, :5].tolist()
    [-1.0, -0.5, 0.0, 0.5, -1.0]
    """
    q = unpack_bits(weight, bits).astype(mx.float32)
    groups = q.reshape(*q.shape[:-1], -1, group_size)
    values = groups * scales[..., None].astype(mx.float32) + biases[..., None].astype(mx.float32)
    return values.reshape(q.shape)


def _fused(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


@accelerated(fused=_fused)
def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Multiply x [..., K] with the transpose of a quantized weight [N, K] -> [..., N].

    The weight has one row per output, as checkpoints store it; `scales`, `biases`, `group_size` and `bits`
    are those of `dequantize`. The result is float32 for float32 x. This readable version unpacks the whole
    matrix; the compiled one (this day's optional exercise in C++) never does.

    >>> w = quantize(mx.array([[float(i % 16) for i in range(32)]] * 2), group_size=32, bits=4)
    >>> quantized_matmul(mx.ones((1, 32)), *w).tolist()  # 2 * (0 + 1 + ... + 15), for each of two outputs
    [[240.0, 240.0]]
    """
    return x @ dequantize(weight, scales, biases, group_size, bits).T
