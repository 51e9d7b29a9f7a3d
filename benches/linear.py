"""How close are the linear layers to the processor's limit, and how does that change with the number of rows?

All matrices of the embedded model's blocks, packed as the engine packs them, times random rows. The limit,
which is measured in alternation, is what the processor's product instructions reach on registers, without
loads, unpacking or scales. No share can reach 100%: in each group of 32 inputs, a row and 16 outputs also
need four float operations, next to 8 product instructions (16 with 16-bit activations, on AVX-512).
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mlx.core as mx
from tiny_llm.linear import PackedLinear

import harness
import tiny_llm_kernels
from tiny_llm import LLM

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PEAK_ROUNDS = 400_000  # some milliseconds


def matrices(llm: LLM) -> list[PackedLinear]:
    """The packed matrices of all blocks."""
    found = []
    for layer in llm.model.layers:
        for part in (layer.self_attn, layer.mlp):
            found += [getattr(part, name) for name in MATRICES if hasattr(part, name)]
    assert all(isinstance(matrix, PackedLinear) for matrix in found)
    return found


def inputs_of(matrix: PackedLinear) -> int:
    """K: the matrix's number of inputs."""
    return int(matrix.packed.shape[1]) * 32


def multiply(layers: Sequence[PackedLinear], rows: int) -> tuple[float, int]:
    """Seconds to multiply `rows` rows with every matrix, and the operations that it takes."""
    xs = {k: mx.random.normal((rows, k)) for k in {inputs_of(matrix) for matrix in layers}}
    mx.eval(*xs.values())
    start = time.perf_counter()
    for matrix in layers:
        mx.eval(matrix(xs[inputs_of(matrix)]))
    seconds = time.perf_counter() - start
    return seconds, 2 * rows * sum(inputs_of(matrix) * matrix.out_features for matrix in layers)


def peak(bits: int) -> float:
    """Operations per second of the processor's product instructions, in all threads."""
    start = time.perf_counter()
    products = tiny_llm_kernels.integer_peak(bits, PEAK_ROUNDS)
    return 2 * products / (time.perf_counter() - start)


def measure(bits: int, repetitions: int) -> list[dict[str, Any]]:
    """For each number of rows: medians of the operations per second, the limit, and the share."""
    layers = matrices(LLM(activation_bits=bits, max_num_seqs=1))
    found = []
    for rows in ROWS:
        multiply(layers, rows), peak(bits)
        runs = []
        for _ in range(repetitions):
            before = peak(bits)
            seconds, operations = multiply(layers, rows)
            limit = (before + peak(bits)) / 2
            runs.append((operations / seconds, limit, operations / seconds / limit))
        ops, limit, share = map(median, zip(*runs, strict=True))
        found.append({"activation_bits": bits, "rows": rows, "ops_s": ops, "limit": limit, "share": share})
        harness.print_progress(f"{bits} bits, {rows} rows: {share:.0%} of the limit")
    return found


def main() -> None:
    """Print operations per second and the share of the limit, for 8 and 16 bits and 1 to 512 rows."""
    args = harness.parser(__doc__ or "").parse_args()
    found = [row for bits in (8, 16) for row in measure(bits, args.repetitions)]
    lines = ["activations   rows   Gop/s   limit   share"]
    lines += [
        f"{row['activation_bits']:>4} bits  {row['rows']:>7}  {row['ops_s'] / 1e9:>6.0f}  "
        f"{row['limit'] / 1e9:>6.0f}  {row['share']:>6.0%}"
        for row in found
    ]
    harness.show({"benchmark": "linear", "rows": found}, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
