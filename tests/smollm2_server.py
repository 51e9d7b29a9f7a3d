"""The embedded model behind a server for all tests of a file, and those who ask it.

`client` asks in plain requests, `sdk` is OpenAI's own client; `alone` asks the engine without HTTP.
"""

import socket
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from served import SECONDS, Served, serving, until
from tiny_llm import LLM, SamplingParams
from tiny_llm_server import ServerConfig

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=1024, max_num_seqs=16, max_num_waiting=64, generation_config="vllm")


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm, ServerConfig(served_model_name="smollm2", max_body_bytes=100_000)) as here:
        yield here
        until(lambda: llm.engine.stats.num_running == 0)


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def connected(served: Served) -> socket.socket:
    """A connection of which nothing has been said yet."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def alone(llm: LLM, prompt: str, **params: Any) -> str:
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0].text


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def scraped(client: httpx.Client) -> dict[str, float]:
    """What /metrics says, with the model's name left out."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "smollm2"
            rest = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[sample.name + (f"{{{rest}}}" if rest else "")] = sample.value
    return found
