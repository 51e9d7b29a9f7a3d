"""When a step raises, only the request that caused it fails. Faults are injected at every point of a step.

Oracle: the same requests without the fault. Requests that do not fail get the same tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from tiny_llm.beam_search import BeamSearch, BeamSearchParams
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import NotANumberError
from tiny_llm.kv_context import KVContext
from tiny_llm.kv_pool import KVPool
from tiny_llm.model import Model
from tiny_llm.page_layout import PageLayout
from tiny_llm.page_scheduler import PageScheduler
from tiny_llm.paged_attention import BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import PagedQueues
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.step import Plan
from tiny_llm.swap import SwapSpace

from promises import check_all_returned, check_pages, policies
from tiny_llm import engine_core, page_layout, token_output
from tiny_model import EOS, random_prompt, tiny_model

POISON = 1  # a token that is in no other prompt and is never generated
Answers = dict[str, list[int]]

REQUESTS: dict[str, tuple[list[int], SamplingParams | BeamSearchParams]] = {
    "greedy": (random_prompt(9, 1), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)),
    "three": (random_prompt(14, 2), SamplingParams(n=3, max_tokens=7, seed=5, ignore_eos=True)),
    "told": (random_prompt(6, 3), SamplingParams(max_tokens=8, seed=6, logprobs=2, prompt_logprobs=1)),
    "late": (
        random_prompt(21, 4),
        SamplingParams(max_tokens=6, seed=7, ignore_eos=True, repetition_penalty=1.1),
    ),
    "searched": (random_prompt(9, 1), BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)),
}


class InjectedError(Exception):
    """The error that the tests inject."""


def overloaded_engine(model: Model) -> EngineCore:
    """Return an engine whose small pool forces preemption, swapping, sharing and chunked prefill."""
    manager = PagedBatchManager(
        17, 3, 6, model=model, max_batched_tokens=12, policies=policies(True, prefix=True, swap_blocks=40)
    )
    return EngineCore(manager, (EOS,))


def serve(
    engine: EngineCore, requests: dict[str, Any], max_steps: int = 600
) -> tuple[Answers, dict[str, Exception]]:
    """Serve all requests; return the tokens of each sequence, and the error of each failed request."""
    searches: dict[str, BeamSearch] = {}
    answers: Answers = {}
    failed: dict[str, Exception] = {}
    for request_id, (prompt, params) in requests.items():
        if isinstance(params, BeamSearchParams):
            searches[request_id] = engine.add_beam_search(request_id, prompt, params)
        else:
            engine.add_request(request_id, prompt, params)
    for _ in range(max_steps):
        for output in engine.step():
            answers.setdefault(output.seq_id, []).append(output.token)
        for failure in engine.take_failures():
            assert failure.request_id not in failed, "one request failed twice"
            failed[failure.request_id] = failure.error
        if isinstance(engine.manager, PagedBatchManager):
            check_pages(engine.manager)
        if not engine.has_work:
            break
    assert not engine.has_work, "a request never finished"
    for request_id, search in searches.items():
        if request_id not in failed:
            assert not search.beams, "a search never finished"
            answers[request_id] = [token for ended in search.ended for token in ended.hypothesis.tokens]
    return answers, failed


def answers_to(answers: Answers, request_id: str) -> Answers:
    return {seq_id: tokens for seq_id, tokens in answers.items() if seq_id.split("/")[0] == request_id}


@pytest.fixture(scope="module")
def clean_answers() -> Answers:
    answers, failed = serve(overloaded_engine(tiny_model()), REQUESTS)
    assert not failed
    return answers


def raising_at_call(
    function: Callable[..., Any], call: int, after: bool, calls: Counter[str]
) -> Callable[..., Any]:
    """Wrap the function so that its `call`-th call raises: before it runs, or `after` it has run."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls["all"] += 1
        fails = calls["all"] == call
        if fails and not after:
            raise InjectedError
        value = function(*args, **kwargs)
        if fails:
            raise InjectedError
        return value

    return wrapped


POINTS: list[tuple[Any, str]] = [
    (PageScheduler, "plan"),
    (PageScheduler, "computed"),
    (PagedBatchManager, "run_plan"),
    (PagedBatchManager, "_fork"),
    (PagedBatchManager, "commit"),
    (PagedBatchManager, "advance"),
    (PrefixSharing, "adopt"),
    (PrefixSharing, "next_block"),
    (PrefixSharing, "keep"),
    (BlockTable, "append_tokens"),
    (SwapSpace, "swap_out"),
    (SwapSpace, "swap_in"),
    (KVPool, "fill_from"),
    (KVPool, "evaluate"),
    (PageLayout, "context"),
    (page_layout, "pack_batch"),
    (Plan, "pack"),
    (Plan, "conclude"),
    (PagedQueues, "start_next"),
    (PagedQueues, "join"),
    (engine_core, "choose_token"),
    (engine_core, "choose_together"),
    (engine_core, "make_outputs"),
    (engine_core, "record_prompt_logprobs"),
    (engine_core, "likeliest"),
    (token_output, "sample_token"),
    (BeamSearch, "advance"),
]


@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_exception_at_any_point_of_a_step_fails_at_most_one_request(
    owner: Any, name: str, after: bool, clean_answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same requests without a fault, for all requests that have not failed."""
    original = getattr(owner, name)
    for call in (1, 2, 5, 12):
        calls: Counter[str] = Counter()
        engine = overloaded_engine(tiny_model())
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising_at_call(original, call, after, calls))
            answers, failed = serve(engine, REQUESTS)
        assert calls["all"] >= 1, f"{name} is never called: nothing was injected"
        assert len(failed) <= 1, f"{name}, call {call}: {failed}"
        for request_id in REQUESTS.keys() - failed.keys():
            assert answers_to(answers, request_id) == answers_to(clean_answers, request_id), (
                name,
                call,
            )
        check_all_returned(engine.manager)


def model_with_fault(model: Model, change_logits: Callable[[mx.array, mx.array], mx.array]) -> Model:
    """Return a model that changes the logits of each step that contains the token `POISON`."""

    class ModelWithFault(Model):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            logits = super().__call__(tokens, context)
            is_poison = tokens[0] == POISON
            return change_logits(logits, is_poison) if is_poison.any().item() else logits

    return ModelWithFault(**{name: getattr(model, name) for name in model.__dataclass_fields__})


def raise_error(logits: mx.array, is_poison: mx.array) -> mx.array:
    raise InjectedError


REQUESTS_WITH_POISON = REQUESTS | {
    "poisoned": ([*random_prompt(8, 9), POISON], SamplingParams(max_tokens=5, ignore_eos=True))
}


def test_a_request_that_makes_the_model_raise_fails_and_the_others_continue(
    clean_answers: Answers,
) -> None:
    engine = overloaded_engine(model_with_fault(tiny_model(), raise_error))
    answers, failed = serve(engine, REQUESTS_WITH_POISON)
    assert list(failed) == ["poisoned"]
    assert isinstance(failed["poisoned"], InjectedError)
    for request_id in REQUESTS:
        assert answers_to(answers, request_id) == answers_to(clean_answers, request_id)
    check_all_returned(engine.manager)


def test_the_engine_serves_requests_after_a_failure(clean_answers: Answers) -> None:
    engine = overloaded_engine(model_with_fault(tiny_model(), raise_error))
    serve(engine, REQUESTS_WITH_POISON)
    answers, failed = serve(engine, REQUESTS)
    assert not failed
    for request_id in ("greedy", "three", "late", "searched"):
        assert answers_to(answers, request_id) == answers_to(clean_answers, request_id)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(seed=1, top_p=0.9)])
def test_nan_logits_fail_the_request_that_has_them(params: SamplingParams, clean_answers: Answers) -> None:
    def set_nan(logits: mx.array, is_poison: mx.array) -> mx.array:
        return mx.concatenate([logits[:, :-1], logits[:, -1:] * mx.nan], axis=1)

    requests = {"poisoned": ([POISON], replace(params, max_tokens=5, ignore_eos=True))}
    engine = overloaded_engine(model_with_fault(tiny_model(), set_nan))
    answers, failed = serve(engine, requests)
    assert isinstance(failed["poisoned"], NotANumberError)
    assert "'poisoned'" in str(failed["poisoned"])
    answers, failed = serve(engine, {"greedy": REQUESTS["greedy"]})
    assert answers["greedy"] == clean_answers["greedy"]
    check_all_returned(engine.manager)


def test_a_failing_batch_loses_one_request_at_a_time_until_the_rest_can_run() -> None:
    """No single request is at fault. One at a time has to fail, or no request would ever finish."""

    class FailsOnLargeBatches(Model):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            if context.logit_rows is not None and context.logit_rows.shape[0] > 2:
                raise InjectedError
            return super().__call__(tokens, context)

    model = tiny_model()
    failing = FailsOnLargeBatches(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    manager = PagedBatchManager(40, 8, 6, model=failing)
    answers, failed = serve(EngineCore(manager, (EOS,)), {f"r{i}": ([9 + i], params) for i in range(4)})
    assert list(failed) == ["r3", "r2"]
    assert all(len(answers[request_id]) == 4 for request_id in ("r0", "r1"))


def test_requests_are_recomputed_when_the_pools_arrays_cannot_be_evaluated(
    clean_answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's own arrays are lost, so all its content has to be dropped."""
    engine = overloaded_engine(tiny_model())
    evaluate, calls = KVPool.evaluate, Counter[str]()

    def losing(pool: KVPool, *outputs: mx.array) -> None:
        calls["all"] += 1
        if calls["all"] in (20, 21):  # in the step, and in the recovery after it
            for layer, (keys, values) in enumerate(zip(pool._keys, pool._values, strict=True)):
                pool.put_back(layer, keys * mx.nan, values * mx.nan)
            raise InjectedError
        evaluate(pool, *outputs)

    monkeypatch.setattr(KVPool, "evaluate", losing)
    answers, failed = serve(engine, REQUESTS)
    assert len(failed) <= 1
    for request_id in REQUESTS.keys() - failed.keys():
        assert answers_to(answers, request_id) == answers_to(clean_answers, request_id)
    check_all_returned(engine.manager)


def test_with_dense_batching_only_the_faulty_request_fails() -> None:
    requests = {name: REQUESTS_WITH_POISON[name] for name in ("greedy", "three", "late", "poisoned")}
    clean, _ = serve(EngineCore(DenseBatchManager(6, 64, model=tiny_model()), (EOS,)), requests)
    engine = EngineCore(DenseBatchManager(6, 64, model=model_with_fault(tiny_model(), raise_error)), (EOS,))
    answers, failed = serve(engine, requests)
    assert list(failed) == ["poisoned"]
    assert {name: tokens for name, tokens in clean.items() if name != "poisoned"} == answers


@pytest.mark.parametrize("make", [lambda: DenseBatchManager(6, 64), lambda: PagedBatchManager(40, 4, 6)])
def test_a_manager_that_fails_before_it_computes_anything_fails_its_requests_one_by_one(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the step would be repeated forever, without an error."""
    engine = EngineCore(make(), (EOS,))

    def raising() -> None:
        raise InjectedError

    monkeypatch.setattr(engine.manager, "process_batch", raising)
    for name in ("a", "b", "c"):
        engine.add_request(name, [1, 2, 3], SamplingParams())
    failed = []
    for _ in range(3):
        assert engine.step() == []
        failed += engine.take_failures()
    assert [(one.request_id, type(one.error)) for one in failed] == [(x, InjectedError) for x in "abc"]
    assert not engine.has_work
