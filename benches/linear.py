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

BITS = (8, 16)
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PEAK_ROUNDS = 8_000_000  # about 20 ms: the threads may have to wake up first


def matrices(llm: LLM) -> list[list[PackedLinear]]:
    """The packed matrices of each block."""
    blocks = []
    for layer in llm.model.layers:
        parts = (layer.self_attn, layer.mlp)
        blocks.append([getattr(part, name) for part in parts for name in MATRICES if hasattr(part, name)])
        assert all(isinstance(matrix, PackedLinear) for matrix in blocks[-1])
    return blocks


def inputs_of(matrix: PackedLinear) -> int:
    """K: the matrix's number of inputs."""
    return int(matrix.packed.shape[1]) * 32


def multiply(blocks: Sequence[Sequence[PackedLinear]], rows: int) -> tuple[float, int]:
    """Seconds to multiply `rows` rows with every matrix, and the operations that it takes."""
    every = [matrix for block in blocks for matrix in block]
    xs = {k: mx.random.normal((rows, k)) for k in {inputs_of(matrix) for matrix in every}}
    mx.eval(*xs.values())
    start = time.perf_counter()
    for block in blocks:
        mx.eval([matrix(xs[inputs_of(matrix)]) for matrix in block])
    seconds = time.perf_counter() - start
    return seconds, 2 * rows * sum(inputs_of(matrix) * matrix.out_features for matrix in every)


def peak(bits: int) -> float:
    """Operations per second of the processor's product instructions, in all threads."""
    start = time.perf_counter()
    products = tiny_llm_kernels.integer_peak(bits, PEAK_ROUNDS)
    return 2 * products / (time.perf_counter() - start)


def measure(
    blocks: Sequence[Sequence[PackedLinear]], bits: int, rows: int, repetitions: int
) -> dict[str, float]:
    """The median of the operations per second, the largest of the limit, and their ratio."""
    multiply(blocks, rows)
    ops, limits = [], [peak(bits)]
    for _ in range(repetitions):
        seconds, operations = multiply(blocks, rows)
        ops.append(operations / seconds)
        limits.append(peak(bits))
    return {"ops_s": median(ops), "limit": max(limits), "share": median(ops) / max(limits)}


def main() -> None:
    """Print operations per second and the share of the limit, for 8 and 16 bits and 1 to 512 rows."""
    args = harness.parser(__doc__ or "").parse_args()
    models = {bits: LLM(activation_bits=bits, max_num_seqs=1) for bits in BITS}
    blocks = {bits: matrices(model) for bits, model in models.items()}
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        harness.print_progress(f"{rows} rows")
        by_bits = {f"bits_{bits}": measure(blocks[bits], bits, rows, args.repetitions) for bits in BITS}
        found.append({"rows": rows, **by_bits})
    lines = [
        "         8-bit activations         16-bit activations",
        "rows   Gop/s   limit   share     Gop/s   limit   share",
    ]
    lines += [f"{row['rows']:>4}" + "  ".join(shown(row[f"bits_{bits}"]) for bits in BITS) for row in found]
    harness.show({"benchmark": "linear", "rows": found}, as_json=args.json, text="\n".join(lines))


def shown(found: dict[str, float]) -> str:
    """One measurement as three columns."""
    return f"{found['ops_s'] / 1e9:>8.0f}{found['limit'] / 1e9:>8.0f}{found['share']:>8.0%}"


if __name__ == "__main__":
    main()
