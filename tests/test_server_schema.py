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


document = schemathesis.openapi.from_dict(make_app(LLM).openapi())  # this does not load the model


tested_operations: list[str] = []


def conformance_test(label: str) -> Callable[..., None]:
    """Make a test of one operation: every answer conforms to the document."""

    tested_operations.append(label)

    @document.include(name=label).parametrize()
    @settings(max_examples=examples(25), suppress_health_check=list(HealthCheck), deadline=None)
    def test(case: schemathesis.Case, served: Served) -> None:
        case.call_and_validate(base_url=served.url, checks=CHECKS)

    return test


test_completions = conformance_test("POST /v1/completions")
test_chat_completions = conformance_test("POST /v1/chat/completions")
test_tokenize = conformance_test("POST /tokenize")
test_detokenize = conformance_test("POST /detokenize")
test_models = conformance_test("GET /v1/models")
test_one_model = conformance_test("GET /v1/models/{name}")
test_health = conformance_test("GET /health")
test_version = conformance_test("GET /version")
test_metrics = conformance_test("GET /metrics")


def test_every_operation_is_tested() -> None:
    known = [operation.ok().label for operation in document.get_all_operations()]
    assert sorted(known) == sorted(tested_operations)


def test_all_blocks_are_free_at_the_end(served: Served) -> None:
    """No test above has leaked a block."""
    engine = served.service.llm.engine
    until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
    stats = engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
