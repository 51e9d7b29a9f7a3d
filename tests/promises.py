"""The engine's first two promises as functions, so that mutants of the engine can be run through them.

Scheduling never changes the answer: `check_scenario` serves a crowd of requests from a small pool and
compares every finished completion with the same completion computed alone, in one chunk, in a roomy
pool, on one thread. Pages are conserved: `check_pages` counts the holders of every block.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_llm.engine_core import EngineCore, TokenLogprobs
from tiny_llm.errors import RequestTooLargeError
from tiny_llm.model import Model
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.preemption import RecomputeNewestFirst
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence, completion_ids
from tiny_llm.step import Plan, StepLogits

import tiny_llm_kernels
from tiny_model import EOS, VOCAB, examples, random_prompt

# Pages.


def check_pages(manager: PagedBatchManager) -> None:
    """Free + referenced = total, and every reference is one table's: counted, not believed."""
    allocator = manager.allocator
    counted = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    tables = [sequence.table for sequence in [*manager.running, *manager.waiting]]
    held = Counter(block for table in tables for block in table.blocks)
    assert counted == [held[block] for block in range(allocator.num_blocks)], "a reference that no table owns"
    assert allocator.num_free == counted.count(0), "free blocks and unreferenced blocks differ"
    for table in tables:
        assert len(set(table.blocks)) == len(table.blocks), "a table holds a block twice"
        assert len(table.blocks) == -(-table.num_tokens // table.block_size), (
            "a table holds blocks for no token"
        )
    for sequence in [*manager.running, *manager.waiting]:
        assert sequence.num_computed == sequence.table.num_tokens, "a page for a token that is not computed"
    assert all(not sequence.table.blocks for sequence in manager.waiting), "a waiting sequence holds pages"


def arrival_order(manager: PagedBatchManager, arrivals: Mapping[str, int]) -> list[tuple[int, str]]:
    """Who runs and who waits, in the manager's order, as (arrival, sequence id)."""
    return [(arrivals[seq.request_id], seq.seq_id) for seq in [*manager.running, *manager.waiting]]


def check_first_come_first_served(manager: PagedBatchManager, arrivals: Mapping[str, int]) -> None:
    """Nobody runs while one who came earlier waits."""
    order = arrival_order(manager, arrivals)
    assert order == sorted(order), f"somebody was overtaken: {order}"


def check_all_returned(manager: PagedBatchManager) -> None:
    """Nothing runs, nothing waits, and every block is free."""
    assert not manager.has_work
    assert not manager.running
    assert not manager.waiting
    assert manager.allocator.num_free == manager.allocator.num_blocks, (
        "pages are missing after the last request"
    )


class Watched(PagedBatchManager):
    """A batch manager that counts what happened to it, and shows each plan to whoever asks."""

    def __init__(
        self, *args: object, watch: Callable[[Plan], None] = lambda plan: None, **options: object
    ) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.happened: Counter[str] = Counter()
        self._watch = watch

    def _schedule(self) -> Plan:
        plan = super()._schedule()
        self.happened["steps"] += 1
        self.happened["copies on write"] += len(plan.copies)
        chunks = [chunk for chunk in plan.chunks if chunk.stop < chunk.sequence.num_tokens]
        self.happened["prompts cut into chunks"] += len(chunks)
        decodes = sum(chunk.stop - chunk.start == 1 and chunk.start > 0 for chunk in plan.chunks)
        self.happened["mixed steps"] += 0 < decodes < len(plan.chunks)
        self._watch(plan)
        return plan

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        forked = super()._fork(leader)
        self.happened["forks"] += len(forked) - 1
        return forked

    def _preempt(self, sequence: PagedSequence) -> None:
        self.happened["preemptions"] += 1
        self.happened["preemptions of outputs"] += bool(sequence.outputs)
        super()._preempt(sequence)


# Scenarios.


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the step before which it is cancelled, if ever."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    cancelled_at: int | None = None


@dataclass(frozen=True)
class Scenario:
    """Requests and the engine that they meet. `spare_blocks` come on top of what the largest one needs."""

    arrivals: tuple[Arrival, ...]
    block_size: int
    spare_blocks: int
    max_seqs: int
    max_tokens: int
    threads: int
    instruction_set: str
    preempts: bool


class Answer(NamedTuple):
    """What one completion got: tokens, log-probabilities, the logits behind each token, why it ended.

    prompt_logprobs: what came with each token: with the first one, where they were asked for.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    logits: tuple[bytes, ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...]
    finish_reason: str | None


def policies(preempts: bool) -> Policies:
    """Preemption by recompute, or none."""
    return Policies(RecomputeNewestFirst()) if preempts else Policies()


def smallest_pool(arrivals: tuple[Arrival, ...], block_size: int, max_seqs: int, preempts: bool) -> int:
    """The fewest blocks with which the door lets every request in."""
    blocks = 1
    for arrival in arrivals:
        while not _admits(arrival, blocks, block_size, max_seqs, preempts):
            blocks += 1
    return blocks


def _admits(arrival: Arrival, blocks: int, block_size: int, max_seqs: int, preempts: bool) -> bool:
    manager = PagedBatchManager(
        blocks, block_size, max_seqs, max_model_len=10_000, policies=policies(preempts)
    )
    try:
        return manager.add_request(list(arrival.prompt), "probe", arrival.params)
    except RequestTooLargeError:
        return False


@st.composite
def sampling(draw: st.DrawFn, most_tokens: int, vocab: int) -> SamplingParams:
    """Parameters of every kind; small ranges, so that what is drawn matters."""
    max_tokens = draw(st.sampled_from([1, 2, most_tokens // 2, most_tokens - 1, most_tokens]))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5])),
        top_k=draw(st.sampled_from([0, 1, 5, 40])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        seed=draw(st.none() | st.integers(0, 2**40)),
        stop_token_ids=draw(st.sampled_from([None, None, tuple(range(0, vocab, 20))])),
        ignore_eos=draw(st.booleans()),
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, 0, max_tokens // 2, max_tokens])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=draw(st.sampled_from([None, None, {3: 4.0, vocab - 1: -100.0}, {EOS: 1.0}])),
    )


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    most_requests: int = 6,
    longest_prompt: int = 30,
    most_tokens: int = 20,
    vocab: int = VOCAB,
) -> Scenario:
    """Crowds of requests that meet a pool between barely enough and roomy."""
    arrivals = []
    for _ in range(draw(st.integers(min(3, most_requests), most_requests))):
        step = draw(st.sampled_from([0, 0, 1, 2, 6]))
        length = draw(st.integers(1, 6) | st.integers(1, longest_prompt))
        arrivals.append(
            Arrival(
                step=step,
                prompt=tuple(random_prompt(length, seed=draw(st.integers(0, 999)))),
                params=draw(sampling(most_tokens, vocab)),
                cancelled_at=draw(st.sampled_from([None] * 7 + [step + 9, step + 2, step])),
            )
        )
    max_seqs = max(draw(st.integers(1, 9)), *(arrival.params.n for arrival in arrivals))
    compiled = tiny_llm_kernels.available()
    return Scenario(
        arrivals=tuple(sorted(arrivals, key=lambda arrival: arrival.step)),
        block_size=draw(st.integers(1, 3) | st.integers(1, 17)),
        spare_blocks=draw(st.sampled_from([1, 0, 0, 1, 2, 4, 30])),
        max_seqs=max_seqs,
        max_tokens=draw(st.sampled_from([max_seqs, max_seqs + 1, max_seqs + 5, 20, 64])),
        threads=draw(st.integers(1, 4)) if compiled else 1,
        instruction_set=draw(st.sampled_from(tiny_llm_kernels.instruction_sets())) if compiled else "",
        preempts=draw(st.sampled_from([True] * 6 + [False])),
    )


# A crowd that is sure to fork, to be preempted and to be cut into chunks.
CROWD = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(9, 1)), SamplingParams(max_tokens=10, temperature=0.0, logprobs=2)),
        Arrival(
            0, tuple(random_prompt(5, 2)), SamplingParams(max_tokens=10, n=3, seed=5, top_p=0.9, logprobs=0)
        ),
        Arrival(1, tuple(random_prompt(30, 3)), SamplingParams(max_tokens=4, temperature=0.7, top_k=20)),
        Arrival(2, tuple(random_prompt(3, 4)), SamplingParams(max_tokens=10, min_p=0.05), cancelled_at=9),
    ),
    block_size=2,
    spare_blocks=1,
    max_seqs=6,
    max_tokens=11,
    threads=2,
    instruction_set="",
    preempts=True,
)


# Scheduling never changes the answer.


def check_scenario(model: Model, scenario: Scenario) -> Counter[str]:
    """Serve a scenario, check every promise on the way, and compare each answer with the one alone.

    Returns how often each event that matters happened, so that a test can show that they do.
    """
    blocks = scenario.spare_blocks + smallest_pool(
        scenario.arrivals, scenario.block_size, scenario.max_seqs, scenario.preempts
    )
    manager = Watched(
        blocks,
        scenario.block_size,
        scenario.max_seqs,
        model=model,
        max_batched_tokens=max(scenario.max_tokens, scenario.max_seqs),
        policies=policies(scenario.preempts),
    )
    with kernels_on(scenario.threads, scenario.instruction_set):
        answers, seeds = _serve(manager, scenario)
    check_all_returned(manager)
    with kernels_on(1, scenario.instruction_set):
        for index, arrival in enumerate(scenario.arrivals):
            for i, seq_id in enumerate(completion_ids(str(index), arrival.params.n)):
                answer = answers[seq_id]
                if answer.finish_reason is None:
                    assert arrival.cancelled_at is not None, f"completion {seq_id} never ended"
                    manager.happened["cancelled under way"] += 1
                    continue
                params = replace(arrival.params, n=1)
                check_same(seq_id, answer, answer_alone(model, arrival.prompt, params, seeds[str(index)] + i))
                manager.happened["answers compared"] += 1
    return manager.happened


def check_same(seq_id: str, answer: Answer, alone: Answer) -> None:
    """Bit for bit: tokens, log-probabilities, whole rows of logits, and the reason of the end."""
    assert answer.tokens == alone.tokens, f"completion {seq_id} got other tokens than alone"
    assert answer.logits == alone.logits, f"completion {seq_id} got other logits than alone"
    assert answer.logprobs == alone.logprobs, f"completion {seq_id} got other log-probabilities than alone"
    assert answer.prompt_logprobs == alone.prompt_logprobs, (
        f"completion {seq_id} got other log-probabilities of its prompt than alone"
    )
    assert answer.finish_reason == alone.finish_reason, (
        f"completion {seq_id} ended for another reason than alone"
    )


def answer_alone(model: Model, prompt: tuple[int, ...], params: SamplingParams, seed: int) -> Answer:
    """One completion by itself: a fresh engine, the prompt in one chunk, a roomy pool of common blocks."""
    longest = len(prompt) + (params.max_tokens or 0)
    manager = Watched(longest, 16, 1, model=model, max_batched_tokens=max(512, longest))
    alone = Scenario((Arrival(0, prompt, replace(params, seed=seed)),), 16, 0, 1, 512, 1, "", False)
    return _serve(manager, alone)[0]["0"]


@contextmanager
def kernels_on(threads: int, instruction_set: str) -> Iterator[None]:
    """Run the compiled kernels, where there are any, on so many threads and this instruction set."""
    if tiny_llm_kernels.available():
        tiny_llm_kernels.set_num_threads(threads)
        tiny_llm_kernels.select_instruction_set(instruction_set or tiny_llm_kernels.instruction_set())
    yield


def _serve(manager: Watched, scenario: Scenario) -> tuple[dict[str, Answer], dict[str, int]]:
    """Run a scenario to its end: answers by sequence id, and the seed of each request."""
    engine = EngineCore(manager, (EOS,), seed=11)
    answers: dict[str, list[object]] = {}
    reasons: dict[str, str | None] = {}
    seeds: dict[str, int] = {}
    rows = _recorded_logits(manager)
    for step in range(_step_bound(scenario)):
        for index, arrival in enumerate(scenario.arrivals):
            if arrival.step == step:
                assert engine.add_request(str(index), list(arrival.prompt), arrival.params)
                ids = completion_ids(str(index), arrival.params.n)
                answers |= {seq_id: [] for seq_id in ids}
                seeds[str(index)] = manager.sequence(ids[0]).seed
            if arrival.cancelled_at == step:
                engine.cancel(str(index))
        for output in engine.step():
            got = (output.token, output.logprobs, rows[output.seq_id], output.prompt_logprobs)
            answers[output.seq_id].append(got)
            reasons[output.seq_id] = output.finish_reason
        check_pages(manager)
        check_first_come_first_served(manager, {str(i): i for i in range(len(scenario.arrivals))})
        if not engine.has_work and step >= max(arrival.step for arrival in scenario.arrivals):
            break
    assert not engine.has_work, f"not done after {_step_bound(scenario)} steps"
    return {
        seq_id: Answer(*(tuple(column) for column in zip(*got, strict=True)), reasons[seq_id])  # type: ignore[arg-type]
        if got
        else Answer((), (), (), (), None)
        for seq_id, got in answers.items()
    }, seeds


def _step_bound(scenario: Scenario) -> int:
    """Steps within which everybody is served: the oldest always runs, and computes a token a step."""
    work = sum(a.params.n * (len(a.prompt) + (a.params.max_tokens or 0)) for a in scenario.arrivals)
    return max(arrival.step for arrival in scenario.arrivals) + work + 1


def _recorded_logits(manager: PagedBatchManager) -> dict[str, bytes]:
    """The bytes of the last step's logits by sequence id, refilled at each `process_batch`."""
    recorded: dict[str, bytes] = {}
    process_batch = manager.process_batch

    def recording() -> StepLogits:
        logits = process_batch()
        rows = None if logits.rows is None else np.array(logits.rows)
        recorded.clear()
        recorded.update(
            {seq_id: rows[row].tobytes() for seq_id, row in logits.row_of.items() if rows is not None}
        )
        return logits

    manager.process_batch = recording  # type: ignore[method-assign]
    return recorded


# Mutants.


def assert_caught(check: Callable[[Scenario], object], strategy: st.SearchStrategy[Scenario]) -> None:
    """Fail unless the property breaks on some example, as it must where the engine is a mutant."""

    @settings(max_examples=examples(60), phases=[Phase.generate], report_multiple_bugs=False, database=None)
    @given(strategy)
    def search(scenario: Scenario) -> None:
        check(scenario)

    with pytest.raises(AssertionError):
        search()


def keys_backwards(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An attention that sums over its keys from the last to the first where it has a single query."""

    def attention(
        q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
    ) -> mx.array:
        if q.shape[2] > 1 or mask is None:
            return function(q, k, v, scale, mask)
        return function(q, k[:, :, ::-1], v[:, :, ::-1], scale, mask[:, ::-1])

    return attention
