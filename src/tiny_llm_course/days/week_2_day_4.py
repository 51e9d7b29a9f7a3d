"""Day 2.4: what `pdm run try` shows and `pdm run compare` times."""

from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from .shared import CAPITAL, Lines, Work, likeliest, random_array

if TYPE_CHECKING:
    from tiny_llm.linear import LinearLike
    from tiny_llm.model import Model

CHOICES = ((8, 32), (4, 32), (3, 32), (2, 32), (4, 64), (4, 192), (4, 576))  # bits and group size
FEWER = 3  # bits of the layers in the last line


def show() -> Lines:
    """Print size and error of quantized weights, and the likeliest tokens, also with fewer bits."""
    from tiny_llm.loader import load_model
    from tiny_llm.quantize import dequantize, quantize

    rows = load_model(None).model.embed_tokens.rows(mx.arange(4096))
    size = float(mx.sqrt(mx.mean(rows * rows)))
    yield f"4,096 rows of the embedding ({rows.nbytes / 2**20:.1f} MiB in float32), with scales and biases:"
    for bits, group_size in CHOICES:
        stored = quantize(rows.astype(mx.float16), group_size, bits)
        nbytes = sum(array.nbytes for array in stored[:3])
        error = dequantize(*stored) - rows
        share = float(mx.sqrt(mx.mean(error * error))) / size
        yield (
            f"  {bits} bits, groups of {group_size:3}: {8 * nbytes / rows.size:4.2f} bits per value, "
            f"RMS error {share:5.1%} of the values' RMS"
        )
    yield "with the layers as they are stored, in 4 bits:"
    yield from likeliest(CAPITAL, count=3)
    yield f"with the layers rounded to {FEWER} bits:"
    yield from likeliest(CAPITAL, _with_fewer_bits, count=3)


def _with_fewer_bits(model: "Model") -> "Model":
    """The model with the matrices of all layers rounded to `FEWER` bits, in groups of 32."""
    layers = []
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention = replace(
            attention, qkv_proj=_rounded(attention.qkv_proj), o_proj=_rounded(attention.o_proj)
        )
        mlp = replace(mlp, gate_up_proj=_rounded(mlp.gate_up_proj), down_proj=_rounded(mlp.down_proj))
        layers.append(replace(layer, self_attn=attention, mlp=mlp))
    return replace(model, layers=tuple(layers))


def _rounded(matrix: "LinearLike") -> "LinearLike":
    """A matrix with the values that `FEWER` bits can store."""
    from tiny_llm.linear import PackedLinear, QuantizedLinear, dense_linear
    from tiny_llm.quantize import dequantize, quantize
    from tiny_llm.stacked_linear import StackedLinear

    if isinstance(matrix, StackedLinear):  # as loaded with a quantized_matmul that is not the reference's
        return StackedLinear(tuple(map(_rounded, matrix.parts)))
    assert isinstance(matrix, PackedLinear | QuantizedLinear)
    outputs = matrix.out_features if isinstance(matrix, PackedLinear) else matrix.weight.shape[0]
    values = matrix.rows(mx.arange(outputs)).astype(mx.float16)
    return dense_linear(dequantize(*quantize(values, 32, FEWER)))


def work() -> Work:
    """A matrix [512, 576] stored in four bits, unpacked and multiplied with 4 rows."""
    from tiny_llm.quantize import quantize, quantized_matmul

    x, w = random_array(4, 576), random_array(512, 576)
    return lambda: quantized_matmul(x, *quantize(w, 32, 4))


def kernel_work() -> Work:
    """The compiled kernel: a matrix [1536, 576] in four bits times 48 rows."""
    from tiny_llm.kernels import compiled_kernel

    stored = mx.quantize(random_array(1536, 576), group_size=32, bits=4)
    packed = compiled_kernel("pack")(*stored, group_size=32, bits=4)
    x = random_array(48, 576)
    mx.eval(x, packed)
    return lambda: compiled_kernel("quantized_matmul")(x, packed, 1536, bits=4)
