"""What does paging cost attention? The same kernel over scattered blocks and over contiguous memory.

A decode step's attention with the embedded model's heads over float16 keys and values. In one case they are
in blocks of `--block-size` tokens in random order, in the other each sequence is one block as long as its
context. 8 layers run at once, each with its own memory, more than the processor's cache holds. The two cases
are measured in alternation; the figure is the median ratio of the pairs, with its 95% confidence interval.

Expected: within 3%, because a table costs one lookup for each block, and the kernel prefetches the next tile
while it works on one. Measured with blocks of 16: 7 to 23% slower, because the processor's prefetcher starts
anew after each contiguous range, and the keys of one head in a block are only 2 KiB. (The kernel of the
PagedAttention paper was 20 to 26% slower than contiguous attention.)
"""

import random
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx

import harness
import tiny_llm_kernels

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # the embedded model's
LAYERS = 8


class Attention:
    """Attention of one token for each of `sequences` sequences of `context` positions, in every layer."""

    def __init__(self, sequences: int, context: int, block_size: int) -> None:
        per_sequence = -(-context // block_size)
        blocks = list(range(sequences * per_sequence))
        random.Random(0).shuffle(blocks)
        tables = [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(sequences)]
        self.where = (
            mx.array(tables, mx.int32),
            mx.arange(sequences, dtype=mx.int32),
            mx.full(sequences, context - 1, dtype=mx.int32),
        )
        shape = (len(blocks), KV_HEADS, block_size, HEAD_DIM)
        self.q = mx.random.normal((1, HEADS, sequences, HEAD_DIM), key=mx.random.key(0))
        pools = tiny_llm_kernels.zeros(2 * LAYERS, shape, mx.float16)  # as the engine allocates them
        mx.eval(pools)
        all_blocks = mx.arange(len(blocks), dtype=mx.int32)
        for i, key in enumerate(mx.random.split(mx.random.key(1), len(pools))):
            filling = mx.random.normal(shape, key=key).astype(mx.float16)
            pools[i] = tiny_llm_kernels.copy_blocks(pools[i], all_blocks, all_blocks, filling)
        self.pools = list(zip(pools[::2], pools[1::2], strict=True))
        mx.eval(self.q, *self.where, *pools)

    def run(self) -> None:
        """Compute every layer once."""
        kernel = partial(tiny_llm_kernels.paged_attention, scale=HEAD_DIM**-0.5)
        mx.eval([kernel(self.q, keys, values, *self.where) for keys, values in self.pools])


def measure(sequences: int, context: int, block_size: int, pairs: int) -> dict[str, Any]:
    """Seconds per layer, paged and contiguous, and the median ratio of the pairs with its interval."""
    ways = Attention(sequences, context, block_size), Attention(sequences, context, context)
    for way in ways:
        way.run()
    seconds: tuple[list[float], list[float]] = [], []
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            seconds[which].append(harness.timed(ways[which].run) / LAYERS)
    ratios = [paged / contiguous for paged, contiguous in zip(*seconds, strict=True)]
    return {
        "sequences": sequences,
        "context": context,
        "block_size": block_size,
        "paged_s": median(seconds[0]),
        "contiguous_s": median(seconds[1]),
        "ratio": median(ratios),
        "interval": harness.interval(ratios),
    }


def main() -> None:
    """Print the ratio for one sequence, short and long, and for several."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=200)
    options.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    args = options.parse_args()
    jobs = [(1, 1024), (1, 8192), (16, 1024)]
    rows = [measure(*job, args.block_size, args.repetitions) for job in jobs]
    lines = [f"{'sequences':>9}{'context':>9}{'paged':>10}{'contiguous':>12}{'ratio':>8}  95% interval"]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"{row['sequences']:>9}{row['context']:>9}{row['paged_s'] * 1e6:>7.0f} us"
            f"{row['contiguous_s'] * 1e6:>9.0f} us{row['ratio']:>8.3f}  {low:.3f} to {high:.3f}"
        )
    result = {"benchmark": "contiguous", "pairs": args.repetitions, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
