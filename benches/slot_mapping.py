"""What is a flat slot mapping worth? The keys of 1,000 tokens of one batch, gathered in four ways.

"token by token" asks the block table for every token, and reads that token alone. The others make one array
of slots and gather once: "slots, looped" by asking the tables for every token in Python, "slots, whole
blocks" by array arithmetic (`build_flat_slot_mapping`). "slots, kept" has them already, as every layer but
the first of a step has.

Expected: token by token is an operator for each token, and hundreds of times slower than one gather. To make
the slots costs more than to gather by them, which is why a step does it once. Asking for every token costs
about as much as the few operators on whole blocks while there are 1,000 tokens, and several times as much
with `--tokens 32000`.
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
    """A cache whose sequences grew in turns, so that nobody's blocks lie side by side; `tokens` in all."""
    draw = random.Random(0)
    lengths = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
    blocks = sum(-(-length // block_size) for length in lengths)
    cache = PagedKVCache(blocks, block_size, HEADS, HEAD_DIM, mx.float16)
    turns = [str(i) for i, length in enumerate(lengths) for _ in range(length)]
    draw.shuffle(turns)
    for seq_id in turns:
        cache.allocate(seq_id, 1)
    slots = mx.arange(blocks * block_size)
    noise = mx.random.normal((slots.size, HEADS, HEAD_DIM), key=mx.random.key(0))
    cache.pool.write(0, slots, noise, noise)
    return cache, [(str(i), length) for i, length in enumerate(lengths)]


class Ways:
    """The same gather, [tokens, HEADS, HEAD_DIM], in each way."""

    def __init__(self, cache: PagedKVCache, sequences: list[tuple[str, int]]) -> None:
        self.tables = [(cache.tables[seq_id], length) for seq_id, length in sequences]
        self.cache = cache
        self.sequences = sequences
        self.block_size = cache.pool.block_size
        keys, _ = cache.pool.read_blocks(0, range(cache.pool.num_blocks))
        self.blocks = keys  # [num_blocks, HEADS, block_size, HEAD_DIM]
        self.flat = keys.swapaxes(1, 2).reshape(-1, HEADS, HEAD_DIM)  # [slots, HEADS, HEAD_DIM]
        self.kept = cache.build_flat_slot_mapping(sequences)
        mx.eval(self.flat, self.kept)

    def by_name(self) -> dict[str, Callable[[], mx.array]]:
        """Each way as a function that gathers once."""
        return {
            "token by token": self.token_by_token,
            "slots, looped": lambda: self.flat[self.looped_slots()],
            "slots, whole blocks": lambda: self.flat[self.cache.build_flat_slot_mapping(self.sequences)],
            "slots, kept": lambda: self.flat[self.kept],
        }

    def token_by_token(self) -> mx.array:
        """One lookup and one read for every token."""
        rows = []
        for table, length in self.tables:
            for position in range(length):
                block, offset = table.blocks[position // self.block_size], position % self.block_size
                rows.append(self.blocks[block, :, offset])
        return mx.stack(rows)

    def looped_slots(self) -> mx.array:
        """The slots, one lookup for every token."""
        return mx.array([slot for table, length in self.tables for slot in table.slots(0, length)], mx.int32)


def evaluated(way: Callable[[], mx.array]) -> None:
    """Gather once, and wait for it."""
    mx.eval(way())


def main() -> None:
    """Print the median time of each way, timed in turns."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--tokens", type=int, default=1000, help="tokens in the batch (default: 1000)")
    options.add_argument("--sequences", type=int, default=8, help="sequences in the batch (default: 8)")
    options.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    options.set_defaults(repetitions=51)
    args = options.parse_args()
    ways = Ways(*scattered_batch(args.tokens, args.sequences, args.block_size)).by_name()
    expected = ways["slots, kept"]()
    for name, way in ways.items():  # the first round warms up, and all ways must agree
        assert mx.array_equal(way(), expected).item(), name
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repetitions):
        for name, way in ways.items():
            seconds[name].append(harness.timed(partial(evaluated, way)))
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
