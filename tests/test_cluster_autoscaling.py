"""Ray Serve adds a replica under load and removes it after the load; no stream is cut.

Oracle: the answer of `tiny_llm.LLM` in this process.
"""

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx2 as httpx
import pytest

from ray_cluster import command, running_nodes
from served import SECONDS, until
from tiny_llm import LLM, SamplingParams

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the group `cluster` is not installed"
    ),
]
SCALE_SECONDS = 300.0  # Ray starts a process, which loads the model
PROMPT, LENGTH = "Once upon a time", 24
CONFIG = """\
engine: {{num_blocks: 2048, max_num_seqs: 8, generation_config: vllm}}
cluster:
  autoscaling_config:
    {{min_replicas: 1, max_replicas: 2, target_ongoing_requests: 4, metrics_interval_s: 5,
     {delays}}}
  ray_actor_options: {{num_cpus: 1}}
  threads: 1
  report_period: 0.2
  grace: 300
ingress: {{ray_actor_options: {{num_cpus: 0}}}}
http: {{port: {port}}}
"""


class Server:
    """A client of the deployment, and what it has read of streams, by their names."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=SCALE_SECONDS, trust_env=False)
        self.texts: dict[str, str] = {}
        self.ends: dict[str, str] = {}  # finish reasons, or errors

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def answer(self) -> str:
        """The answer to the prompt."""
        body = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
        return str(self._client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    def read(self, name: str, tokens: int, is_over: threading.Event | None = None) -> None:
        """Read a stream to its end, or until the event is set."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        self.texts[name] = ""
        with self._client.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if is_over is not None and is_over.is_set():
                    return
                with suppress(ValueError):
                    event = json.loads(line.removeprefix("data: "))
                    choice = (
                        event["choices"][0] if "choices" in event else {"finish_reason": line, "text": ""}
                    )
                    self.texts[name] += choice["text"]
                    if choice["finish_reason"]:
                        self.ends[name] = choice["finish_reason"]

    def running(self) -> dict[str, float]:
        """How many sequences run on each replica, by its name."""
        text = self._client.get("/metrics").text
        found = re.findall(r'^vllm:num_requests_running\{.*replica="(\w+)".*\} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A deployment that has one replica."""
    config = tmp_path / "cluster.yaml"
    with running_nodes() as nodes:
        [port, _] = nodes.ports
        config.write_text(
            CONFIG.format(
                port=port, delays="upscale_delay_s: 1, downscale_delay_s: 10, look_back_period_s: 10"
            )
        )
        done = command(nodes, str(config), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["deployments"]["replicas"] == {"RUNNING": 1}
        with closing(Server(f"http://127.0.0.1:{port}")) as server:
            yield server


def test_a_replica_comes_with_the_load_and_goes_after_it_without_cutting_a_stream(server: Server) -> None:
    is_over = threading.Event()
    with LLM(num_blocks=64, generation_config="vllm") as llm:
        params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
        expected = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text

    load = [threading.Thread(target=server.read, args=(f"load {i}", 6000, is_over)) for i in range(6)]
    for thread in load:
        thread.start()
    until(lambda: len(server.running()) == 2, SCALE_SECONDS)
    for _ in range(4):  # the new replica has less to do, so it gets some
        assert server.answer() == expected
    is_over.set()
    for thread in load:
        thread.join(SECONDS)
    until(lambda: sum(server.running().values()) == 0, SECONDS)

    is_over = threading.Event()
    last = [threading.Thread(target=server.read, args=(name, 8000, is_over)) for name in ("one", "another")]
    for thread in last:  # one for each replica; with two shared streams, Serve wants one replica
        thread.start()
        until(lambda: sum(server.running().values()) == 1 + last.index(thread), SECONDS)  # noqa: B023
    assert sorted(server.running().values()) == [1, 1]
    until(lambda: len(server.running()) == 1, SCALE_SECONDS)
    seen = {name: len(server.texts[name]) for name in ("one", "another")}
    until(lambda: all(len(server.texts[name]) > seen[name] + 200 for name in seen), SECONDS)
    assert server.ends == {}  # the other replica stops, but its stream goes on
    is_over.set()
    for thread in last:
        thread.join(SECONDS)
    one, another = sorted((server.texts["one"], server.texts["another"]), key=len)
    assert another.startswith(one)
    assert server.answer() == expected
