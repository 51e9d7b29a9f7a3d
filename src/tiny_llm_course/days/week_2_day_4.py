"""Day 2.4: what `pdm run try` shows and `pdm run compare` times."""

import mlx.core as mx

from .shared import CAPITAL, Lines, Work, likeliest, random_array


def show() -> Lines:
    """Print size and error of quantized weights, and a quantized model's likeliest tokens."""
    from tiny_llm.loader import load_model
    from tiny_llm.quantize import dequantize, quantize

    rows = load_model(None).model.embed_tokens.rows(mx.arange(4096))
    size = float(mx.sqrt(mx.mean(rows * rows)))
    yield f"{rows.shape[0]:,} rows of the embedding, {rows.nbytes / 2**20:.1f} MiB in float32, groups of 32"
    for bits in (8, 4, 3, 2):
        stored = quantize(rows.astype(mx.float16), 32, bits)
        nbytes = sum(array.nbytes for array in stored[:3])
        error = dequantize(*stored) - rows
        yield (
            f"  {bits} bits: {8 * nbytes / rows.size:4.1f} bits per value with scales and biases; RMS error "
            f"{float(mx.sqrt(mx.mean(error * error))) / size:.1%} of the values' RMS"
        )
    yield from likeliest(CAPITAL)


def work() -> Work:
    """A matrix [512, 576] stored in four bits, unpacked and multiplied with 4 rows."""
    from tiny_llm.quantize import quantize, quantized_matmul

    x, w = random_array(4, 576), random_array(512, 576)
    return lambda: quantized_matmul(x, *quantize(w, 32, 4))
