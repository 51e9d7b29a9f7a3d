"""The server driven from its own OpenAPI document: what fits it, or nearly, gets an answer of its kind."""

from collections.abc import Iterator

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
    """A context of 64 tokens, so that nobody is answered for long."""
    with serving(lambda: LLM(num_blocks=64, max_model_len=64, max_num_seqs=16)) as here:
        yield here


document = schemathesis.openapi.from_dict(make_app(LLM).openapi())  # asked for its document, loads nothing


@document.parametrize()
@settings(max_examples=examples(25), suppress_health_check=list(HealthCheck), deadline=None)
def test_every_answer_is_what_the_document_says(case: schemathesis.Case, served: Served) -> None:
    case.call_and_validate(base_url=served.url, checks=CHECKS)


def test_nothing_is_left_behind(served: Served) -> None:
    """After all of it every page is back."""
    engine = served.service.llm.engine
    until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
    stats = engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
