"""llama.cpp's server with 16 slots, and 16 clients of it, over 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protocol import Job, serve

SLOTS, CONTEXT = 16, 1024
model, threads, binary = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """One request to the server, and what it answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return dict(json.load(answer))


def wait_until_ready() -> None:
    """Until the model is loaded; the server must answer within a minute."""
    for _ in range(600):
        try:
            ask("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError("llama-server did not become ready within a minute")


def run(job: Job) -> int:
    """16 clients; each takes the next request when it has its answer."""

    def complete(prompt: list[int]) -> int:
        body = {"prompt": prompt, "n_predict": job.output_tokens, "ignore_eos": True, "temperature": 0}
        return int(str(ask("/completion", {**body, "cache_prompt": True})["tokens_predicted"]))

    with ThreadPoolExecutor(SLOTS) as clients:
        return sum(clients.map(complete, job.prompts))


port = free_port()
address = f"http://127.0.0.1:{port}"
libraries = os.pathsep.join([str(binary.parent), os.environ.get("LD_LIBRARY_PATH", "")])
lengths = ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", threads, "-tb", threads]
server = subprocess.Popen(
    [str(binary), "-m", model, "--host", "127.0.0.1", "--port", str(port), *lengths],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env={**os.environ, "LD_LIBRARY_PATH": libraries},
)
try:
    wait_until_ready()
    serve(str(ask("/props").get("build_info", "unknown")), run)
finally:
    server.terminate()
    server.wait()
