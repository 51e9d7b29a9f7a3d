"""Requests can be made without an engine, and an engine makes the same ones. Oracle: by hand."""

import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.request_maker import RequestMaker
from tiny_llm.structured_outputs import StructuredOutputsParams

from tiny_llm import RequestTooLargeError, SamplingParams, SamplingParamsError
from tiny_model import VOCAB
from toy_engine import TOKENIZER, make_engine

MAKER = RequestMaker(TOKENIZER, VOCAB, 4, 20, defaults=SamplingParams(max_tokens=7, top_k=3))
TEXT = TOKENIZER.decode([10, 11, 12])


def test_a_request_has_the_prompts_tokens_and_the_default_parameters() -> None:
    request = MAKER.request(TEXT)
    assert request.prompt_token_ids == tuple(TOKENIZER.encode(TEXT, add_special_tokens=True))
    assert request.params == SamplingParams(max_tokens=7, top_k=3)


def test_requests_without_an_id_are_numbered_and_a_given_id_is_kept() -> None:
    maker = RequestMaker(TOKENIZER, VOCAB, 4)
    made = [
        maker.request([1]),
        maker.request([1], request_id="mine"),
        maker.search([1], BeamSearchParams(beam_width=2, max_tokens=2)),
    ]
    assert [request.request_id for request in made] == ["0", "mine", "1"]


def test_what_can_never_run_is_refused() -> None:
    for prompt, params, error, words in (
        ([VOCAB], None, ValueError, f"token id {VOCAB} is outside the vocabulary"),
        ([1], SamplingParams(n=5), RequestTooLargeError, "5"),
        ([1] * 21, None, RequestTooLargeError, "20"),
        ([1], SamplingParams(stop_token_ids=[VOCAB]), SamplingParamsError, "stop_token_ids has token id"),
        (
            [1],
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")),
            SamplingParamsError,
            "structured_outputs is not supported",
        ),
    ):
        with pytest.raises(error, match=words):
            MAKER.request(prompt, params)
    with pytest.raises(RequestTooLargeError, match="beam_width"):
        MAKER.search([1], BeamSearchParams(beam_width=5, max_tokens=2))


def test_an_engine_makes_requests_with_its_own_limits_and_defaults() -> None:
    engine = make_engine(max_num_seqs=3)
    try:
        with pytest.raises(RequestTooLargeError, match="3"):
            engine.request([1], SamplingParams(n=4))
        assert engine.request([1]).params == SamplingParams()
        assert engine.request([1]).request_id != engine.request([1]).request_id
        assert engine.check_token_ids((1, 2)) == [1, 2]
        assert engine.is_compiled(SamplingParams())
    finally:
        engine.stop()
