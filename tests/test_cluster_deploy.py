"""`tiny-llm serve-cluster` on a Ray cluster of two nodes, which this file starts on this machine.

Oracles: the answers of `tiny_llm.LLM` in this process, and of the replicas before a restart.
"""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest

from ray_cluster import COMMAND_SECONDS, Nodes, command, free_ports, running_nodes, started
from served import SECONDS, until
from tiny_llm import LLM, SamplingParams

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the group `cluster` is not installed"
    ),
]
MISSING = "tiny-llm does not run on this cluster"
KEY = "key-of-a-client"
PROMPT = "Once upon a time"
STREAMS, LEAVING = 8, 6  # two replicas run 4 each
CONFIG = """\
engine: {{num_blocks: 256, max_num_seqs: 4, generation_config: vllm}}
server: {{api_key_file: keys.txt, served_model_name: the-model}}
cluster: {{num_replicas: 2, threads: 1, ray_actor_options: {{num_cpus: 1}}, report_period: 0.2, grace: 300}}
ingress: {{num_replicas: 2, ray_actor_options: {{num_cpus: 0}}, max_replicas_per_node: 1}}
http: {{port: {port}}}
"""
SHOW = """
import ray
from ray import serve
from ray.serve.context import _get_global_client

ray.init(address="auto", log_to_driver=False)
print(serve.status(), _get_global_client().get_serve_details())
"""
SHOW_NODES = """
import ray
from ray.serve.context import _get_global_client

ray.init(address="auto", log_to_driver=False)
ingress = _get_global_client().get_serve_details()["applications"]["tiny-llm"]["deployments"]["ingress"]
print(*(replica["node_id"] for replica in ingress["replicas"]))
"""


class Deployed(NamedTuple):
    """A deployment. status: what the command printed. log: what it wrote to standard error."""

    nodes: Nodes
    config: Path
    status: dict[str, Any]
    log: str

    def client(self, node: int = 0, key: str = KEY) -> httpx.Client:
        """A client of one node's proxy; it sends the key."""
        url, headers = f"http://127.0.0.1:{self.nodes.ports[node]}", {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=url, headers=headers, timeout=SECONDS, trust_env=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def deployed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A deployment; stopping it is tested too, at the end."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "keys.txt").write_text(f"{KEY}\n")
    (folder / "keys.txt").chmod(0o600)
    config = folder / "cluster.yaml"
    config.write_text(CONFIG.format(port=nodes.ports[0]))
    early = command(nodes, str(config), "--restart")
    assert (early.returncode, early.stderr) == (1, f"tiny-llm: error: {MISSING}\n")
    done = command(nodes, str(config), "--json")
    assert done.returncode == 0, done.stderr
    running = Deployed(nodes, config, json.loads(done.stdout), done.stderr)
    yield running
    done = command(nodes, "--stop")
    assert (done.returncode, done.stdout) == (0, "Stopped\n")
    with running.client() as client, pytest.raises(httpx.TransportError):
        client.get("/health")
    again = command(nodes, "--stop")
    assert (again.returncode, again.stderr) == (1, f"tiny-llm: error: {MISSING}\n")


def replicas_of(deployed: Deployed) -> set[str]:
    """The names of the replicas in one ingress's metrics."""
    with deployed.client() as client:
        text = client.get("/metrics").text
    return set(re.findall(r'vllm:num_requests_running\{.*replica="(\w+)"\}', text))


def printed_by(program: str, deployed: Deployed) -> subprocess.CompletedProcess[str]:
    """Run a program in the cluster's environment."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=deployed.nodes.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=COMMAND_SECONDS,
    )


def test_the_command_says_what_runs_and_where(deployed: Deployed) -> None:
    assert deployed.status["status"] == "RUNNING"
    assert deployed.status["deployments"] == {"replicas": {"RUNNING": 2}, "ingress": {"RUNNING": 2}}
    assert deployed.status["addresses"] == [f"http://127.0.0.1:{deployed.nodes.ports[0]}"]
    assert "replicas: 2 running; ingress: 2 running" in deployed.log


def test_no_key_is_in_a_log_or_in_what_serve_shows(deployed: Deployed) -> None:
    with deployed.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/completions", json={"prompt": 1.5}).status_code == 400
    assert KEY not in json.dumps(deployed.status) + deployed.log
    shown = printed_by(SHOW, deployed)
    assert "replicas" in shown.stdout
    assert KEY not in shown.stdout + shown.stderr
    logs = [file for file in deployed.nodes.folder.rglob("*") if file.suffix in (".log", ".err", ".out")]
    texts = [file.read_bytes() for file in logs if file.is_file()]
    assert any(b"the-model is ready" in text for text in texts)  # the log of an ingress
    assert not any(KEY.encode() in text for text in texts)


@pytest.mark.parametrize("node", [0, 1])
def test_each_node_answers_like_the_engine_in_one_process(deployed: Deployed, node: int) -> None:
    llm = LLM(num_blocks=64, max_num_seqs=1, generation_config="vllm")
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text
    body = {"model": "the-model", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    with deployed.client(node) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ready"})
        answer = client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == expected
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["text"] for one in events[:-1]) == expected


def test_a_client_that_leaves_ends_no_other_stream(deployed: Deployed) -> None:
    """The first clients have opened the streams in which the events of the others come."""
    body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "temperature": 0, "stream": True}

    def finish_reasons(lines: Iterator[str]) -> list[Any]:
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert all("error" not in event for event in events), events
        return [choice["finish_reason"] for event in events for choice in event["choices"]]

    with ExitStack() as stack, ThreadPoolExecutor(STREAMS) as pool:
        client = stack.enter_context(deployed.client())
        opened = []
        for _ in range(STREAMS):
            answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
            lines = answer.iter_lines()
            next(lines)  # its first token
            opened.append((answer, lines))
        for answer, _ in opened[:LEAVING]:
            answer.close()
        found = list(pool.map(finish_reasons, [lines for _, lines in opened[LEAVING:]]))
    assert [reasons[-1] for reasons in found] == ["length"] * (STREAMS - LEAVING)


def test_requests_need_a_key_of_the_file(deployed: Deployed) -> None:
    with deployed.client(key="another") as client:
        answer = client.post("/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == 401


def test_the_metrics_have_the_figures_of_both_replicas(deployed: Deployed) -> None:
    until(lambda: len(replicas_of(deployed)) == 2)


def test_the_ingresses_are_on_different_nodes(deployed: Deployed) -> None:
    """`max_replicas_per_node` is 1."""
    shown = printed_by(SHOW_NODES, deployed)
    assert len(set(shown.stdout.splitlines()[-1].split())) == 2


@pytest.mark.parametrize("node", [0, 1])
def test_the_metrics_of_each_node_count_the_requests_of_all_ingresses(deployed: Deployed, node: int) -> None:
    def ask() -> None:
        for which in (0, 1) * 8:  # each proxy chooses an ingress
            with deployed.client(which) as client:
                body = {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200

    def finished() -> Counter[str]:
        """Completions that ended by `length`, by their ingress; not of all if one is slow to answer."""
        with deployed.client(node) as client:
            found = re.findall(
                r'^vllm:request_success_total\{finished_reason="length",ingress="(\w+)".*\} (\S+)$',
                client.get("/metrics").text,
                re.MULTILINE,
            )
        return Counter({ingress: int(float(value)) for ingress, value in found})

    def both() -> Counter[str]:
        """What both ingresses have finished."""
        counts = finished()
        while len(counts) < 2:
            assert monotonic() < end, counts
            counts = finished()
        return counts

    end = monotonic() + SECONDS
    ask()
    before = both()
    ask()
    until(lambda: (both() - before).total() == 16)
    assert len(both() - before) == 2, "one ingress has taken all requests"


def test_a_restart_replaces_all_replicas_and_no_stream_is_cut(deployed: Deployed) -> None:
    before = replicas_of(deployed)
    body = {"prompt": PROMPT, "max_tokens": 2500, "temperature": 0, "ignore_eos": True, "stream": True}
    ends: list[list[str]] = []
    begun = threading.Barrier(3)

    def read(node: int) -> None:
        with deployed.client(node) as client, client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            begun.wait(SECONDS)
            ends.append([line for line in [first, *lines] if line][-2:])

    readers = [threading.Thread(target=read, args=(node,)) for node in (0, 1)]
    for reader in readers:
        reader.start()
    begun.wait(SECONDS)
    restarting = started(deployed.nodes, str(deployed.config), "--restart")
    assert restarting.stderr is not None
    log = [next(restarting.stderr)]
    while "stopping" not in log[-1]:
        log.append(next(restarting.stderr))
    assert ends == []  # both streams run while their replicas are replaced
    out, rest = restarting.communicate(timeout=COMMAND_SECONDS)
    for reader in readers:
        reader.join(SECONDS)
    assert restarting.returncode == 0, [*log, rest]
    assert f"http://127.0.0.1:{deployed.nodes.ports[0]}" in out
    assert [end[1] for end in ends] == ["data: [DONE]"] * 2
    assert all('"finish_reason":"length"' in end[0] for end in ends)
    until(lambda: len(replicas_of(deployed)) == 2 and not replicas_of(deployed) & before)


def test_http_cannot_change_while_it_runs(deployed: Deployed, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(f"http: {{port: {free_ports(1)[0]}}}")
    done = command(deployed.nodes, str(config))
    assert done.returncode == 1
    assert f"listens on 127.0.0.1, port {deployed.nodes.ports[0]} already" in done.stderr


def test_missing_processors_are_named(deployed: Deployed, tmp_path: Path) -> None:
    """Comes after the tests of the deployment, whose processes it stops."""
    (tmp_path / "keys.txt").symlink_to(deployed.config.parent / "keys.txt")
    config = tmp_path / "cluster.yaml"
    config.write_text(  # a process that waits for processors takes `grace` seconds to stop
        deployed.config.read_text().replace("num_cpus: 1", "num_cpus: 50").replace("grace: 300", "grace: 5")
    )
    deploying = started(deployed.nodes, str(config))
    assert deploying.stderr is not None
    guard = threading.Timer(COMMAND_SECONDS, deploying.kill)
    guard.start()
    notice = next((line for line in deploying.stderr if "have taken more than" in line), "none came")
    guard.cancel()
    assert "'replicas'" in notice
    assert re.search(r'each replica: \{"CPU": 50(\.0)?\}', notice), notice
    deploying.send_signal(signal.SIGINT)
    deploying.communicate(timeout=COMMAND_SECONDS)


def test_an_address_where_no_cluster_answers_is_an_error(nodes: Nodes) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    done = command(nodes._replace(environment={**nodes.environment, "RAY_ADDRESS": address}), "--stop")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tiny-llm: error: no Ray cluster answers at {address}")


@pytest.mark.parametrize("still_runs", [True, False])
def test_a_proxy_that_serve_replaces_does_not_end_the_start(
    still_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve kills a proxy that is not ready within seconds, and its own `start` fails then."""
    from ray.exceptions import RayActorError

    from tiny_llm_cluster import deploy
    from tiny_llm_cluster.deployment import HttpConfig

    controllers = iter([None, object() if still_runs else None])

    def start(*_: object) -> None:
        raise RayActorError

    monkeypatch.setattr(deploy, "_get_global_client", lambda **_: next(controllers))
    monkeypatch.setattr(deploy.serve, "start", start)
    if still_runs:
        deploy._start_serve(HttpConfig())
    else:
        with pytest.raises(RayActorError):
            deploy._start_serve(HttpConfig())
