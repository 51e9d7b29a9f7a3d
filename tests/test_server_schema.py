"""Requests generated from the server's OpenAPI document get answers that conform to it."""

from collections.abc import Callable, Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from served import Served, serving, until
from tiny_llm import LLM
from tiny_llm_server import make_app
from tiny_model import examples

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A context of 64 tokens keeps the answers short."""
    with serving(lambda: LLM(num_blocks=64, max_model_len=64, max_num_seqs=16)) as here:
        yield here


document = schemathesis.openapi.from_dict(make_app(LLM).openapi())  # asked for its document, loads nothing


driven_operations: list[str] = []


def driven(label: str) -> Callable[..., None]:
    """Make a test of one operation: every answer conforms to the document."""

    driven_operations.append(label)

    @document.include(name=label).parametrize()
    @settings(max_examples=examples(25), suppress_health_check=list(HealthCheck), deadline=None)
    def test(case: schemathesis.Case, served: Served) -> None:
        case.call_and_validate(base_url=served.url, checks=CHECKS)

    return test


test_completions = driven("POST /v1/completions")
test_chat_completions = driven("POST /v1/chat/completions")
test_tokenize = driven("POST /tokenize")
test_detokenize = driven("POST /detokenize")
test_models = driven("GET /v1/models")
test_one_model = driven("GET /v1/models/{name}")
test_health = driven("GET /health")
test_version = driven("GET /version")
test_metrics = driven("GET /metrics")


def test_every_operation_is_tested() -> None:
    known = [operation.ok().label for operation in document.get_all_operations()]
    assert sorted(known) == sorted(driven_operations)


def test_all_blocks_are_free_at_the_end(served: Served) -> None:
    """No test above has leaked a block."""
    engine = served.service.llm.engine
    until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
    stats = engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
