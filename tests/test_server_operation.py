"""What an operator sets and sees: keys, origins and limits, metrics and the version."""

import math
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import httpx2 as httpx
import pytest
from tiny_llm.request_maker import RequestMaker

from guessing import guessing_llm
from served import serving
from smollm2_server import CHAT, COMPLETE, client, llm, scraped, served
from tiny_llm import LLM, ConfigError
from tiny_llm_server import ServerConfig
from tiny_llm_server.service import Service

__all__ = ["client", "llm", "served"]


def test_a_key_is_required_for_models_but_not_for_health_and_metrics() -> None:
    config = ServerConfig(api_keys=("one", "zwö lf"))
    with serving(lambda: LLM(num_blocks=64), config) as here, here.client() as client:
        body = {"prompt": "x", "max_tokens": 1}
        for header in (
            None,
            "Bearer",
            "Bearer two",
            "Basic one",
            "Bearer onee",
            "Bearer on",
            "one",
            "Bearer \xff",
        ):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            refused = client.post(COMPLETE, json=body, headers=headers)  # type: ignore[arg-type]
            assert refused.status_code == 401, header
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in config.api_keys:
            known = {"Authorization": f"Bearer {key}".encode()}
            assert client.post(COMPLETE, json=body, headers=known).status_code == 200  # type: ignore[arg-type]
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 401


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_isolated_keys_do_not_share_cached_prompts(path: str, isolated: bool) -> None:
    """A client that guesses a prompt of another key finds no cached tokens with any salt; the owner does."""
    secret = "The password of the vault is xyzzy, and nobody but me must ever know of it. " * 4
    request = {"prompt": secret} if path == COMPLETE else {"messages": [{"role": "user", "content": secret}]}
    config = ServerConfig(api_keys=("owner", "thief"), isolate_keys=isolated)
    salts = ["owner", "thief", f"{sha256(b'owner').hexdigest()}:", sha256(b"owner").hexdigest()]

    with serving(lambda: LLM(num_blocks=256), config) as here, here.client() as client:

        def cached(key: str, salt: str = "") -> int:
            headers = {"Authorization": f"Bearer {key}"}
            answer = client.post(path, json={**request, "cache_salt": salt, "max_tokens": 1}, headers=headers)
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("owner") == 0
        assert cached("owner") > 50
        assert (cached("thief") > 50) != isolated
        assert cached("owner", "mine") == 0
        if isolated:
            assert [cached("thief", salt) for salt in salts] == [0] * len(salts), (
                "each of them for the first time"
            )


def test_cross_origin_requests_need_an_allowed_origin(client: httpx.Client) -> None:
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options(COMPLETE, headers=preflight).headers
    config = ServerConfig(allowed_origins=("https://example.org",), api_keys=("k",))
    with serving(lambda: LLM(num_blocks=64), config) as here, here.client() as other:
        allowed = other.options(COMPLETE, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"


# Metrics.


def test_metrics_count_requests_tokens_and_times(client: httpx.Client) -> None:
    before = scraped(client)
    body = {"prompt": ["The sky is", "Once upon"], "n": 2, "max_tokens": 5, "ignore_eos": True}
    usage = client.post(COMPLETE, json=body).json()["usage"]
    after = scraped(client)

    def more(name: str) -> float:
        return after[f"vllm:{name}"] - before.get(f"vllm:{name}", 0.0)

    assert usage["completion_tokens"] == 20
    assert more("generation_tokens_total") == 20
    assert more("prompt_tokens_total") == more("prefix_cache_queries_total") == usage["prompt_tokens"]
    assert more("request_success_total{finished_reason=length}") == 4
    assert more("time_to_first_token_seconds_count") == more("e2e_request_latency_seconds_count") == 2
    assert more("inter_token_latency_seconds_count") == 16
    assert more("request_queue_time_seconds_count") == 2
    assert 0 < more("request_queue_time_seconds_sum") < more("time_to_first_token_seconds_sum")
    assert (
        more("iteration_tokens_total_sum") == usage["prompt_tokens"] + 16
    )  # the last token of a completion is not computed
    assert more("iteration_tokens_total_count") == more("iteration_tokens_total_bucket{le=+Inf}") == 5
    assert more("iteration_tokens_total_bucket{le=4.0}") == 4, "four completions together, after a prefill"
    assert more("request_prompt_tokens_sum") == usage["prompt_tokens"]
    assert more("request_generation_tokens_sum") == 20
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1
    assert all(math.isfinite(value) for value in after.values())


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_times_count_from_the_arrival_of_a_request(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens before the engine knows of it counts too: here rendering and tokenizing take long."""

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return function(*args, **options)

        return call

    part, name = (Service, "encode_chat") if path == CHAT else (RequestMaker, "request")
    monkeypatch.setattr(part, name, slowly(getattr(part, name)))
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    config = ServerConfig(served_model_name="smollm2")
    with serving(lambda: LLM(num_blocks=64), config) as here, here.client() as client:
        assert client.post(path, json={**prompt, "max_tokens": 1}).status_code == 200
        found = scraped(client)
    first_token = found["vllm:time_to_first_token_seconds_sum"]
    assert 0.3 <= first_token <= found["vllm:e2e_request_latency_seconds_sum"]


def test_metrics_count_guessed_tokens_if_the_engine_speculates() -> None:
    """Oracle: the same request to an engine that does not."""
    body = {
        "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10. " * 3,
        "temperature": 0,
        "max_tokens": 24,
        "stream": False,
    }
    config = ServerConfig(served_model_name="smollm2")
    with serving(lambda: LLM(num_blocks=64), config) as here, here.client() as client:
        expected = client.post(COMPLETE, json=body).json()
        assert not [name for name in scraped(client) if "spec_decode" in name]
    with serving(lambda: guessing_llm(num_blocks=64), config) as here, here.client() as client:
        assert client.post(COMPLETE, json=body).json()["choices"] == expected["choices"]
        found = scraped(client)
    drafted, accepted = (
        found[f"vllm:spec_decode_num_{which}_tokens_total"] for which in ("draft", "accepted")
    )
    assert 0 < accepted <= drafted
    assert found["vllm:spec_decode_num_drafts_total"] <= drafted
    positions = [f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{position={i}}}" for i in range(7)]
    counts = [found.get(name, 0) for name in positions]
    assert sum(counts) == accepted
    assert counts == sorted(counts, reverse=True)
    assert found["vllm:generation_tokens_total"] == expected["usage"]["completion_tokens"]


def test_version_lists_tiny_llm_mlx_and_kernels(client: httpx.Client) -> None:
    answer = client.get("/version").json()
    assert set(answer) == {"version", "mlx", "kernels"}


@pytest.mark.parametrize(
    "options",
    [
        {"max_n": 0},
        {"max_body_bytes": 0},
        {"request_timeout": 0},
        {"keep_alive": -1},
        {"body_timeout": 0},
        {"api_keys": ("",)},
        {"isolate_keys": True},
        {"override_generation_config": {"temprature": 0.2}},
        {"override_generation_config": {"temperature": -1}},
        {"override_generation_config": {"top_k": None}},
        {"override_generation_config": {"max_new_tokens": 0}},
    ],
)
def test_invalid_configurations_are_refused(options: dict[str, Any]) -> None:
    name = next(iter(options)).rstrip("s").replace("_", "[ _]")
    with pytest.raises(ConfigError, match=f"(?i){name}"):
        ServerConfig(**options)
