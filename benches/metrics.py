"""What does /metrics show while a server has enough memory, while its pool is full, and while requests queue?

Three servers get the same load, one after the other: 48 requests from 16 clients, prompts of 112 to 208
tokens, of which the first 64 are common, 32 to 96 tokens out. `/metrics` is read several times a second. The
servers have the default options, a pool of 96 blocks, and 4 slots (`--max-num-seqs`).

Printed: what the second server's `/metrics` had in the middle of the run, without buckets and comments, and a
table of all three: gauges as means over the readings and at their highest, counters at the last reading, and
times as means of all requests.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from threading import Event, Thread
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import RunningServer, random_load, run_server, tiny_llm_server
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server

CLIENTS, REQUESTS, COMMON = 16, 48, 64  # the last: tokens of the common prefix
SECONDS = 0.2  # between two readings
SERVERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "96 blocks": ("--num-blocks", "96"),
    "4 slots": ("--max-num-seqs", "4"),
}
SHOWN = "96 blocks"  # the server whose metrics are printed in full
HIDDEN = ("_bucket", "_created")
SHARES = ("KV usage, mean", "KV usage, most", "prefix hits")


class Readings:
    """Reads a server's metrics again and again, in a thread, inside a `with` block. texts: what it read."""

    def __init__(self, server: RunningServer) -> None:
        self.texts: list[str] = []
        self._url = f"{server.url}/metrics"
        self._ended = Event()
        self._thread = Thread(target=self._read)

    def __enter__(self) -> "Readings":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        with httpx2.Client(trust_env=False) as client:
            while not self._ended.wait(SECONDS):
                self.texts.append(client.get(self._url).text)


def samples(text: str) -> Iterator[str]:
    """The lines of a reading that are the engine's, without buckets and comments."""
    for line in text.splitlines():
        if line.startswith("vllm:") and not line.partition("{")[0].endswith(HIDDEN):
            yield line


def values(text: str) -> dict[str, float]:
    """The numbers of a reading by name; metrics with several labels are left out."""
    found = {}
    for line in samples(text):
        name, _, rest = line.removeprefix("vllm:").partition("{")
        labels, _, value = rest.rpartition("} ")
        if "," not in labels:
            found[name] = float(value)
    return found


def figures(texts: Sequence[str]) -> dict[str, float]:
    """What an operator sees of a run."""
    found = [values(text) for text in texts]
    last = found[-1]

    def gauge(name: str) -> list[float]:
        return [one[name] for one in found]

    def mean(name: str) -> float:
        return last[f"{name}_sum"] / max(1, last[f"{name}_count"])

    return {
        "running, mean": fmean(gauge("num_requests_running")),
        "waiting, mean": fmean(gauge("num_requests_waiting")),
        "waiting, most": max(gauge("num_requests_waiting")),
        "KV usage, mean": fmean(gauge("kv_cache_usage_perc")),
        "KV usage, most": max(gauge("kv_cache_usage_perc")),
        "preemptions": last["num_preemptions_total"],
        "prefix hits": last["prefix_cache_hits_total"] / max(1, last["prefix_cache_queries_total"]),
        "tokens a step": mean("iteration_tokens_total"),
        "queue time, ms": 1e3 * mean("request_queue_time_seconds"),
        "TTFT, ms": 1e3 * mean("time_to_first_token_seconds"),
        "ITL, ms": 1e3 * mean("inter_token_latency_seconds"),
    }


def read(name: str) -> list[str]:
    """Start a server, send the load, and return what its `/metrics` said meanwhile."""
    server = tiny_llm_server("--served-model-name", "smollm2", *SERVERS[name])
    with run_server(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as running:
        load = random_load(running.url, CLIENTS, REQUESTS, seed=0)
        with Readings(running) as readings:
            measure_server(load._replace(random_prefix_len=COMMON), lambda *_: None)
    return readings.texts


def as_text(texts: dict[str, list[str]]) -> str:
    """One server's lines, then the table of all servers."""
    rows = {name: figures(found) for name, found in texts.items()}
    middle = texts[SHOWN][len(texts[SHOWN]) // 2]
    lines = [*samples(middle), "", f"{'':16}" + "".join(f"{name:>12}" for name in rows)]
    for figure in rows[SHOWN]:
        kind = ".0%" if figure in SHARES else ",.0f"
        lines.append(f"{figure:16}" + "".join(f"{row[figure]:>12{kind}}" for row in rows.values()))
    return "\n".join(lines)


def main() -> None:
    """Read the metrics of all servers under load, and print them."""
    args = harness.parser(__doc__ or "").parse_args()
    texts: dict[str, list[str]] = {}
    for name in SERVERS:
        harness.print_progress(f"tiny-llm serve, {name}")
        texts[name] = read(name)
    rows: dict[str, Any] = {name: figures(found) for name, found in texts.items()}
    harness.show({"benchmark": "metrics", "rows": rows}, as_json=args.json, text=as_text(texts))


if __name__ == "__main__":
    main()
