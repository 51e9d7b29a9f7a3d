"""What does /metrics show while a server has enough memory, while its pool is full, and while requests queue?

Three servers get the same load, one after the other: 48 requests from 16 clients, prompts of 112 to 208
tokens, of which the first 64 are common, 32 to 96 tokens out. When half of them are answered, `/metrics` is
read. The servers have the default options, a pool of 96 blocks, and 4 slots (`--max-num-seqs`).

Printed: what the second server's `/metrics` has, without buckets and comments, and a table of all three.
"""

from collections.abc import Iterator
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import random_load, run_server, tiny_llm_server
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server

CLIENTS, REQUESTS, COMMON = 16, 48, 64  # the last: tokens of the common prefix
SERVERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "96 blocks": ("--num-blocks", "96"),
    "4 slots": ("--max-num-seqs", "4"),
}
SHOWN = "96 blocks"  # the server whose metrics are printed in full
HIDDEN = ("_bucket", "_created")


def samples(text: str) -> Iterator[str]:
    """The lines of a scrape that are the engine's, without buckets and comments."""
    for line in text.splitlines():
        if line.startswith("vllm:") and not line.partition("{")[0].endswith(HIDDEN):
            yield line


def values(text: str) -> dict[str, float]:
    """The numbers of a scrape by name; metrics with several labels are left out."""
    found = {}
    for line in samples(text):
        name, _, rest = line.removeprefix("vllm:").partition("{")
        labels, _, value = rest.rpartition("} ")
        if "," not in labels:
            found[name] = float(value)
    return found


def figures(found: dict[str, float]) -> dict[str, float]:
    """What an operator reads from a scrape; times are means in milliseconds since the server started."""

    def mean(name: str) -> float:
        return found[f"{name}_sum"] / max(1, found[f"{name}_count"])

    return {
        "running": found["num_requests_running"],
        "waiting": found["num_requests_waiting"],
        "KV usage": found["kv_cache_usage_perc"],
        "preemptions": found["num_preemptions_total"],
        "prefix hits": found["prefix_cache_hits_total"] / max(1, found["prefix_cache_queries_total"]),
        "tokens a step": mean("iteration_tokens_total"),
        "queue ms": 1e3 * mean("request_queue_time_seconds"),
        "TTFT ms": 1e3 * mean("time_to_first_token_seconds"),
        "ITL ms": 1e3 * mean("inter_token_latency_seconds"),
    }


def scraped(name: str) -> str:
    """Start a server, send the load, and return its metrics when half of the requests are answered."""
    found: list[str] = []
    server = tiny_llm_server("--served-model-name", "smollm2", *SERVERS[name])
    with run_server(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as running:

        def scrape(_: str, ended: int, total: int) -> None:
            if ended == total // 2:
                found.append(httpx2.get(f"{running.url}/metrics", trust_env=False).text)

        load = random_load(running.url, CLIENTS, REQUESTS, seed=0)
        measure_server(load._replace(random_prefix_len=COMMON), scrape)
    return found[0]


def as_text(texts: dict[str, str]) -> str:
    """One server's lines, then the table of all servers."""
    rows = {name: figures(values(text)) for name, text in texts.items()}
    lines = [*samples(texts[SHOWN]), "", f"{'':16}" + "".join(f"{name:>12}" for name in rows)]
    for figure in rows[SHOWN]:
        kind = ".0%" if figure in ("KV usage", "prefix hits") else ",.0f"
        lines.append(f"{figure:16}" + "".join(f"{row[figure]:>12{kind}}" for row in rows.values()))
    return "\n".join(lines)


def main() -> None:
    """Read the metrics of all servers under load, and print them."""
    args = harness.parser(__doc__ or "").parse_args()
    texts: dict[str, str] = {}
    for name in SERVERS:
        harness.print_progress(f"tiny-llm serve, {name}")
        texts[name] = scraped(name)
    rows: dict[str, Any] = {name: figures(values(text)) for name, text in texts.items()}
    harness.show({"benchmark": "metrics", "rows": rows}, as_json=args.json, text=as_text(texts))


if __name__ == "__main__":
    main()
