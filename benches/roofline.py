"""How close is the engine to the machine's limits: bytes per second in decode, operations in prefill?

NumPy measures the limits in alternation with the engine, with as many threads. Memory bandwidth: dot products
of arrays that are larger than any cache. Arithmetic: float32 matrix products. Decoding one stream must read
every weight once per token. Prefill multiplies every weight with every token; the kernels multiply 16-bit or
8-bit integers, of which a register holds more than floats, so they may exceed 100% of the float32 limit.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this file starts the threads; set before NumPy is loaded

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
from tiny_llm.linear import PackedLinear

import harness
import tiny_llm_kernels
from tiny_llm import LLM, SamplingParams

PREFILL, DECODE = 512, 64
READ_BYTES, MATRIX = 256 * 2**20, 768
INPUTS_PER_RECORD = 32


def limits() -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions that measure, over all threads: bytes read and float32 operations, per second."""
    threads = tiny_llm_kernels.num_threads()
    pool = ThreadPoolExecutor(threads)
    arrays = [np.ones(READ_BYTES // threads // 4, np.float32) for _ in range(threads)]
    matrices = [np.ones((MATRIX, MATRIX), np.float32) for _ in range(threads)]

    def together(work: Callable[[Any], object], values: Sequence[Any]) -> float:
        start = time.perf_counter()
        list(pool.map(work, values))
        return time.perf_counter() - start

    def read() -> float:
        return READ_BYTES / together(lambda array: np.dot(array, array), arrays)

    def multiply() -> float:
        operations = 2 * MATRIX**3 * threads
        return operations / together(lambda matrix: matrix @ matrix, matrices)

    return read, multiply


def weights_of(llm: LLM) -> tuple[int, int]:
    """Bytes of the weights that a decode step reads, and multiplications per token without the logits."""
    nbytes = products = 0
    for layer in llm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for matrix in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
            assert isinstance(matrix, PackedLinear)
            nbytes += matrix.packed.nbytes
            products += matrix.out_features * matrix.packed.shape[1] * INPUTS_PER_RECORD
    assert isinstance(llm.model.lm_head, PackedLinear)
    return nbytes + llm.model.lm_head.packed.nbytes, products


def decode_seconds(llm: LLM, token: int) -> float:
    """Seconds per decoded token after a short context."""
    params = SamplingParams(temperature=0, max_tokens=DECODE + 1, ignore_eos=True)
    moments = [time.perf_counter() for _ in llm.stream([token] * 4, params)]
    return (moments[-1] - moments[0]) / DECODE


def prefill_seconds(llm: LLM, seed: int) -> float:
    """Seconds of a prompt that is not in the prefix cache."""
    prompt = [1000 + (37 * i + 7919 * seed) % 30_000 for i in range(PREFILL)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, cache_salt=f"run {seed}")
    return harness.timed(lambda: list(llm.stream(prompt, params)))


def measure(bits: int, repetitions: int) -> dict[str, Any]:
    """Medians over the repetitions: the engine's figures, the limits, and the shares of the limits."""
    llm = LLM(activation_bits=bits, max_num_seqs=1)
    read, multiply = limits()
    nbytes, products = weights_of(llm)
    decode_seconds(llm, 1000), prefill_seconds(llm, 0)
    runs = []
    for i in range(1, repetitions + 1):
        reading, multiplying = read(), multiply()
        decode, prefill = (
            nbytes / decode_seconds(llm, 1000 + i),
            2 * products * PREFILL / prefill_seconds(llm, i),
        )
        reading, multiplying = (reading + read()) / 2, (multiplying + multiply()) / 2
        runs.append((decode, reading, decode / reading, prefill, multiplying, prefill / multiplying))
    names = ("decode_bytes_s", "read_limit", "of_read", "prefill_ops_s", "float32_limit", "of_float32")
    return {"activation_bits": bits, **dict(zip(names, map(median, zip(*runs, strict=True)), strict=True))}


def main() -> None:
    """Print the engine's figures and the limits."""
    args = harness.parser(__doc__ or "").parse_args()
    rows = [measure(bits, args.repetitions) for bits in (16, 8)]
    lines = [
        f"{row['activation_bits']:>2}-bit activations: decode reads {row['decode_bytes_s'] / 1e9:.1f} GB/s, "
        f"limit {row['read_limit'] / 1e9:.1f} GB/s ({row['of_read']:.0%}); prefill "
        f"{row['prefill_ops_s'] / 1e9:.0f} Gop/s, float32 limit {row['float32_limit'] / 1e9:.0f} Gop/s "
        f"({row['of_float32']:.0%})"
        for row in rows
    ]
    harness.show({"benchmark": "roofline", "rows": rows}, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
