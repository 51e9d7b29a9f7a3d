"""Promises 1 and 2 on a real forward pass: a tiny random model, and the embedded one, in small pools.

The oracle is the engine itself, serving the same completion alone: equal means equal bits.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from tiny_llm.attention import causal_mask
from tiny_llm.errors import GrammarError
from tiny_llm.grammar import Grammar
from tiny_llm.grouped_attention import grouped_query_attention
from tiny_llm.kv_pool import KVPool
from tiny_llm.linear import Linear, PackedLinear
from tiny_llm.loader import load_model
from tiny_llm.model import Model
from tiny_llm.paged_attention import BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import Attended, PackedBatch, PagedContext
from tiny_llm.prefix_cache import KeptBlock, PartMatch, PrefixCache
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sampler import adjust_logits, sample_token, uniform
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.step import Plan
from tiny_llm.swap import SwapSpace
from tiny_llm.token_output import Choice, Place

import tiny_llm_kernels
from grammars import toy_compiler
from promises import (
    ALIKE,
    LONG,
    MANY_ROWS,
    MIXED_REQUESTS,
    SQUEEZED,
    STRUCTURED,
    SWAPPED,
    SWAPPED_OFTEN,
    Arrival,
    Scenario,
    assert_caught,
    check_scenario,
    kernels_on,
    keys_backwards,
    scenarios,
)
from tiny_llm import paged_kernel, prefix_cache, token_output
from tiny_llm_checkpoints.errors import ModelFileError
from tiny_model import (
    VOCAB,
    eight_bit_model,
    examples,
    gemma_model,
    logits_through_pages,
    qwen_model,
    random_prompt,
    tiny_model,
)

compiled_only = pytest.mark.skipif(
    not tiny_llm_kernels.available(), reason=f"no compiled kernels: {tiny_llm_kernels.why_unavailable()}"
)


@compiled_only
def test_the_tiny_model_runs_on_the_packed_kernels() -> None:
    assert isinstance(tiny_model().lm_head, PackedLinear)
    assert isinstance(tiny_model().layers[0].mlp.down_proj, PackedLinear)


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("make", "cases"),
    [(tiny_model, 150), (eight_bit_model, 60), (qwen_model, 60), (gemma_model, 90)],
    ids=["quantized", "8 bits", "qwen", "gemma"],
)
def test_scheduling_never_changes_the_answer_and_pages_are_conserved(
    make: Callable[[], Model], cases: int
) -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=examples(cases))
    @given(scenarios())
    @example(ALIKE)
    @example(SQUEEZED)
    @example(SWAPPED)
    @example(SWAPPED_OFTEN)
    @example(MANY_ROWS)
    @example(replace(SWAPPED, drafts=5))
    @example(replace(ALIKE, drafts=9))
    @example(replace(STRUCTURED, drafts=6))
    @example(STRUCTURED)
    def every_completion_equals_the_one_alone(scenario: Scenario) -> None:
        seen = check_scenario(make(), scenario)
        for name in sorted(seen):
            event(name, "some" if seen[name] else "none")
        happened.update(seen)

    every_completion_equals_the_one_alone()
    often = [
        "answers compared",
        "structured answers compared",
        "forks",
        "copies on write",
        "chunked prompts",
        "mixed steps",
        "cancelled requests",
        "prefix hits",
        "beams forked",
        "blocks moved",
        "pool growths",
        "guesses accepted",
        "guesses rejected",
    ]
    now_and_then = ["searches compared", "partial block hits", "failed completions"]
    pressure = ["preemptions", "preemptions after output", "sequences swapped out", "blocks swapped in"]
    if make is gemma_model:  # windows need fewer blocks: test_swap has tighter pools
        now_and_then += [*pressure, "blocks released by windows"]
    else:
        often += pressure
        now_and_then.append("preemptions of beams")
    for name in often:
        assert happened[name] >= examples(cases) // 15, f"the scenarios hardly test {name}: {happened}"
    for name in now_and_then:
        assert happened[name] >= 1, f"the scenarios never test {name}: {happened}"


@pytest.mark.parametrize("make", [tiny_model, eight_bit_model, qwen_model, gemma_model])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_long_contexts_get_the_same_answer_in_any_batch(make: Callable[[], Model], threads: int) -> None:
    model = make()
    long_model = replace(model, config=replace(model.config, max_position_embeddings=400))
    threads = threads if tiny_llm_kernels.available() else 1
    happened = check_scenario(long_model, replace(LONG, threads=threads))
    for name in ("answers compared", "mixed steps", "prefix hits", "chunked prompts"):
        assert happened[name] >= 1, f"the scenario does not test {name}: {happened}"


@st.composite
def chunkings(draw: st.DrawFn, length: int) -> list[int]:
    """Sizes of chunks that sum to `length`."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=10)) | {0, length})
    return [stop - start for start, stop in pairwise(cuts)]


@settings(max_examples=examples(60))
@given(
    make=st.sampled_from([tiny_model, qwen_model, gemma_model]),
    data=st.data(),
    length=st.integers(2, 120),
    block_size=st.integers(1, 17),
    threads=st.integers(1, 4),
)
def test_every_row_of_logits_has_the_same_bits_for_any_chunks(
    make: Callable[[], Model], data: st.DataObject, length: int, block_size: int, threads: int
) -> None:
    prompt = random_prompt(length, seed=length)
    chunks = data.draw(chunkings(length))
    with kernels_on(1, ""):
        whole = np.array(logits_through_pages(make(), prompt, [length]))
    with kernels_on(threads, ""):
        cut = np.array(logits_through_pages(make(), prompt, chunks, block_size=block_size))
    assert np.array_equal(whole, cut)


@pytest.fixture(scope="module")
def embedded() -> Model:
    if not tiny_llm_kernels.available():
        pytest.skip(f"no compiled kernels: {tiny_llm_kernels.why_unavailable()}")
    try:
        return load_model(None).model
    except ModelFileError as error:
        pytest.skip(str(error))


@pytest.mark.drawn
def test_the_embedded_model_gives_the_same_answers_in_any_batch(embedded: Model) -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=examples(4))
    @given(scenarios(most_requests=4, longest_prompt=40, most_tokens=6))
    @example(MIXED_REQUESTS)
    @example(ALIKE)
    @example(SQUEEZED)
    @example(SWAPPED)
    @example(STRUCTURED)
    @example(LONG)
    @example(replace(MIXED_REQUESTS, block_size=5, max_tokens=6, threads=3, spare_blocks=0))
    def every_completion_equals_the_one_alone(scenario: Scenario) -> None:
        happened.update(check_scenario(embedded, scenario))

    every_completion_equals_the_one_alone()
    for name in ("answers compared", "preemptions", "forks", "copies on write", "chunked prompts"):
        assert happened[name] >= 2, f"the scenarios hardly test anything: {happened}"


def test_the_embedded_models_logits_have_the_same_bits_for_any_chunks(embedded: Model) -> None:
    prompt = random_prompt(150, seed=5)
    whole = np.array(logits_through_pages(embedded, prompt, [150]))
    assert np.array_equal(
        whole, np.array(logits_through_pages(embedded, prompt, [1, 2, 60, 7, 80], block_size=7))
    )


# Mutants: each is a plausible mistake, and the same check catches it.


def assert_caught_by_check(strategy: st.SearchStrategy[Scenario] | None = None) -> None:
    assert_caught(
        lambda scenario: check_scenario(tiny_model(), scenario), scenarios() if strategy is None else strategy
    )


def test_a_sample_that_depends_on_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = count()
    monkeypatch.setattr(
        "tiny_llm.token_output.sample_token",
        lambda row, params, seed, index: sample_token(row, params, 0, next(draws)),
    )
    assert_caught_by_check()


def test_an_attention_with_another_order_of_summation_for_single_tokens_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("write_and_attend", "paged_attention"):
        monkeypatch.setattr(paged_kernel, name, getattr(paged_kernel, name).__wrapped__)
    monkeypatch.setattr(paged_kernel, "grouped_query_attention", keys_backwards(grouped_query_attention))
    assert_caught_by_check()


def test_a_last_block_that_leaves_out_a_row_with_logits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run_block = PagedContext.run_block

    def with_the_first_row(self: PagedContext, layer: int, block: Any, x: mx.array) -> mx.array:
        rows = self.logit_rows
        self.logit_rows = None if rows is None else rows[:1]
        try:
            return run_block(self, layer, block, x)
        finally:
            self.logit_rows = rows

    check_scenario(tiny_model(), MANY_ROWS)
    monkeypatch.setattr(PagedContext, "run_block", with_the_first_row)
    assert_caught_by_check(st.just(MANY_ROWS))


def test_attention_that_reads_its_own_chunk_before_rounding_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        keys: mx.array,
        values: mx.array,
        batch: PackedBatch,
        scale: float,
    ) -> Attended:
        packed, outputs = 0, []
        for table, start, stop in batch.spans:
            rows = slice(packed, packed + stop - start)
            past = [gathered(pool, table, start) for pool in (keys, values)]
            now = [
                mx.concatenate([old, new[:, :, rows]], axis=2) for old, new in zip(past, (k, v), strict=True)
            ]
            outputs.append(
                grouped_query_attention(q[:, :, rows], *now, scale, causal_mask(stop - start, stop))
            )
            packed = rows.stop
        stored = stored_by(q, k, v, keys, values, batch, scale)
        return Attended(mx.concatenate(outputs, axis=2), stored.keys, stored.values)

    def gathered(pool: mx.array, table: BlockTable, length: int) -> mx.array:
        copied = mx.array(np.array(pool.astype(mx.float32)))  # now, before this step's write
        blocks = copied[mx.array(table.blocks)].swapaxes(0, 1)
        return blocks.reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :length]

    stored_by = paged_kernel.write_and_attend.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(paged_kernel, "write_and_attend", attend)
    assert_caught_by_check()


def test_a_matmul_with_another_order_of_summation_for_single_rows_is_caught() -> None:
    @dataclass(frozen=True)
    class SingleRowsBackwards(Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return x[..., ::-1] @ self.weight[:, ::-1].T if x.shape[-2] == 1 else x @ self.weight.T

    model = tiny_model()
    mutant = replace(model, lm_head=SingleRowsBackwards(model.lm_head.rows(mx.arange(VOCAB))))
    assert_caught(lambda scenario: check_scenario(mutant, scenario), scenarios())


def test_a_forgotten_copy_on_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "_last_block_is_shared", lambda self: False)
    assert_caught_by_check()


def test_a_planned_copy_that_is_not_made_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVPool, "copy_blocks", lambda self, copies: None)
    assert_caught_by_check()


def test_a_reference_that_leaks_on_preemption_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(sequence: PagedSequence) -> None:
        sequence.table.blocks.clear()
        sequence.table.num_tokens = sequence.num_computed = 0

    monkeypatch.setattr(PagedSequence, "release_pages", forget)
    assert_caught_by_check()


def test_outputs_that_become_prompt_when_preempted_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def become_prompt(sequence: PagedSequence) -> None:
        sequence.table.release()
        sequence.prompt = (*sequence.prompt, *sequence.outputs)
        sequence.outputs, sequence.num_computed = [], 0

    monkeypatch.setattr(PagedSequence, "release_pages", become_prompt)
    assert_caught_by_check()


def test_forks_that_sample_with_the_same_seed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = PagedSequence.fork
    monkeypatch.setattr(PagedSequence, "fork", lambda self, seq_id, seed: fork(self, seq_id, self.seed))
    assert_caught_by_check()


def test_penalties_that_forget_the_outputs_before_a_preemption_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The counts start from zero after a sequence has been recomputed."""
    release_pages = PagedSequence.release_pages

    def forget(sequence: PagedSequence) -> None:
        release_pages(sequence)
        sequence.forgotten = len(sequence.outputs)  # type: ignore[attr-defined]

    def choose(place: Place, row: mx.array, eos: frozenset[int]) -> Choice:
        return penalized(place, row, place.outputs[getattr(place.sequence, "forgotten", 0) :])

    monkeypatch.setattr(PagedSequence, "release_pages", forget)
    monkeypatch.setattr("tiny_llm.engine_core.choose_token", choose)
    assert_caught_by_check()


def penalized(place: Place, row: mx.array, counted: Sequence[int]) -> Choice:
    """A choice with penalties for outputs that are not the sequence's."""
    params, seed, index = place.sequence.params, place.sequence.seed, len(place.outputs)
    token = sample_token(adjust_logits(row, params, place.sequence.prompt, counted, ()), params, seed, index)
    return Choice(place, row, token, row[token])


def test_penalties_of_one_row_that_affect_another_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Sequence[int]] = [[]]

    def choose(place: Place, row: mx.array, eos: frozenset[int]) -> Choice:
        before.append(place.outputs)
        return penalized(place, row, before[-2])

    monkeypatch.setattr("tiny_llm.engine_core.choose_token", choose)
    assert_caught_by_check()


def test_a_trusted_hash_that_ignores_earlier_blocks_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KeptBlock, "is_block", lambda self, stream, index: True)
    monkeypatch.setattr(prefix_cache, "block_hash", lambda parent, tokens: repr(tuple(tokens)).encode())
    assert_caught_by_check(colliding_scenarios())


def test_a_hit_that_shares_a_block_of_other_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    match_part = PrefixCache.match_part

    def too_long(cache: PrefixCache, parent: bytes, tokens: list[int]) -> PartMatch | None:
        match = match_part(cache, parent, tokens)
        return None if match is None else PartMatch(match.block, len(tokens))

    monkeypatch.setattr(PrefixCache, "match_part", too_long)
    assert_caught_by_check(st.just(ALIKE))


def test_a_compaction_that_forgets_the_prefix_cache_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "rename_blocks", lambda self, moved: None)
    assert_caught_by_check(st.just(replace(ALIKE, compacted_at=tuple(range(30)))))


def test_a_swap_out_after_the_pages_were_reused_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are swapped out after the step has been computed, not before."""
    run, swap = PagedBatchManager.run_plan, PagedBatchManager._swap

    def late(manager: PagedBatchManager, plan: Plan) -> mx.array | None:
        rows = run(manager, plan)
        swap(manager, manager.pool, plan)
        return rows

    monkeypatch.setattr(PagedBatchManager, "_swap", lambda manager, pool, plan: None)
    monkeypatch.setattr(PagedBatchManager, "run_plan", late)
    assert_caught_by_check(st.just(SWAPPED))


def test_a_swap_of_the_wrong_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapSpace, "_find", lambda space, sequence, table, place: 0 if place else None)
    assert_caught_by_check(st.just(SWAPPED))


def test_beams_that_share_more_than_their_common_prefix_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_llm.paged_queues._common_length", lambda lists: len(lists[0]) - 1)
    assert_caught_by_check(st.just(SQUEEZED))


def test_pages_of_wrong_guesses_that_are_not_released_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "remove_tokens", lambda table, num_tokens: [])
    assert_caught_by_check(guessing())


def test_wrong_guesses_that_count_as_computed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(sequence: PagedSequence) -> list[int]:
        sequence.num_computed += len(sequence.draft)
        sequence.draft = []
        return []

    monkeypatch.setattr(PagedSequence, "settle_draft", settle)
    assert_caught_by_check(guessing())


def test_guesses_that_are_drawn_with_the_same_random_number_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Place, "uniform", property(lambda place: uniform(place.sequence.seed, len(place.sequence.outputs)))
    )
    assert_caught_by_check(st.just(replace(SWAPPED, drafts=6)))


def test_penalties_that_ignore_guesses_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "outputs", property(lambda place: place.sequence.outputs))
    assert_caught_by_check(guessing())


def test_guesses_that_enter_the_prefix_cache_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a step are cached before its guesses are checked."""
    keep = PrefixSharing.keep

    def too_early(sharing: PrefixSharing, sequence: PagedSequence, start: int) -> None:
        guessed = len(sequence.draft)
        sequence.num_computed += guessed
        keep(sharing, sequence, start)
        sequence.num_computed -= guessed

    monkeypatch.setattr(PrefixSharing, "keep", too_early)
    assert_caught_by_check(st.just(replace(SWAPPED, drafts=6, swap_blocks=0)))


def guessing() -> st.SearchStrategy[Scenario]:
    """Scenarios with speculation."""
    return scenarios().map(lambda scenario: replace(scenario, drafts=6))


def test_forks_that_share_their_leaders_grammar_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grammar, "fork", lambda self: self)
    try:
        assert_caught_by_check(st.just(STRUCTURED))
    finally:
        toy_compiler.cache_clear()  # its compiled grammars are not as they were


def test_a_mask_of_another_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = token_output.stacked_masks
    monkeypatch.setattr(token_output, "stacked_masks", lambda masks: stacked([*masks[1:], masks[0]]))
    roomy = replace(STRUCTURED, spare_blocks=200)  # otherwise rows with different masks never meet in a step
    assert_caught_by_check(st.just(roomy))


def test_a_grammar_that_starts_again_after_a_preemption_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    release_pages = PagedSequence.release_pages

    def forget(sequence: PagedSequence) -> None:
        release_pages(sequence)
        if sequence.grammar is not None and sequence.outputs:
            with suppress(GrammarError):  # it may have failed already
                sequence.grammar.rollback(len(sequence.outputs))

    monkeypatch.setattr(PagedSequence, "release_pages", forget)
    assert_caught_by_check(st.just(STRUCTURED))


def test_a_mask_that_adjusted_rows_do_not_get_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty or a bias changes the row first, so it is not chosen together with others."""
    monkeypatch.setattr(token_output, "keep_allowed", lambda row, mask: row)
    assert_caught_by_check(st.just(STRUCTURED))


def test_a_mask_that_ignores_guesses_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = Grammar.allowed
    monkeypatch.setattr(Grammar, "allowed", lambda grammar, ahead=(): allowed(grammar))
    assert_caught_by_check(st.just(replace(STRUCTURED, drafts=6)))


def test_a_grammar_that_stays_behind_a_guess_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grammar, "rollback", lambda grammar, num_tokens: None)
    assert_caught_by_check(st.just(replace(STRUCTURED, drafts=6)))


def colliding_scenarios() -> st.SearchStrategy[Scenario]:
    """Scenarios whose blocks hold equal tokens after different prefixes."""
    shared = tuple(random_prompt(4, 1))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    arrivals = tuple(Arrival(3 * i, tuple(random_prompt(4, i)) + shared, params) for i in range(5, 8))
    return st.just(replace(ALIKE, arrivals=arrivals, block_size=4))
