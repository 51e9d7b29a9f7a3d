"""Structured output in the engine: every text has its form, and the other parameters do what they say.

A tiny random model, whose tokens are characters. Oracle for texts: Python's `re`.
"""

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import GrammarError, NotANumberError
from tiny_llm.grammar import Grammar
from tiny_llm.kernels import twins
from tiny_llm.model import Model
from tiny_llm.token_output import TokenOutput

import tiny_llm_kernels
from grammars import TOY_LETTERS, toy_compiler
from tiny_llm import LLM, RequestOutput, SamplingParams, SamplingParamsError, token_output
from tiny_model import EOS, VOCAB, examples, random_prompt, tiny_model
from toy_engine import make_core, make_engine

PROMPT = tuple(random_prompt(9, 1))
COMPILER = toy_compiler(VOCAB, VOCAB, EOS)


def tokens_of(text: str) -> list[int]:
    return [TOY_LETTERS.index(letter) for letter in text]


def text_of(tokens: list[int]) -> str:
    return "".join(TOY_LETTERS[token] for token in tokens if token != EOS)


def complete(core: EngineCore, **options: Any) -> dict[str, list[TokenOutput]]:
    """The outputs of one request by sequence id."""
    params = SamplingParams(**{"max_tokens": 20, "seed": 3, **options})
    form = params.structured_outputs
    grammar = None if form is None else COMPILER.compile(form)  # type: ignore[arg-type]
    assert core.add_request("0", list(PROMPT), params, grammar)
    outputs: dict[str, list[TokenOutput]] = {}
    while core.has_work:
        for output in core.step():
            outputs.setdefault(output.seq_id, []).append(output)
    [*failures] = core.take_failures()
    if failures:
        raise failures[0].error
    return outputs


def texts(core: EngineCore, **options: Any) -> list[str]:
    found = complete(core, **options).values()
    return [text_of([output.token for output in outputs]) for outputs in found]


def one(core: EngineCore | None = None, **options: Any) -> list[TokenOutput]:
    [outputs] = complete(core or make_core(), **options).values()
    return outputs


parameters = st.fixed_dictionaries(
    {
        "n": st.sampled_from([1, 3]),
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "repetition_penalty": st.sampled_from([1.0, 3.0]),
        "logit_bias": st.sampled_from([None, {65: -100.0, 66: -100.0, 10: 100.0, EOS: 100.0}]),
        "min_tokens": st.sampled_from([0, 3, 20]),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=examples(120))
@given(parameters, st.sampled_from(["[a-c]{2,5}", "(yes|no)+", "[!-~]{0,6}x", "a", "[ab]*"]), st.booleans())
def test_every_finished_text_has_its_form_whatever_the_other_parameters_are(
    options: dict[str, Any], pattern: str, compiled: bool
) -> None:
    if compiled:
        found = complete(make_core(), structured_outputs={"regex": pattern}, **options)
    else:
        with twins():
            found = complete(make_core(), structured_outputs={"regex": pattern}, **options)
    assert len(found) == options["n"]
    for outputs in found.values():
        text = text_of([output.token for output in outputs])
        assert outputs[-1].finish_reason in ("stop", "length")
        if outputs[-1].finish_reason == "stop":
            assert re.fullmatch(pattern, text)


def test_a_completion_ends_with_the_token_that_completes_its_text() -> None:
    """No step is spent on an end-of-sequence token."""
    outputs = one(structured_outputs={"choice": ["yes"]})
    assert [output.token for output in outputs] == tokens_of("yes")
    last = outputs[-1]
    assert (last.finish_reason, last.stop_token, last.completes_text) == ("stop", None, True)
    assert not any(output.completes_text for output in outputs[:-1])


def test_an_end_token_ends_a_text_that_could_go_on() -> None:
    outputs = one(structured_outputs={"regex": "[a-c]*"}, logit_bias={EOS: 100.0})
    assert [output.token for output in outputs] == [EOS]
    assert (outputs[-1].finish_reason, outputs[-1].completes_text) == ("stop", False)


@pytest.mark.parametrize("min_tokens", [0, 1, 5])
def test_end_tokens_are_forbidden_until_min_tokens(min_tokens: int) -> None:
    outputs = one(structured_outputs={"regex": "[a-c]*"}, logit_bias={EOS: 100.0}, min_tokens=min_tokens)
    assert len(outputs) == min_tokens + 1
    assert outputs[-1].token == EOS


def test_stop_tokens_are_forbidden_until_min_tokens_too() -> None:
    [a] = tokens_of("a")
    options: dict[str, Any] = {"stop_token_ids": [a], "logit_bias": {a: 100.0}, "min_tokens": 4}
    outputs = one(structured_outputs={"regex": "[a-c]+"}, **options)
    assert (len(outputs), outputs[-1].token, outputs[-1].stop_token) == (5, a, a)
    assert not outputs[-1].completes_text


def test_a_complete_text_ends_before_min_tokens_because_nothing_else_is_allowed() -> None:
    assert texts(make_core(), structured_outputs={"choice": ["yes"]}, min_tokens=10) == ["yes"]
    outputs = one(structured_outputs={"regex": ""}, min_tokens=10)
    assert [output.token for output in outputs] == [EOS]


def test_with_ignore_eos_a_text_goes_on_while_it_can() -> None:
    options: dict[str, Any] = {"ignore_eos": True, "logit_bias": {EOS: 100.0}}
    outputs = one(structured_outputs={"regex": "[a-c]*"}, **options)
    assert (len(outputs), outputs[-1].finish_reason) == (20, "length")
    assert texts(make_core(), structured_outputs={"regex": "[a-c]{4}"}, **options)[0][4:] == ""
    outputs = one(structured_outputs={"regex": ""}, **options)
    assert ([output.token for output in outputs], outputs[-1].finish_reason) == ([EOS], "stop")


def test_log_probabilities_are_those_of_the_logits_before_any_change() -> None:
    """Oracle: the first token of the same request without a form."""
    plain = one(max_tokens=1, logprobs=5)[0].logprobs
    formed = one(max_tokens=1, logprobs=5, structured_outputs={"choice": ["zebra"]})[0]
    assert formed.token == tokens_of("z")[0]
    assert plain is not None
    assert formed.logprobs is not None
    assert formed.logprobs.top == plain.top
    assert formed.logprobs.rank > 1
    assert formed.logprobs.logprob < 0


@pytest.mark.skipif(not tiny_llm_kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"frequency_penalty": 0.5}, {"min_tokens": 6}])
def test_the_readable_sampler_chooses_the_same_tokens(options: dict[str, Any]) -> None:
    form = {"regex": "([a-m]|xyz){3,}"}
    fast = texts(make_core(), structured_outputs=form, n=3, **options)
    with twins():
        assert texts(make_core(), structured_outputs=form, n=3, **options) == fast


def test_requests_without_a_form_have_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(masks: object) -> mx.array:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(token_output, "stacked_masks", fail)
    assert len(one()) >= 1
    with pytest.raises(AssertionError, match="a mask was made"):
        one(structured_outputs={"choice": ["a", "b"]})


def test_dense_batching_gives_the_same_texts() -> None:
    form = {"regex": "([a-m]|xyz){3,}"}
    dense = EngineCore(DenseBatchManager(4, 64, model=tiny_model()), (EOS,))
    assert texts(dense, structured_outputs=form, n=3) == texts(make_core(), structured_outputs=form, n=3)


# Faults.


def model_with_nan_at(token: int) -> Model:
    class Broken(Model):
        def __call__(self, *args: Any) -> mx.array:
            logits = super().__call__(*args)
            return mx.where(mx.arange(VOCAB) == token, mx.nan, logits)

    model = tiny_model()
    return Broken(**{name: getattr(model, name) for name in model.__dataclass_fields__})


@pytest.mark.parametrize("letter", ["a", "z"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"frequency_penalty": 0.5}])
def test_a_nan_is_found_even_at_a_token_that_is_not_allowed(letter: str, options: dict[str, Any]) -> None:
    core = make_core(model_with_nan_at(tokens_of(letter)[0]))
    with pytest.raises(NotANumberError):
        one(core, structured_outputs={"regex": "[a-c]+"}, **options)
    with twins(), pytest.raises(NotANumberError):
        one(
            make_core(model_with_nan_at(tokens_of(letter)[0])),
            structured_outputs={"regex": "[a-c]+"},
            **options,
        )


def test_a_grammar_that_fails_ends_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    core, allowed = make_core(), Grammar.allowed
    params = SamplingParams(max_tokens=8, seed=1, structured_outputs={"regex": "[a-z]{8}"})
    broken, whole = (COMPILER.compile(params.structured_outputs) for _ in range(2))  # type: ignore[arg-type]
    for name, grammar in (("broken", broken), ("whole", whole)):
        core.add_request(name, list(PROMPT), params, grammar)
    core.add_request("plain", list(PROMPT), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))

    def failing(grammar: Grammar, ahead: Any = ()) -> Any:
        if grammar is broken and len(core.manager.sequence("broken").outputs) == 3:
            raise GrammarError("too complex")
        return allowed(grammar, ahead)

    monkeypatch.setattr(Grammar, "allowed", failing)
    finished = set()
    while core.has_work:
        finished |= {output.request_id for output in core.step() if output.finish_reason}
    assert [str(failure.error) for failure in core.take_failures()] == ["too complex"]
    assert finished == {"whole", "plain"}


def test_a_form_without_its_grammar_is_rejected() -> None:
    """The core does not compile, and must not ignore the form."""
    params = SamplingParams(structured_outputs={"json_object": True})
    with pytest.raises(ValueError, match="structured_outputs and its compiled grammar"):
        make_core().add_request("0", list(PROMPT), params)
    grammar = COMPILER.compile(params.structured_outputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="given together"):
        make_core().add_request("0", list(PROMPT), SamplingParams(), grammar)


def test_an_engine_without_a_compiler_rejects_a_form() -> None:
    engine = make_engine()
    with pytest.raises(SamplingParamsError, match="structured_outputs is not supported by this engine"):
        engine.request([1, 2], SamplingParams(structured_outputs={"json_object": True}))
    engine.stop()


def test_beam_search_has_no_structured_output() -> None:
    with pytest.raises(TypeError, match=r"BeamSearchParams.* argument 'structured_outputs'"):
        BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs={"json_object": True})  # type: ignore[call-arg]


# Through the Python API, with the embedded model.


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(num_blocks=256, max_num_seqs=8, generation_config="vllm") as llm:
        yield llm


def generated(llm: LLM, prompt: str = "Answer:", **options: Any) -> RequestOutput:
    params = SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 64, **options})
    return llm.generate(prompt, params, use_tqdm=False)[0]


def test_the_text_has_the_token_that_completes_it(llm: LLM) -> None:
    [output] = generated(llm, structured_outputs={"choice": ["certainly"]}).outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("certainly", "stop", None)


def test_a_stream_has_the_whole_text(llm: LLM) -> None:
    params = SamplingParams(structured_outputs={"regex": "[a-z]{5}\\n[0-9]{5}"}, max_tokens=64, seed=4)
    deltas = list(llm.stream("Answer:", params))
    assert re.fullmatch(r"[a-z]{5}\n[0-9]{5}", "".join(delta.text for delta in deltas))
    assert deltas[-1].finish_reason == "stop"


def test_a_stop_string_ends_a_text_before_it_is_complete(llm: LLM) -> None:
    [output] = generated(llm, structured_outputs={"choice": ["one two three"]}, stop="two").outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("one ", "stop", "two")


def test_each_prompt_has_its_own_form(llm: LLM) -> None:
    forms: list[dict[str, Any] | None] = [
        {"choice": ["red"]},
        None,
        {"regex": "[0-9]{3}"},
        {"choice": ["blue"]},
    ]
    params = [SamplingParams(max_tokens=8, seed=i, structured_outputs=form) for i, form in enumerate(forms)]
    found = [output.outputs[0].text for output in llm.generate(["A:"] * 4, params, use_tqdm=False)]
    assert (found[0], found[3]) == ("red", "blue")
    assert re.fullmatch("[0-9]{3}", found[2])
    assert found[1] == generated(llm, "A:", max_tokens=8, seed=1).outputs[0].text


def test_a_wrong_schema_is_rejected_before_anything_runs(llm: LLM) -> None:
    before = llm.engine.stats.num_tokens
    with pytest.raises(SamplingParamsError, match="at #: Invalid type: strin"):
        generated(llm, structured_outputs={"json": {"type": "strin"}})
    assert llm.engine.stats.num_tokens == before


def test_compiling_does_not_hold_up_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar is compiled in the thread that makes the request."""
    import threading

    compiled_in = []
    compiler = llm.engine._grammars
    assert compiler is not None
    compile_ = compiler._compile
    monkeypatch.setattr(
        compiler, "_compile", lambda *a: compiled_in.append(threading.current_thread()) or compile_(*a)
    )
    generated(llm, structured_outputs={"choice": ["only here"]})
    assert compiled_in == [threading.current_thread()]
