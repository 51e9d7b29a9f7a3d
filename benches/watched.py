"""What does it cost to be watched? A server's throughput with somebody on `/live`, and without.

The same jobs twice in each pair, in random order: 16 clients, prompts of 48 to 144 tokens, 32 to 96 out, none
of them kept. Whoever watches reads the stream in this process and throws it away: what a browser does with it
is not counted. Expected: a few per cent with a watcher, for the comparison of the pool before and after each
step and for JSON; nothing without one, because nothing is compared then.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import ours, running, some_load
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server

CLIENTS, REQUESTS = 16, 48


class Reader(threading.Thread):
    """Somebody who watches until he is told to stop, and counts what he reads."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0
        self.begins = threading.Event()
        self.ends = threading.Event()
        self._url = url

    def run(self) -> None:
        """Read."""
        with (
            httpx2.Client(base_url=self._url, timeout=None, trust_env=False) as client,
            client.stream("GET", "/live") as answer,
        ):
            for part in answer.iter_raw():
                self.num_bytes += len(part)
                self.begins.set()
                if self.ends.is_set():
                    return


@contextmanager
def watching(url: str, readers: int) -> Iterator[list[Reader]]:
    """So many watch."""
    crowd = [Reader(url) for _ in range(readers)]
    for reader in crowd:
        reader.start()
        reader.begins.wait(30)
    yield crowd
    for reader in crowd:
        reader.ends.set()


def throughput(url: str, seed: int, readers: int) -> tuple[float, int]:
    """Output tokens a second with so many readers, and the bytes that all of them read."""
    run = some_load(url, CLIENTS, REQUESTS, seed)
    with watching(url, readers) as crowd:
        figures: dict[str, Any] = measure_server(run, lambda *_: None)
        return figures["output_throughput"], sum(reader.num_bytes for reader in crowd)


def main() -> None:
    """Measure pairs."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--readers", type=harness.positive, default=1, help="who watch (default: 1)")
    args = options.parse_args()
    numbers = random.Random(0)
    pairs: list[dict[int, float]] = []
    num_bytes = 0
    server = ours("--max-num-seqs", str(CLIENTS), "--no-enable-prefix-caching")
    with running(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as here:
        for pair in range(args.repetitions + 1):
            measured = {}
            for readers in numbers.sample([0, args.readers], 2):
                measured[readers], read = throughput(here.url, pair, readers)
                num_bytes = max(num_bytes, read)
            pairs += [measured] if pair else []
    ratios = [pair[args.readers] / pair[0] for pair in pairs]
    plain = harness.summary([pair[0] for pair in pairs])
    watched = harness.summary([pair[args.readers] for pair in pairs])
    low, high = harness.interval(ratios)
    row = {
        "unwatched": plain,
        "watched": watched,
        "ratio": {**harness.summary(ratios), "interval": (low, high)},
        "mib_read": num_bytes / (1 << 20),
    }
    text = (
        f"{plain['median']:.1f} tok/s, watched by {args.readers} {watched['median']:.1f}: ratio "
        f"{harness.summary(ratios)['median']:.3f} ({low:.3f} to {high:.3f}); {row['mib_read']:.2f} MiB read"
    )
    harness.show({"benchmark": "watched", "row": row}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
