"""What does the live page cost? A server's throughput with and without a client that reads `/live`.

Each pair runs the same jobs twice, in random order: 16 clients, prompts of 48 to 144 tokens, 32 to 96 tokens
out, prefix cache off. The reader of `/live` runs in this process and discards the stream; the work of a
browser is not measured. Expected: a few percent with a reader, for comparing the pool before and after each
step and for JSON; nothing without one, because then nothing is compared.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import random_load, run_server, tiny_llm_server
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server

CLIENTS, REQUESTS = 16, 48


class Reader(threading.Thread):
    """A thread that reads `/live` until it is stopped and counts the bytes."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0
        self.started = threading.Event()
        self.stopping = threading.Event()
        self._url = url

    def run(self) -> None:
        """Read the stream."""
        with (
            httpx2.Client(base_url=self._url, timeout=None, trust_env=False) as client,
            client.stream("GET", "/live") as answer,
        ):
            for part in answer.iter_raw():
                self.num_bytes += len(part)
                self.started.set()
                if self.stopping.is_set():
                    return


@contextmanager
def watching(url: str, readers: int) -> Iterator[list[Reader]]:
    """Run `readers` readers of `/live` while the context is active."""
    threads = [Reader(url) for _ in range(readers)]
    for reader in threads:
        reader.start()
        reader.started.wait(30)
    yield threads
    for reader in threads:
        reader.stopping.set()


def throughput(url: str, seed: int, readers: int) -> tuple[float, int]:
    """Output tokens per second with `readers` readers, and the bytes that they read together."""
    run = random_load(url, CLIENTS, REQUESTS, seed)
    with watching(url, readers) as threads:
        figures: dict[str, Any] = measure_server(run, lambda *_: None)
        return figures["output_throughput"], sum(reader.num_bytes for reader in threads)


def main() -> None:
    """Measure pairs of runs and print the ratio."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--readers", type=harness.positive, default=1, help="readers of /live (default: 1)")
    args = options.parse_args()
    numbers = random.Random(0)
    pairs: list[dict[int, float]] = []
    num_bytes = 0
    server = tiny_llm_server("--max-num-seqs", str(CLIENTS), "--no-enable-prefix-caching")
    with run_server(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as here:
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
        f"without a reader {plain['median']:.1f} tok/s, with {args.readers} {watched['median']:.1f} tok/s: "
        f"ratio {harness.summary(ratios)['median']:.3f} (95% interval {low:.3f} to {high:.3f}); "
        f"{row['mib_read']:.2f} MiB read from /live"
    )
    harness.show({"benchmark": "watched", "row": row}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
