"""`tiny-llm serve --replicas 2`: real replicas under Ray Serve, with the embedded model, on this machine.

All tests share one server, because Ray takes long to start. A replica runs 4 sequences and queues 2 requests.
"""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from replicated_server import COMPLETE, KEY, START_SECONDS, Cluster, Streamed
from served import SECONDS, until
from tiny_llm import LLM, SamplingParams

pytest.importorskip("ray", reason="needs the group cluster: pdm sync -G cluster")

CAPACITY = 2 * (4 + 2)
LONG = {"max_tokens": 160, "ignore_eos": True, "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("keys"))
    try:
        yield cluster
    finally:
        cluster.popen.send_signal(signal.SIGINT)
        try:
            cluster.popen.wait(SECONDS)
        finally:
            if cluster.popen.poll() is None:
                os.killpg(cluster.popen.pid, signal.SIGKILL)
    assert cluster.popen.returncode == 0, "".join(cluster.lines)
    assert not cluster.processes()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(num_blocks=512, generation_config="vllm") as llm:
        yield llm


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_ray_gets_three_attempts_to_start(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, one of its processes may not be ready in time."""
    from tiny_llm_cluster import application
    from tiny_llm_cluster.config import ClusterConfig

    happened: list[str] = []

    def init(**_: Any) -> None:
        happened.append("init")
        if happened.count("init") <= failures:
            raise RuntimeError("the node timed out\nduring startup")

    monkeypatch.setattr(application, "silence_ray", lambda: None)
    monkeypatch.setattr(application.auto_init_hook, "enable_auto_connect", True)  # restored afterwards
    monkeypatch.setattr(application, "stop_here", lambda: happened.append("stop"))
    monkeypatch.setattr(application.ray, "init", init)
    monkeypatch.setattr(application.serve, "start", lambda **_: happened.append("serve"))
    expected_events = ["init", "stop"] * failures + ["init", "serve"] * (failures < 3)
    if failures == 3:
        with pytest.raises(application.ClusterError, match="Ray cannot start: the node timed out during"):
            application.start_ray_here(ClusterConfig())
    else:
        application.start_ray_here(ClusterConfig())
    assert happened == expected_events


def expected(llm: LLM, prompt: str, **params: Any) -> str:
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0].text


def test_any_replica_gives_the_bits_of_a_single_engine(cluster: Cluster, llm: LLM) -> None:
    prompts = [
        f"A story about {name}:" for name in ("a dog", "the sea", "two kings", "bread", "rain", "Mars")
    ]
    params = {"temperature": 1.0, "max_tokens": 24, "logprobs": 2, "n": 2}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(
            lambda pair: cluster.post(COMPLETE, prompt=pair[1], seed=pair[0], **params), enumerate(prompts)
        )
    for seed, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.status_code == 200, answer.text
        [alone] = llm.generate(prompt, SamplingParams(seed=seed, **params), use_tqdm=False)
        for choice, output in zip(answer.json()["choices"], alone.outputs, strict=True):
            assert choice["text"] == output.text
            own = [
                place[token].logprob for place, token in zip(output.logprobs, output.token_ids, strict=True)
            ]
            assert choice["logprobs"]["token_logprobs"] == own
    assert len(cluster.replicas()) == 2


def test_requests_with_a_common_start_go_where_it_is_cached(cluster: Cluster) -> None:
    system = "You are a patient teacher who answers in one short sentence. " * 8
    cached = []
    for question in ("What is rain?", "What is snow?", "What is fog?", "What is ice?", "What is dew?"):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        answer = cluster.post(CHAT, messages=messages, max_tokens=4, temperature=0).json()
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert min(cached[1:]) >= 80, "with turns, every second request would miss"


def test_a_salt_is_respected(cluster: Cluster) -> None:
    body = {"prompt": "One two three four. " * 10, "max_tokens": 1}
    cached = [
        cluster.post(COMPLETE, **body, cache_salt=salt).json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        for salt in ("mine", "mine", "yours")
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


def test_requests_need_a_key_of_the_file(cluster: Cluster) -> None:
    assert httpx.post(cluster.url + COMPLETE, json={"prompt": "a"}, timeout=SECONDS).status_code == 401
    assert cluster.post(COMPLETE, prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": [1, 10**6]}, "1000000"),
        ({"prompt": "a", "n": 5}, "max_num_seqs"),
        ({"prompt": [1] * 9000}, "9000"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "regular expression"),
        ({"prompt": "a", "logit_bias": {"60000": 1}}, "60000"),
    ],
)
def test_bad_requests_are_refused_with_the_value(cluster: Cluster, body: dict[str, Any], named: str) -> None:
    answer = cluster.post(COMPLETE, **body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_structured_output_runs_on_replicas(cluster: Cluster) -> None:
    form = {"choice": ["yes", "no"]}
    answer = cluster.post(COMPLETE, prompt="Is water wet?", max_tokens=8, structured_outputs=form)
    assert answer.json()["choices"][0]["text"] in form["choice"]


def test_a_full_replica_passes_requests_on_and_full_replicas_refuse(cluster: Cluster, llm: LLM) -> None:
    prompts = [f"Number {i} is" for i in range(CAPACITY + 6)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: cluster.post(COMPLETE, prompt=prompt, **LONG), prompts))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert all("Retry-After" in answer.headers for answer in refused)
    assert len(answers) - len(refused) >= CAPACITY
    assert answers[0].status_code != 200 or answers[0].json()["choices"][0]["text"] == expected(
        llm, prompts[0], **LONG
    )


def test_a_killed_replica_ends_its_own_streams_only_and_comes_back(cluster: Cluster, llm: LLM) -> None:
    prompts = [f"Chapter {i}. It was" for i in range(8)]
    before = cluster.processes()
    assert len(before) == 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        ended = [Streamed() for _ in prompts]
        streams = [pool.submit(cluster.stream, *each, **LONG) for each in zip(prompts, ended, strict=True)]
        until(lambda: sum(bool(one.text) for one in ended) > 4, SECONDS)  # a replica runs 4
        os.kill(min(before), signal.SIGKILL)
        for stream in streams:
            stream.result()
    failed = [one for one in ended if one.error is not None]
    assert 0 < len(failed) < len(prompts)
    assert all("replica" in one.error["message"] for one in failed if one.error is not None)
    for prompt, one in zip(prompts, ended, strict=True):
        if one.error is None:
            assert one.is_done
            assert one.text == expected(llm, prompt, **LONG)
    assert cluster.post(COMPLETE, prompt="Still here:", max_tokens=2).status_code == 200
    until(lambda: len(cluster.processes()) == 2 and cluster.processes() != before, START_SECONDS)
    until(lambda: len(cluster.replicas()) == 2, START_SECONDS)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: cluster.post(COMPLETE, prompt=p, **LONG), prompts))
    assert [one.json()["choices"][0]["text"] for one in answers] == [
        expected(llm, p, **LONG) for p in prompts
    ]


def test_a_rolling_restart_loses_no_accepted_request(cluster: Cluster, llm: LLM) -> None:
    before, stop = cluster.replicas(), threading.Event()
    texts: list[str] = []
    reference = expected(llm, "The old mill", **LONG)

    def ask() -> None:
        while not stop.is_set():
            one = cluster.stream("The old mill", **LONG)
            assert one.error is None, one.error
            assert one.is_done
            texts.append(one.text)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        until(lambda: len(texts) > 2, SECONDS)
        cluster.popen.send_signal(signal.SIGHUP)
        try:
            until(lambda: cluster.has_line("All replicas have been restarted"), START_SECONDS)
            num_texts = len(texts)
            until(lambda: len(texts) > num_texts + 4, SECONDS)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert set(texts) == {reference}
    until(lambda: len(cluster.replicas()) == 2, SECONDS)
    assert not cluster.replicas() & before


def test_a_client_that_leaves_ends_its_request_on_the_replica(cluster: Cluster) -> None:
    body = {"prompt": "Endless", "stream": True, "max_tokens": 3000, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", cluster.url + COMPLETE, json=body, headers=headers, timeout=SECONDS) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    until(lambda: cluster.num_unfinished() == 0, SECONDS)
