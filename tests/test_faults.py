"""A step that raises fails only the requests that caused it: faults are injected at every point of a step.

The oracle is the same crowd without the fault: whoever has not failed gets the same bits.
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

POISON = 1  # which nobody else has, or ever gets
Answers = dict[str, list[int]]

CROWD: dict[str, tuple[list[int], SamplingParams | BeamSearchParams]] = {
    "greedy": (random_prompt(9, 1), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)),
    "three": (random_prompt(14, 2), SamplingParams(n=3, max_tokens=7, seed=5, ignore_eos=True)),
    "told": (random_prompt(6, 3), SamplingParams(max_tokens=8, seed=6, logprobs=2, prompt_logprobs=1)),
    "late": (random_prompt(21, 4), SamplingParams(max_tokens=6, seed=7, ignore_eos=True)),
    "searched": (random_prompt(9, 1), BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)),
}


class InjectedError(Exception):
    """The fault."""


def crowded_engine(model: Model) -> EngineCore:
    """An engine whose pool is so small that the crowd is preempted, swapped, shared and cut into chunks."""
    manager = PagedBatchManager(
        17, 3, 6, model=model, max_batched_tokens=12, policies=policies(True, prefix=True, swap_blocks=40)
    )
    return EngineCore(manager, (EOS,))


def serve(
    engine: EngineCore, crowd: dict[str, Any], most_steps: int = 600
) -> tuple[Answers, dict[str, Exception]]:
    """Serve everybody; the tokens of each sequence, and who failed with what."""
    searches: dict[str, BeamSearch] = {}
    answers: Answers = {}
    failed: dict[str, Exception] = {}
    for request_id, (prompt, params) in crowd.items():
        if isinstance(params, BeamSearchParams):
            searches[request_id] = engine.add_beam_search(request_id, prompt, params)
        else:
            engine.add_request(request_id, prompt, params)
    for _ in range(most_steps):
        for output in engine.step():
            answers.setdefault(output.seq_id, []).append(output.token)
        for failure in engine.take_failures():
            assert failure.request_id not in failed, "one request failed twice"
            failed[failure.request_id] = failure.error
        if isinstance(engine.manager, PagedBatchManager):
            check_pages(engine.manager)
        if not engine.has_work:
            break
    assert not engine.has_work, "somebody hangs"
    for request_id, search in searches.items():
        if request_id not in failed:
            assert not search.beams, "a search never ended"
            answers[request_id] = [token for ended in search.ended for token in ended.hypothesis.tokens]
    return answers, failed


def of_request(answers: Answers, request_id: str) -> Answers:
    return {seq_id: tokens for seq_id, tokens in answers.items() if seq_id.split("/")[0] == request_id}


@pytest.fixture(scope="module")
def undisturbed() -> Answers:
    answers, failed = serve(crowded_engine(tiny_model()), CROWD)
    assert not failed
    return answers


def raising_once(
    function: Callable[..., Any], call: int, after: bool, calls: Counter[str]
) -> Callable[..., Any]:
    """The function, but its `call`-th call raises, before it does anything or when it has."""

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
    (engine_core, "make_output"),
    (engine_core, "record_prompt_logprobs"),
    (engine_core, "likeliest"),
    (token_output, "sample_token"),
    (BeamSearch, "advance"),
]


@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fault_anywhere_in_a_step_ends_at_most_one_request(
    owner: Any, name: str, after: bool, undisturbed: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same crowd undisturbed, for all who have not failed."""
    original = getattr(owner, name)
    for call in (1, 2, 5, 12):
        calls: Counter[str] = Counter()
        engine = crowded_engine(tiny_model())
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising_once(original, call, after, calls))
            answers, failed = serve(engine, CROWD)
        assert calls["all"] >= 1, f"{name} is never called: nothing was injected"
        assert len(failed) <= 1, f"{name}, call {call}: {failed}"
        for request_id in CROWD.keys() - failed.keys():
            assert of_request(answers, request_id) == of_request(undisturbed, request_id), (name, call)
        check_all_returned(engine.manager)


def poisoned(model: Model, harm: Callable[[mx.array, mx.array], mx.array]) -> Model:
    """A model that does harm to the logits of a step with the poisoned token in it."""

    class Poisoned(Model):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            logits = super().__call__(tokens, context)
            is_poison = tokens[0] == POISON
            return harm(logits, is_poison) if is_poison.any().item() else logits

    return Poisoned(**{name: getattr(model, name) for name in model.__dataclass_fields__})


def refuse(logits: mx.array, is_poison: mx.array) -> mx.array:
    raise InjectedError


with_poison = CROWD | {
    "poisoned": ([*random_prompt(8, 9), POISON], SamplingParams(max_tokens=5, ignore_eos=True))
}


def test_a_request_that_breaks_the_model_fails_alone(undisturbed: Answers) -> None:
    engine = crowded_engine(poisoned(tiny_model(), refuse))
    answers, failed = serve(engine, with_poison)
    assert list(failed) == ["poisoned"]
    assert isinstance(failed["poisoned"], InjectedError)
    for request_id in CROWD:
        assert of_request(answers, request_id) == of_request(undisturbed, request_id)
    check_all_returned(engine.manager)


def test_an_engine_goes_on_after_a_failure(undisturbed: Answers) -> None:
    engine = crowded_engine(poisoned(tiny_model(), refuse))
    serve(engine, with_poison)
    answers, failed = serve(engine, CROWD)
    assert not failed
    for request_id in ("greedy", "three", "late", "searched"):
        assert of_request(answers, request_id) == of_request(undisturbed, request_id)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(seed=1, top_p=0.9)])
def test_logits_that_are_no_numbers_fail_the_request_that_has_them(
    params: SamplingParams, undisturbed: Answers
) -> None:
    def spoil(logits: mx.array, is_poison: mx.array) -> mx.array:
        return mx.concatenate([logits[:, :-1], logits[:, -1:] * mx.nan], axis=1)

    crowd = {"poisoned": ([POISON], replace(params, max_tokens=5, ignore_eos=True))}
    engine = crowded_engine(poisoned(tiny_model(), spoil))
    answers, failed = serve(engine, crowd)
    assert isinstance(failed["poisoned"], NotANumberError)
    assert "'poisoned'" in str(failed["poisoned"])
    answers, failed = serve(engine, {"greedy": CROWD["greedy"]})
    assert answers["greedy"] == undisturbed["greedy"]
    check_all_returned(engine.manager)


def test_requests_that_fail_only_together_are_thinned_out_until_the_rest_can_go_on() -> None:
    """A fault of the crowd, and of nobody in it: somebody has to give way, or nobody would ever get on."""

    class Crowded(Model):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            if context.logit_rows is not None and context.logit_rows.shape[0] > 2:
                raise InjectedError
            return super().__call__(tokens, context)

    model = tiny_model()
    crowded = Crowded(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    manager = PagedBatchManager(40, 8, 6, model=crowded)
    answers, failed = serve(EngineCore(manager, (EOS,)), {f"r{i}": ([9 + i], params) for i in range(4)})
    assert list(failed) == ["r3", "r2"]
    assert all(len(answers[request_id]) == 4 for request_id in ("r0", "r1"))


def test_arrays_that_were_lost_are_computed_again(
    undisturbed: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool itself cannot be evaluated any more: everything in it is given up."""
    engine = crowded_engine(tiny_model())
    evaluate, calls = KVPool.evaluate, Counter[str]()

    def lost(pool: KVPool, *outputs: mx.array) -> None:
        calls["all"] += 1
        if calls["all"] in (20, 21):  # the step's, and the attempt to settle after it
            for layer, (keys, values) in enumerate(zip(pool._keys, pool._values, strict=True)):
                pool.put_back(layer, keys * mx.nan, values * mx.nan)
            raise InjectedError
        evaluate(pool, *outputs)

    monkeypatch.setattr(KVPool, "evaluate", lost)
    answers, failed = serve(engine, CROWD)
    assert len(failed) <= 1
    for request_id in CROWD.keys() - failed.keys():
        assert of_request(answers, request_id) == of_request(undisturbed, request_id)
    check_all_returned(engine.manager)


def test_a_fault_under_dense_batching_fails_alone_too() -> None:
    crowd = {name: with_poison[name] for name in ("greedy", "three", "late", "poisoned")}
    clean, _ = serve(EngineCore(DenseBatchManager(6, 64, model=tiny_model()), (EOS,)), crowd)
    engine = EngineCore(DenseBatchManager(6, 64, model=poisoned(tiny_model(), refuse)), (EOS,))
    answers, failed = serve(engine, crowd)
    assert list(failed) == ["poisoned"]
    assert {name: tokens for name, tokens in clean.items() if name != "poisoned"} == answers
