"""How much faster is attention with a sliding window? A decode step and a prefill chunk by context length.

Runs only the paged attention kernel, with the embedded model's heads, alternately with and without a window;
several layers at once, each with its own blocks. Other memory is read before each run, as a model reads its
weights, so the processor's cache has no keys or values. "times" is the time without a window divided by the
time with one. It is predicted from the keys and values that the tokens see: without a window all positions up
to their own, with one the last `--window`.

Expected: the time grows with the context without a window, and stays constant with one. A decode step gains
less than predicted, because every call has a fixed cost. A chunk comes close to the prediction, because its
tokens share the tiles that they load, with and without a window.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

import harness
import tiny_llm_kernels

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # the embedded model's
CONTEXTS = [512, 1024, 2048, 4096, 8192, 16384]
OTHER_BYTES = 256 * 2**20  # more than a processor's cache holds


class Attention:
    """Attention of a context's last `tokens` tokens in each layer, over scattered float16 blocks."""

    def __init__(self, tokens: int, context: int, block_size: int, layers: int) -> None:
        num_blocks = -(-context // block_size)
        blocks = list(range(num_blocks))
        random.Random(0).shuffle(blocks)
        self.where = (
            mx.array([blocks], mx.int32),
            mx.zeros(tokens, mx.int32),
            mx.arange(context - tokens, context, dtype=mx.int32),
        )
        shape = (num_blocks, KV_HEADS, block_size, HEAD_DIM)
        self.q = mx.random.normal((1, HEADS, tokens, HEAD_DIM), key=mx.random.key(0))
        keys = mx.random.split(mx.random.key(1), 2 * layers)
        pools = [mx.random.normal(shape, key=key).astype(mx.float16) for key in keys]
        self.pools = list(zip(pools[::2], pools[1::2], strict=True))
        mx.eval(self.q, *self.where, *pools)

    def outputs(self, window: int | None) -> list[mx.array]:
        """Compute and return the output of each layer."""
        kernel = partial(tiny_llm_kernels.paged_attention, scale=HEAD_DIM**-0.5, window=window)
        made = [kernel(self.q, keys, values, *self.where) for keys, values in self.pools]
        mx.eval(made)
        return made


def positions_seen(tokens: int, context: int, window: int | None) -> int:
    """Positions that a context's last tokens see, summed; the bytes read are proportional to it."""
    return sum(min(position + 1, window or context) for position in range(context - tokens, context))


def read_other_memory(other: mx.array) -> None:
    """Evict the keys and values from the processor's cache."""
    mx.eval(other.sum())


def measure(tokens: int, context: int, args: Any) -> dict[str, Any]:
    """Seconds per layer without and with the window, timed alternately, and the predicted ratio."""
    attention = Attention(tokens, context, args.block_size, args.layers)
    ways: dict[str, Callable[[], object]] = {
        "all": lambda: attention.outputs(None),
        "window": lambda: attention.outputs(args.window),
    }
    same = all(map(mx.array_equal, attention.outputs(None), attention.outputs(args.window)))
    assert same == (context <= args.window), "only a window shorter than the context may change the output"
    other = mx.zeros(OTHER_BYTES // 4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repetitions):
        for name, way in ways.items():
            read_other_memory(other)
            seconds[name].append(harness.timed(way) / args.layers)
    pairs = zip(seconds["all"], seconds["window"], strict=True)
    seen = [positions_seen(tokens, context, window) for window in (None, args.window)]
    return {
        "tokens": tokens,
        "context": context,
        "seconds": {name: harness.summary(values) for name, values in seconds.items()},
        "times": harness.summary([whole / windowed for whole, windowed in pairs]),
        "predicted_times": seen[0] / seen[1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as text."""
    lines = [f"{'tokens':>8}{'context':>9}{'all':>12}{'window':>12}{'times':>8}{'predicted':>11}"]
    for row in rows:
        whole, windowed = (row["seconds"][name]["median"] * 1e6 for name in ("all", "window"))
        lines.append(
            f"{row['tokens']:8}{row['context']:9}{whole:9,.0f} us{windowed:9,.0f} us"
            f"{row['times']['median']:8.1f}{row['predicted_times']:11.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the time per layer of a decode step and of a prefill chunk, for each context."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--window", type=int, default=512, help="positions that a token sees (default: 512)")
    options.add_argument("--chunk", type=int, default=512, help="tokens of the prefill chunk (default: 512)")
    options.add_argument("--layers", type=int, default=8, help="layers computed at once (default: 8)")
    options.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    args = options.parse_args()
    rows = [measure(tokens, context, args) for tokens in (1, args.chunk) for context in CONTEXTS]
    result = {
        "benchmark": "windows",
        "window": args.window,
        "layers": args.layers,
        "block_size": args.block_size,
        "rows": rows,
    }
    harness.show(result, as_json=args.json, text=table(rows))


if __name__ == "__main__":
    main()
