"""Worker for llama.cpp's server: starts it with 16 slots and sends the jobs from 16 clients on 127.0.0.1."""

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
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """Send one request to the server and return its JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return dict(json.load(answer))


def wait_until_ready() -> None:
    """Wait until the model is loaded. Raises TimeoutError after about a minute."""
    for _ in range(600):
        try:
            ask("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError("llama-server did not become ready within a minute")


def run(job: Job) -> int:
    """Run the job with 16 clients; each sends its next request after an answer. Returns output tokens."""

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
