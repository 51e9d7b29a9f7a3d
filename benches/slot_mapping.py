"""How much faster is a flat slot mapping? The keys of a batch of 1,000 tokens, gathered in four ways.

"token by token" looks up and reads one token at a time. The other ways build one array of slots and gather
once: "slots, looped" looks up every token in Python, "slots, whole blocks" uses array arithmetic
(`build_flat_slot_mapping`). "slots, reused" has the array already, like each layer of a step after the first.

Expected: token by token runs an operator for each token and is hundreds of times slower than one gather.
Building the slots costs more than gathering with them, which is why a step builds them once. For 1,000 tokens
looking up every token costs about as much as the few array operators; for `--tokens 32000` several times as
much.
"""

import random
from collections.abc import Callable
from functools import partial

import mlx.core as mx

import harness
from tiny_llm import PagedKVCache

HEADS, HEAD_DIM = 3, 64  # the embedded model's keys


def scattered_batch(
    tokens: int, sequences: int, block_size: int
) -> tuple[PagedKVCache, list[tuple[str, int]]]:
    """A cache with `tokens` tokens whose sequences grew alternately, so that their blocks are scattered."""
    draw = random.Random(0)
    lengths = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
    blocks = sum(-(-length // block_size) for length in lengths)
    cache = PagedKVCache(blocks, block_size, HEADS, HEAD_DIM, mx.float16)
    order = [str(i) for i, length in enumerate(lengths) for _ in range(length)]
    draw.shuffle(order)
    for seq_id in order:
        cache.allocate(seq_id, 1)
    slots = mx.arange(blocks * block_size)
    noise = mx.random.normal((slots.size, HEADS, HEAD_DIM), key=mx.random.key(0))
    cache.pool.write(0, slots, noise, noise)
    return cache, [(str(i), length) for i, length in enumerate(lengths)]


class Ways:
    """Four ways to gather the same keys, [tokens, HEADS, HEAD_DIM]."""

    def __init__(self, cache: PagedKVCache, sequences: list[tuple[str, int]]) -> None:
        self.tables = [(cache.tables[seq_id], length) for seq_id, length in sequences]
        self.cache = cache
        self.sequences = sequences
        self.block_size = cache.pool.block_size
        keys, _ = cache.pool.read_blocks(0, range(cache.pool.num_blocks))
        self.blocks = keys  # [num_blocks, HEADS, block_size, HEAD_DIM]
        self.flat = keys.swapaxes(1, 2).reshape(-1, HEADS, HEAD_DIM)  # [slots, HEADS, HEAD_DIM]
        self.slots = cache.build_flat_slot_mapping(sequences)
        mx.eval(self.flat, self.slots)

    def by_name(self) -> dict[str, Callable[[], mx.array]]:
        """Each way as a function that gathers once."""
        return {
            "token by token": self.token_by_token,
            "slots, looped": lambda: self.flat[self.looped_slots()],
            "slots, whole blocks": lambda: self.flat[self.cache.build_flat_slot_mapping(self.sequences)],
            "slots, reused": lambda: self.flat[self.slots],
        }

    def token_by_token(self) -> mx.array:
        """Look up and read one token at a time."""
        rows = []
        for table, length in self.tables:
            for position in range(length):
                block, offset = table.blocks[position // self.block_size], position % self.block_size
                rows.append(self.blocks[block, :, offset])
        return mx.stack(rows)

    def looped_slots(self) -> mx.array:
        """Build the slots with one lookup for every token."""
        return mx.array([slot for table, length in self.tables for slot in table.slots(0, length)], mx.int32)


def gather(way: Callable[[], mx.array]) -> None:
    """Gather once and evaluate the result."""
    mx.eval(way())


def main() -> None:
    """Print the median time of each way; the ways are timed in interleaved rounds."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--tokens", type=int, default=1000, help="tokens in the batch (default: 1000)")
    options.add_argument("--sequences", type=int, default=8, help="sequences in the batch (default: 8)")
    options.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    options.set_defaults(repetitions=51)
    args = options.parse_args()
    ways = Ways(*scattered_batch(args.tokens, args.sequences, args.block_size)).by_name()
    expected = ways["slots, reused"]()
    for name, way in ways.items():  # the first round warms up, and all ways must agree
        assert mx.array_equal(way(), expected).item(), name
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repetitions):
        for name, way in ways.items():
            seconds[name].append(harness.timed(partial(gather, way)))
    rows = {name: harness.summary(times) for name, times in seconds.items()}
    fastest = min(row["median"] for row in rows.values())
    text = "\n".join(
        f"{name:22}{row['median'] * 1e6:10,.0f} us{row['median'] / fastest:8.1f} x"
        for name, row in rows.items()
    )
    result = {
        "benchmark": "slot_mapping",
        "tokens": args.tokens,
        "sequences": args.sequences,
        "block_size": args.block_size,
        "rows": [{"way": name, "seconds": row} for name, row in rows.items()],
    }
    harness.show(result, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
