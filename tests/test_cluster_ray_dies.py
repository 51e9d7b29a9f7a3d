"""The end of one of Ray's own processes under `tiny-llm serve --replicas 2`, killed while streams run.

Each test starts a server of its own. Oracle: `tiny_llm.LLM` in this process.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from replicated_server import COMPLETE, START_SECONDS, Cluster, Streamed
from served import SECONDS, until
from tiny_llm import LLM, SamplingParams

pytest.importorskip("ray", reason="needs the group cluster: pdm sync -G cluster")
pytestmark = pytest.mark.deep

PROMPTS = [f"Chapter {i}. It was" for i in range(4)]
LONG = {"max_tokens": 240, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    started = cluster.below()
    try:
        yield cluster
        cluster.popen.send_signal(signal.SIGINT)
        cluster.popen.wait(SECONDS)
        until(lambda: not any(is_running(*one) for one in started.items()))
    finally:
        if cluster.popen.poll() is None:
            os.killpg(cluster.popen.pid, signal.SIGKILL)


def is_running(process: int, line: str) -> bool:
    """Whether a process is still there. Ray changes the names of its processes after the "::"."""
    try:
        now = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return False
    return now.partition("::")[0] == line.partition("::")[0] != ""


def kill(cluster: Cluster, name: str) -> None:
    """Kill the process whose program or title has this name."""
    [process] = [one for one, line in cluster.below().items() if name in line.partition(" ")[0]]
    os.kill(process, signal.SIGKILL)


def start_streams(cluster: Cluster, pool: ThreadPoolExecutor) -> list[Future[Streamed]]:
    """Start a stream for each prompt; returns when all run."""
    begun = cluster.num_unfinished()
    streams = [pool.submit(cluster.stream, prompt, **LONG) for prompt in PROMPTS]
    until(lambda: cluster.num_unfinished() == begun + len(PROMPTS))
    return streams


def expected_texts() -> list[str]:
    with LLM(num_blocks=512, generation_config="vllm") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(**LONG), use_tqdm=False)
    return [one.outputs[0].text for one in outputs]


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_without_a_process_that_ray_needs_the_server_drains_and_ends_with_1(
    cluster: Cluster, name: str
) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams = start_streams(cluster, pool)
        kill(cluster, name)
        until(lambda: cluster.has_line(f"Ray's process {name} has ended"))
        try:
            refused = cluster.post(COMPLETE, prompt="Late", max_tokens=1)
        except httpx.TransportError:  # it has ended already
            pass
        else:
            assert refused.status_code == 503
        ended = [stream.result() for stream in streams]
    assert cluster.popen.wait(SECONDS) == 1
    until(lambda: cluster.has_line(f"tiny-llm: error: Ray's process {name} has ended"))
    assert not cluster.has_line("Traceback")
    for text, one in zip(expected_texts(), ended, strict=True):
        assert one.is_done
        if one.error is None:
            assert one.text == text
        else:  # without a raylet, replicas may end within a second
            assert name == "raylet"
            assert "replica" in one.error["message"]


def test_the_controller_of_ray_serve_comes_back(cluster: Cluster) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams = start_streams(cluster, pool)
        kill(cluster, "ray::ServeController")
        ended = [stream.result() for stream in streams]
    assert [one.text for one in ended] == expected_texts()
    before = cluster.processes()
    os.kill(min(before), signal.SIGKILL)  # the new controller replaces it
    until(lambda: len(cluster.processes()) == 2 and cluster.processes() != before, START_SECONDS)
    until(lambda: len(cluster.replicas()) == 2, START_SECONDS)
    assert cluster.post(COMPLETE, prompt="Still here:", max_tokens=2).status_code == 200
