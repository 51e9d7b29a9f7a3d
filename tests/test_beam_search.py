"""Beam search: hypotheses against enumeration and against a search written from the definition; which beams
hold which pages; and the engine's searches against one that computes every beam from scratch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache, partial
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.beam_search import BeamSearch, Choice, Ended, Hypothesis
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import DuplicateRequestError, OutOfBlocksError, RequestTooLargeError, SamplingParamsError
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.model import Model
from tiny_llm.sampling_params import SamplingParams

from promises import Watched, check_all_returned, check_pages, policies
from tiny_llm import LLM, BeamSearchPageManager, BeamSearchParams, BlockAllocator, BlockTable, fork_sequence
from tiny_model import EOS, dense_model, examples, random_prompt, tiny_model

Tokens = tuple[int, ...]
Table = Callable[[Tokens], list[float]]  # the log-probability of each token after those


def uneven(prefix: Tokens, vocab: int, seed: int) -> list[float]:
    """Log-probabilities whose probabilities sum to one, and which depend on all tokens before."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).normal(size=vocab) * 1.5
    return [float(x) for x in row - np.log(np.exp(row).sum())]


def coarse(prefix: Tokens, vocab: int, seed: int) -> list[float]:
    """Small whole numbers: many hypotheses have exactly equal sums. They need not be probabilities."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).integers(-3, 0, size=vocab)
    return [float(x) for x in row]


def searched(table: Table, params: BeamSearchParams, eos: Seq[int]) -> tuple[BeamSearch, int]:
    """A finished search, and how often it advanced; each beam offers `num_candidates` likeliest tokens."""
    search = BeamSearch(params, eos)
    for steps in count():
        if not search.beams:
            return search, steps
        assert steps < params.max_tokens, "the search went on after the longest output"
        offered = [likeliest(table(beam.tokens), search.num_candidates) for beam in search.beams]
        parents = search.beams
        choices = search.advance(offered)
        assert len(choices) == len(search.beams) <= params.beam_width
        for (parent, token), beam in zip(choices, search.beams, strict=True):
            assert beam.tokens == (*parents[parent].tokens, token), (
                "a beam continues another beam than its parent"
            )
            assert beam.logprob == parents[parent].logprob + table(parents[parent].tokens)[token]
    raise AssertionError


def likeliest(row: Seq[float], number: int) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, likeliest first, as the engine offers them."""
    return sorted(enumerate(row), key=lambda pair: (-pair[1], pair[0]))[:number]


def score(logprob: float, num_tokens: int, penalty: float) -> float:
    """The score by definition."""
    return logprob / num_tokens**penalty


def all_hypotheses(table: Table, params: BeamSearchParams, eos: Seq[int]) -> Iterator[Ended]:
    """Every text that ends, by end of sequence or by length, by enumeration."""
    ends = () if params.ignore_eos else eos

    def grow(tokens: Tokens, logprob: float) -> Iterator[Ended]:
        for token, more in enumerate(table(tokens)):
            grown = Hypothesis((*tokens, token), logprob + more)
            if token not in ends and len(grown.tokens) < params.max_tokens:
                yield from grow(*grown)
            else:
                value = score(grown.logprob, len(grown.tokens), params.length_penalty)
                yield Ended(value, grown, "stop" if token in ends else "length")

    return grow((), 0.0)


def by_definition(table: Table, params: BeamSearchParams, eos: Seq[int]) -> list[Ended]:
    """Beam search by definition: every token of every beam is a candidate, and nothing stops it early."""
    width, ends = params.beam_width, () if params.ignore_eos else eos
    living, ended = [Hypothesis((), 0.0)], []
    for length in range(1, params.max_tokens + 1):
        grown = [
            Hypothesis((*beam.tokens, token), beam.logprob + more)
            for beam in living
            for token, more in enumerate(table(beam.tokens))
        ]
        grown.sort(key=lambda one: -one.logprob)  # ties keep their order: better parent, smaller token
        for one in grown[:width]:
            if one.tokens[-1] in ends or length == params.max_tokens:
                value = score(one.logprob, length, params.length_penalty)
                ended.append(Ended(value, one, "stop" if one.tokens[-1] in ends else "length"))
        living = [one for one in grown if one.tokens[-1] not in ends][:width]
    return sorted(ended, key=lambda one: -one.score)[:width]


# ---- which hypotheses ----


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [(), (1,), (0, 2)], ids=["no_eos", "one_eos", "two_eos"])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_enough_beam_finds_every_possible_text(
    penalty: float, eos: tuple[int, ...], seed: int
) -> None:
    """All 3 to the power of 5 texts fit into the beam: nothing is pruned, and nothing ends early."""
    table = partial(uneven, vocab=3, seed=seed)
    params = BeamSearchParams(beam_width=3**5, max_tokens=5, length_penalty=penalty)
    search, steps = searched(table, params, eos)
    assert steps == 5
    assert sorted(search.ended) == sorted(all_hypotheses(table, params, eos))
    assert [one.score for one in search.ended] == sorted((one.score for one in search.ended), reverse=True)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_holds_every_prefix_finds_the_best_of_all_texts(penalty: float, seed: int) -> None:
    """One of 4 tokens ends a text: at most 27 prefixes go on together, and 108 candidates are ranked."""
    table = partial(uneven, vocab=4, seed=seed)
    params = BeamSearchParams(beam_width=108, max_tokens=4, length_penalty=penalty)
    best = sorted(all_hypotheses(table, params, (2,)), key=lambda one: -one.score)[:108]
    search, _ = searched(table, params, (2,))
    assert search.ended == best


@settings(max_examples=examples(400))
@given(
    table=st.sampled_from([uneven, coarse]),
    vocab=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    eos=st.sets(st.integers(0, 5), max_size=3),
    width=st.integers(1, 7),
    max_tokens=st.integers(1, 7),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    ignore_eos=st.booleans(),
)
@example(uneven, 4, 0, {0}, 1, 1, 1.0, False)
@example(coarse, 2, 0, {0, 1}, 3, 4, 1.0, False)
def test_a_search_finds_the_same_hypotheses_as_the_definition(
    table: Callable[..., list[float]],
    vocab: int,
    seed: int,
    eos: set[int],
    width: int,
    max_tokens: int,
    penalty: float,
    ignore_eos: bool,
) -> None:
    """Neither the early stop nor the few candidates that each beam offers change the result."""
    params = BeamSearchParams(
        beam_width=width, max_tokens=max_tokens, length_penalty=penalty, ignore_eos=ignore_eos
    )
    known = partial(table, vocab=vocab, seed=seed)
    search, _ = searched(known, params, sorted(eos))
    assert search.ended == by_definition(known, params, sorted(eos))


def fixed(rows: dict[Tokens, Seq[float]]) -> Table:
    """A table of a few rows, given as probabilities."""
    return lambda prefix: [float(np.log(p)) for p in rows[prefix]]


def test_ties_go_to_the_better_parent_and_then_to_the_smaller_token() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=9), ())
    assert search.advance([[(5, -1.0), (2, -1.0), (9, -1.0), (1, -2.0)]]) == [(0, 2), (0, 5), (0, 9)]
    level = [(7, -1.0), (3, -1.0)]
    assert search.advance([level, level, level]) == [(0, 3), (0, 7), (1, 3)]
    assert [beam.tokens for beam in search.beams] == [(2, 3), (2, 7), (5, 3)]


def test_a_beam_may_have_several_children_or_none() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), ())
    search.advance([[(0, -1.0), (1, -2.0)]])
    assert search.advance([[(4, -0.5), (5, -0.6)], [(6, -0.5), (7, -9.0)]]) == [Choice(0, 4), Choice(0, 5)]
    assert search.advance([[(1, -5.0), (2, -6.0)], [(3, -0.1), (4, -0.2)]]) == [Choice(1, 3), Choice(1, 4)]


def test_a_hypothesis_with_an_end_token_is_kept_only_if_it_is_among_the_best_and_takes_no_beam_slot() -> None:
    table = fixed({(): [0.5, 0.3, 0.2], (0,): [0.1, 0.6, 0.3], (1,): [0.4, 0.5, 0.1]})
    search, _ = searched(table, BeamSearchParams(beam_width=2, max_tokens=2, length_penalty=0), (2,))
    texts = {one.hypothesis.tokens: one.finish_reason for one in search.ended}
    assert texts == {(0, 1): "length", (0, 2): "stop"}, "(2,) was third of its step; 0.5 * 0.3 and 0.3 * 0.5"


def test_a_search_stops_early_if_no_beam_can_improve_the_result() -> None:
    """The first token ends the text with probability 0.9; without a length reward nothing can beat that."""
    table = fixed({(): [0.9, 0.1], (1,): [0.5, 0.5], (1, 1): [0.5, 0.5]})
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=0)
    assert searched(table, params, (0,))[1] == 1
    rewarded = replace(params, length_penalty=5.0)
    search, steps = searched(table, rewarded, (0,))
    assert steps > 1, "ten times less likely, and divided by up to 3**5"
    assert search.ended == by_definition(table, rewarded, (0,))


def test_an_ignored_end_of_sequence_is_an_ordinary_token() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    table = partial(uneven, vocab=3, seed=1)
    search, steps = searched(table, params, (0, 1, 2))
    assert (steps, search.num_candidates) == (3, 2)
    assert [(len(one.hypothesis.tokens), one.finish_reason) for one in search.ended] == [(3, "length")] * 2
    assert search.ended == searched(table, replace(params, ignore_eos=False), ())[0].ended


def test_an_end_token_at_the_last_position_finishes_with_reason_stop_and_not_length() -> None:
    table = fixed({(): [0.6, 0.4], (1,): [0.3, 0.7]})
    search, _ = searched(table, BeamSearchParams(beam_width=3, max_tokens=2, length_penalty=0), (0,))
    reasons = {one.hypothesis.tokens: one.finish_reason for one in search.ended}
    assert reasons == {(0,): "stop", (1, 1): "length", (1, 0): "stop"}


def test_the_length_penalty_decides_between_short_and_long_texts() -> None:
    """One token with 0.4, or four that have 0.6 times 0.7 cubed, 0.21, together: -0.92 and -1.58."""
    table = fixed({(): [0.4, 0.6], **{(1,) * n: [0.3, 0.7] for n in (1, 2, 3)}})
    for penalty, length in ((-1.0, 1), (0.0, 1), (1.0, 4), (2.0, 4)):
        params = BeamSearchParams(beam_width=4, max_tokens=4, length_penalty=penalty)
        best = searched(table, params, (0,))[0].ended[0]
        assert len(best.hypothesis.tokens) == length
        assert best.score == pytest.approx(
            {1: np.log(0.4), 4: np.log(0.6 * 0.7**3)}[length] / length**penalty
        )


REFUSED = {
    "zero_beam_width": ({"beam_width": 0}, "beam_width must be at least 1, not 0"),
    "negative_beam_width": ({"beam_width": -2}, "beam_width must be at least 1, not -2"),
    "zero_max_tokens": ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
    "length_penalty_too_large": ({"length_penalty": 10.5}, "length_penalty must be from -10 to 10, not 10.5"),
    "length_penalty_too_small": ({"length_penalty": -11}, "length_penalty must be from -10 to 10, not -11"),
    "length_penalty_nan": ({"length_penalty": float("nan")}, "length_penalty must be .* not nan"),
    "fractional_beam_width": ({"beam_width": 2.5}, "beam_width must be a whole number, not 2.5"),
    "max_tokens_as_text": ({"max_tokens": "9"}, "max_tokens must be a whole number, not '9'"),
    "beam_width_as_bool": ({"beam_width": True}, "beam_width must be a whole number, not True"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_parameters_are_rejected(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 8, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [-10, 10, -10.0, 10.0])
def test_the_largest_length_penalties_can_be_computed(penalty: float) -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=10**7, length_penalty=penalty)
    assert np.isfinite(params.score(-1e5, 10**7))
    assert params.score(-1e5, 10**7) != 0


# ---- whose pages ----


class Pages:
    """A pool of plain values: which beam's token is in which slot. Makes the copies, and writes."""

    def __init__(self) -> None:
        self.held: dict[int, object] = {}

    def expand(self, beams: BeamSearchPageManager, beam_id: int, tokens: list[int]) -> int:
        """Extend a beam; returns how many blocks were copied."""
        table = beams.tables[beam_id]
        before = table.num_tokens
        copies = beams.expand_beam(beam_id, tokens)
        for src, dst, length in copies:
            for offset in range(length):
                source, target = (block * table.block_size + offset for block in (src, dst))
                self.held[target] = self.held[source]
        for slot, token in zip(table.slots(before, table.num_tokens), tokens, strict=True):
            self.held[slot] = token
        return len(copies)

    def read(self, table: BlockTable) -> list[object]:
        return [self.held[slot] for slot in table.slots(0, table.num_tokens)]


def check_conserved(allocator: BlockAllocator, tables: Seq[BlockTable]) -> None:
    """Check that every block is free, or referenced once by each table that holds it."""
    held = Counter(block for table in tables for block in table.blocks)
    counted = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    assert counted == [held[block] for block in range(allocator.num_blocks)]
    assert allocator.num_free == counted.count(0)


def test_beams_share_their_common_blocks_and_copy_one_block_each() -> None:
    """11 tokens in blocks of 4 are 3 blocks; three beams on them are 3 until they write, then 2 + 3."""
    pages, allocator = Pages(), BlockAllocator(12)
    beams = BeamSearchPageManager(3, allocator, page_size=4)
    prompt = list(range(100, 111))
    assert pages.expand(beams, 0, prompt) == 0
    ids = [0, beams.fork_beam(0), beams.fork_beam(0)]
    assert (beams.num_physical_blocks, beams.num_logical_blocks) == (3, 9)
    copied = [pages.expand(beams, beam_id, [beam_id]) for beam_id in ids]
    assert copied == [1, 1, 0], "by then the last beam is the only holder of the block"
    assert (beams.num_physical_blocks, beams.num_logical_blocks) == (5, 9)
    for beam_id in ids:
        assert pages.read(beams.tables[beam_id]) == [*prompt, beam_id]
    beams.prune(ids[1:])
    assert allocator.num_free == 12 - 3
    beams.prune([0])
    assert (allocator.num_free, dict(beams.tables)) == (12, {})


def test_a_beam_that_does_not_fit_stays_unchanged() -> None:
    allocator = BlockAllocator(2)
    beams = BeamSearchPageManager(2, allocator, page_size=2)
    beams.expand_beam(0, [1, 2, 3])
    child = beams.fork_beam(0)
    for beam_id, tokens in ((0, [4]), (child, [4, 5]), (0, [4, 5, 6, 7])):
        with pytest.raises(OutOfBlocksError):
            beams.expand_beam(beam_id, tokens)
        check_conserved(allocator, list(beams.tables.values()))
        assert [table.num_tokens for table in beams.tables.values()] == [3, 3]
    beams.prune([0])
    assert beams.expand_beam(child, [4]) == [], "no other beam holds its last block now"


def test_there_are_never_more_beams_than_the_beam_size() -> None:
    allocator = BlockAllocator(4)
    beams = BeamSearchPageManager(2, allocator)
    beams.expand_beam(0, [1])
    child = beams.fork_beam(0)
    with pytest.raises(ValueError, match="beam 0 cannot be forked: all 2 beams are in use"):
        beams.fork_beam(0)
    check_conserved(allocator, list(beams.tables.values()))
    beams.prune([0])
    grandchild = beams.fork_beam(child)
    assert grandchild not in (0, child), "beam ids are not reused"
    assert set(beams.tables) == {child, grandchild}


def test_unknown_beams_raise_key_error() -> None:
    beams = BeamSearchPageManager(3, BlockAllocator(4))
    beams.prune([0])
    for call in (
        beams.fork_beam,
        partial(beams.expand_beam, new_tokens=[1]),
        lambda beam: beams.prune([beam]),
    ):
        for beam_id in (0, 1, -1):
            with pytest.raises(KeyError):
                call(beam_id)
    assert dict(beams.tables) == {}


def test_if_one_beam_cannot_be_pruned_none_is() -> None:
    allocator = BlockAllocator(4)
    beams = BeamSearchPageManager(3, allocator, page_size=2)
    beams.expand_beam(0, [1, 2, 3])
    child = beams.fork_beam(0)
    with pytest.raises(KeyError):
        beams.prune([child, 9])
    assert set(beams.tables) == {0, child}
    check_conserved(allocator, list(beams.tables.values()))


@pytest.mark.parametrize("beam_size", [0, -1])
def test_a_search_has_at_least_one_beam(beam_size: int) -> None:
    with pytest.raises(ValueError, match=f"beam_size must be at least 1, not {beam_size}"):
        BeamSearchPageManager(beam_size, BlockAllocator(1))


def test_a_page_has_16_tokens_by_default() -> None:
    beams = BeamSearchPageManager(1, BlockAllocator(4))
    beams.expand_beam(0, [1] * 17)
    assert beams.num_physical_blocks == 2


class Beams(RuleBasedStateMachine):
    """Beams grow, fork and end in any order, in a pool that is often too small for them."""

    allocator: BlockAllocator
    texts: dict[int, list[int]]

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5), beam_size=st.integers(1, 5))
    def build(self, num_blocks: int, block_size: int, beam_size: int) -> None:
        self.allocator, self.pages, self.fresh = BlockAllocator(num_blocks), Pages(), count()
        self.beams = BeamSearchPageManager(beam_size, self.allocator, block_size)
        self.texts = {0: []}

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 4), num_tokens=st.integers(0, 7))
    def expand(self, which: int, num_tokens: int) -> None:
        beam_id = self.chosen(which)
        tokens = [next(self.fresh) for _ in range(num_tokens)]
        table = self.beams.tables[beam_id]
        needed = table.blocks_to_append(num_tokens)
        if needed <= self.allocator.num_free:
            self.pages.expand(self.beams, beam_id, tokens)
            self.texts[beam_id] += tokens
            return
        before = list(table.blocks)
        with pytest.raises(OutOfBlocksError):
            self.beams.expand_beam(beam_id, tokens)
        assert table.blocks == before

    @precondition(lambda self: 0 < len(self.texts) < self.beams.beam_size)
    @rule(which=st.integers(0, 4))
    def fork(self, which: int) -> None:
        parent, free = self.chosen(which), self.allocator.num_free
        child = self.beams.fork_beam(parent)
        assert child not in self.texts
        assert self.allocator.num_free == free
        self.texts[child] = list(self.texts[parent])

    @precondition(lambda self: len(self.texts) > 1)
    @rule(which=st.sets(st.integers(0, 4), min_size=1))
    def prune(self, which: set[int]) -> None:
        pruned = sorted({self.chosen(one) for one in which})[: len(self.texts) - 1]
        self.beams.prune(pruned)
        self.texts = {beam_id: text for beam_id, text in self.texts.items() if beam_id not in pruned}

    def chosen(self, which: int) -> int:
        return sorted(self.texts)[which % len(self.texts)]

    @invariant()
    def check(self) -> None:
        assert set(self.beams.tables) == set(self.texts)
        check_conserved(self.allocator, list(self.beams.tables.values()))
        for beam_id, text in self.texts.items():
            assert self.pages.read(self.beams.tables[beam_id]) == text, "a beam reads another beam's token"
        held = [table.blocks for table in self.beams.tables.values()]
        assert self.beams.num_logical_blocks == sum(map(len, held))
        assert self.beams.num_physical_blocks == self.allocator.num_blocks - self.allocator.num_free

    def teardown(self) -> None:
        if hasattr(self, "beams"):
            self.beams.prune(list(self.texts))
            assert self.allocator.num_free == self.allocator.num_blocks


def test_beams_conserve_pages_and_read_their_own_tokens_after_any_events() -> None:
    run_state_machine_as_test(Beams, settings=settings(max_examples=examples(100), stateful_step_count=30))


def test_a_sequence_can_be_forked_into_tables_that_were_used_before() -> None:
    allocator = BlockAllocator(10)
    parent, empty, busy, idle = (BlockTable(allocator, 2) for _ in range(4))
    for table, tokens in ((parent, 5), (busy, 6), (idle, 1)):
        table.append_tokens(tokens)
    fork_sequence(parent, (table for table in (empty, busy)))
    assert parent.blocks == empty.blocks == busy.blocks
    assert (parent.num_tokens, empty.num_tokens, busy.num_tokens, idle.num_tokens) == (5, 5, 5, 1)
    check_conserved(allocator, [parent, empty, busy, idle])
    busy.append_tokens(1)
    assert parent.blocks == empty.blocks, "no two tables share a list"
    assert parent.blocks[:2] == busy.blocks[:2]
    check_conserved(allocator, [parent, empty, busy, idle])


def test_forking_again_or_into_itself_changes_nothing() -> None:
    allocator = BlockAllocator(4)
    parent, child = BlockTable(allocator, 2), BlockTable(allocator, 2)
    parent.append_tokens(3)
    for _ in range(2):
        fork_sequence(parent, [child, parent])
        assert (child.blocks, child.num_tokens, parent.num_tokens) == (parent.blocks, 3, 3)
        check_conserved(allocator, [parent, child])
    fork_sequence(parent, [])
    check_conserved(allocator, [parent, child])


# ---- searches of the engine ----


@cache
def logits_from_nothing(model: Model, tokens: Tokens) -> np.ndarray:
    """The logits after these tokens: no cache, no batch."""
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    return np.array(model(mx.array([tokens], mx.int32), context)[0, -1].astype(mx.float32)).astype(np.float64)


def logprob_table(model: Model, prompt: Seq[int]) -> Table:
    """The model's log-probabilities after a prompt, as a table."""

    def table(tokens: Tokens) -> list[float]:
        row = logits_from_nothing(model, (*prompt, *tokens))
        return [float(x) for x in row - row.max() - np.log(np.exp(row - row.max()).sum())]

    return table


def engine_of(
    model: Model,
    *,
    blocks: int = 64,
    block_size: int = 4,
    max_seqs: int = 8,
    budget: int = 64,
    preempts: bool = True,
) -> tuple[EngineCore, Watched]:
    """An engine on pages that store keys and values as they are computed."""
    manager = Watched(
        blocks,
        block_size,
        max_seqs,
        model=model,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        policies=policies(preempts),
    )
    return EngineCore(manager, model.config.eos_token_ids), manager


def run(engine: EngineCore, manager: Watched) -> None:
    """Step until every request has finished."""
    for _ in range(500):
        if not engine.has_work:
            break
        engine.step()
        check_pages(manager)
    check_all_returned(manager)


def check_found(found: list[Ended], expected: list[Ended]) -> None:
    """Check for the same hypotheses, best first, with scores that differ only by rounding."""
    assert [one.hypothesis.tokens for one in found] == [one.hypothesis.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    np.testing.assert_allclose(
        [one.score for one in found], [one.score for one in expected], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        [one.hypothesis.logprob for one in found],
        [one.hypothesis.logprob for one in expected],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("ignore_eos", "penalty"), [(False, 1.0), (True, 1.0), (False, -1.0), (False, 2.0), (False, 0.0)]
)
def test_the_engine_finds_the_same_hypotheses_as_a_search_without_a_cache(
    width: int, ignore_eos: bool, penalty: float
) -> None:
    model = dense_model()
    engine, manager = engine_of(model)
    params = BeamSearchParams(beam_width=width, max_tokens=6, ignore_eos=ignore_eos, length_penalty=penalty)
    prompt = random_prompt(9, seed=5)
    search = engine.add_beam_search("a", prompt, params)
    run(engine, manager)
    check_found(search.ended, by_definition(logprob_table(model, prompt), params, (EOS,)))
    assert width == 1 or manager.happened["beams forked"] > 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 5])
@pytest.mark.parametrize("eos", [(), (0,)], ids=["no_eos", "eos"])
def test_the_vocabulary_may_be_smaller_than_the_beam_width(vocab: int, eos: tuple[int, ...]) -> None:
    """The first step has fewer candidates than beams; the other sequence slots stay reserved."""
    model = dense_model(vocab_size=vocab, eos_token_ids=eos)
    engine, manager = engine_of(model, max_seqs=6)
    params = BeamSearchParams(beam_width=6, max_tokens=4)
    search = engine.add_beam_search("a", [vocab - 1] * 5, params)
    seen = []
    for _ in range(4):
        engine.step()
        check_pages(manager)
        seen.append(len(search.beams))
        if not search.beams:
            break
        assert sum(1 + beam.num_forks for beam in manager.running) == 6, "no slot is given to another request"
    assert seen[0] == min(6, vocab - len(eos))
    run(engine, manager)
    check_found(search.ended, by_definition(logprob_table(model, [vocab - 1] * 5), params, eos))


def test_a_search_for_one_token_takes_one_step() -> None:
    model = dense_model()
    engine, manager = engine_of(model)
    params = BeamSearchParams(beam_width=4, max_tokens=1)
    prompt = random_prompt(6, seed=3)
    search = engine.add_beam_search("a", prompt, params)
    assert engine.step() == []
    assert not engine.has_work
    check_all_returned(manager)
    check_found(search.ended, by_definition(logprob_table(model, prompt), params, (EOS,)))
    assert [len(one.hypothesis.tokens) for one in search.ended] == [1] * 4


@pytest.mark.parametrize("width", [1, 3])
def test_a_search_starts_once_its_chunked_prompt_is_computed(width: int) -> None:
    model = dense_model()
    engine, manager = engine_of(model, budget=4)
    params = BeamSearchParams(beam_width=width, max_tokens=5)
    prompt = random_prompt(14, seed=8)
    search = engine.add_beam_search("a", prompt, params)
    for _ in range(3):
        engine.step()
        assert search.beams == [Hypothesis((), 0.0)]
    run(engine, manager)
    check_found(search.ended, by_definition(logprob_table(model, prompt), params, (EOS,)))


def test_searches_and_requests_run_together_in_a_small_pool() -> None:
    """Each answer equals the one computed alone; no pages are missing at the end."""
    model = dense_model()
    searches = {
        "wide": (random_prompt(9, 1), BeamSearchParams(beam_width=4, max_tokens=7)),
        "long": (random_prompt(5, 2), BeamSearchParams(beam_width=2, max_tokens=14, ignore_eos=True)),
        "short": (random_prompt(12, 3), BeamSearchParams(beam_width=3, max_tokens=2, length_penalty=0.0)),
        "same": (random_prompt(9, 1), BeamSearchParams(beam_width=3, max_tokens=7)),
    }
    requests = {
        "one": (random_prompt(7, 4), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)),
        "two": (random_prompt(4, 5), SamplingParams(max_tokens=9, n=2, seed=3)),
    }
    alone: dict[str, list[int]] = {}
    for name, (prompt, params) in requests.items():
        engine, manager = engine_of(model)
        engine.add_request(name, prompt, params)
        alone |= tokens_of(engine)
    engine, manager = engine_of(model, blocks=22, block_size=3, max_seqs=9, budget=16)
    found = {}
    for name in ("wide", "one", "long", "two", "short", "same"):
        if name in searches:
            found[name] = engine.add_beam_search(name, *searches[name])
        else:
            engine.add_request(name, *requests[name])
    assert tokens_of(engine) == alone
    check_all_returned(manager)
    for name, (prompt, params) in searches.items():
        check_found(found[name].ended, by_definition(logprob_table(model, prompt), params, (EOS,)))
    assert manager.happened["beams forked"] > 0


def tokens_of(engine: EngineCore) -> dict[str, list[int]]:
    """The tokens of every sequence of the ordinary requests, after all have finished."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.seq_id, []).append(output.token)
    return tokens


def test_preempted_beams_find_the_same_hypotheses_as_without_preemption() -> None:
    model = dense_model()
    params = BeamSearchParams(beam_width=3, max_tokens=10, ignore_eos=True)
    engine, manager = engine_of(model, blocks=17, block_size=2, max_seqs=8)
    engine.add_request("old", random_prompt(5, 1), SamplingParams(max_tokens=28, ignore_eos=True, seed=1))
    for _ in range(12):
        engine.step()
    search = engine.add_beam_search("a", random_prompt(4, 2), params)
    run(engine, manager)
    assert manager.happened["preemptions of beams"] > 0
    check_found(search.ended, by_definition(logprob_table(model, random_prompt(4, 2)), params, (EOS,)))


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_cancelled_search_releases_everything_and_disturbs_no_other_request(after: int) -> None:
    model = dense_model()
    engine, manager = engine_of(model, budget=8)
    params = BeamSearchParams(beam_width=3, max_tokens=9, ignore_eos=True)
    cancelled = engine.add_beam_search("gone", random_prompt(12, 1), params)
    kept = engine.add_beam_search("kept", random_prompt(6, 2), params)
    for _ in range(after):
        engine.step()
    engine.cancel("gone")
    engine.cancel("gone")
    check_pages(manager)
    assert {sequence.request_id for sequence in [*manager.running, *manager.waiting]} == {"kept"}
    run(engine, manager)
    assert cancelled.ended == []
    assert cancelled.beams, "the caller still finds the beams at the time of the cancel"
    check_found(kept.ended, by_definition(logprob_table(model, random_prompt(6, 2)), params, (EOS,)))
    assert engine.add_beam_search("gone", random_prompt(3, 1), params).beams, "the id is free again"


def test_a_beam_search_has_no_token_outputs() -> None:
    engine, _ = engine_of(dense_model())
    engine.add_beam_search("a", random_prompt(3, 1), BeamSearchParams(beam_width=2, max_tokens=3))
    engine.add_request("b", random_prompt(3, 2), SamplingParams(max_tokens=3, temperature=0))
    assert set(tokens_of(engine)) == {"b"}


def test_contiguous_caches_cannot_be_shared_by_beams() -> None:
    manager = DenseBatchManager(4, 32, model=dense_model())
    engine = EngineCore(manager, (EOS,))
    with pytest.raises(ValueError, match="batching='paged'"):
        engine.add_beam_search("a", [1, 2], BeamSearchParams(beam_width=2, max_tokens=4))
    assert not engine.has_work


def test_a_search_that_can_never_run_is_rejected_on_arrival() -> None:
    engine, manager = engine_of(tiny_model(), blocks=10, block_size=2, max_seqs=4)
    wide, long = {"beam_width": 5, "max_tokens": 2}, {"beam_width": 4, "max_tokens": 11}
    for options, message in (
        (wide, "n = 5 exceeds the 4 sequences"),
        (long, "need .* blocks of 2; the pool has 10"),
        ({"beam_width": 1, "max_tokens": 126}, "exceed the context of 128"),
    ):
        with pytest.raises(RequestTooLargeError, match=message):
            engine.add_beam_search("a", [1, 2, 3], BeamSearchParams(**options))
    with pytest.raises(ValueError, match="no tokens"):
        engine.add_beam_search("a", [], BeamSearchParams(beam_width=1, max_tokens=1))
    assert not engine.has_work
    check_all_returned(manager)
    fits = BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True)  # 1 shared block and 4 times 3
    with pytest.raises(RequestTooLargeError):
        engine.add_beam_search("a", [1, 2, 3], fits)
    search = engine.add_beam_search("a", [1, 2, 3], replace(fits, beam_width=3))
    with pytest.raises(DuplicateRequestError):
        engine.add_beam_search("a", [1], fits)
    with pytest.raises(DuplicateRequestError):
        engine.add_request("a/1", [1], SamplingParams())
    run(engine, manager)
    assert len(search.ended) == 3


def test_llm_beam_search_returns_texts_with_their_scores(embedded_llm: LLM) -> None:
    """The embedded model. Oracle: every beam's logits from scratch, on separate pages, in one chunk."""
    text, params = "The best thing about the sea is", BeamSearchParams(beam_width=3, max_tokens=4)
    prompt = embedded_llm.tokenizer.encode(text)

    def table(tokens: Tokens) -> list[float]:
        row = np.array(embedded_llm.logits([*prompt, *tokens])[-1]).astype(np.float64)
        return [float(x) for x in row - row.max() - np.log(np.exp(row - row.max()).sum())]

    [output] = embedded_llm.beam_search(text, params)
    expected = by_definition(table, params, embedded_llm.model_config.eos_token_ids)
    assert [one.tokens for one in output.sequences] == [(*prompt, *one.hypothesis.tokens) for one in expected]
    np.testing.assert_allclose(
        [(one.score, one.cum_logprob) for one in output.sequences],
        [(one.score, one.hypothesis.logprob) for one in expected],
        atol=1e-5,
    )
    for sequence in output.sequences:
        assert sequence.text == embedded_llm.tokenizer.decode(list(sequence.tokens[len(prompt) :]))
        assert sequence.finish_reason == "length"
    check_all_returned(embedded_llm.core.manager)


def test_several_prompts_are_searched_together_and_answered_in_order(embedded_llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    prompts = ["Once upon a time", embedded_llm.tokenizer.encode("The capital of France is")]
    together = embedded_llm.beam_search(prompts, params)
    assert together == [embedded_llm.beam_search(prompt, params)[0] for prompt in prompts]
    assert embedded_llm.beam_search([], params) == []


@pytest.mark.parametrize("bad", [[10**6], [], [7] * 9000], ids=["unknown_token", "empty", "too_long"])
def test_an_invalid_prompt_rejects_the_call_and_leaves_nothing_behind(
    embedded_llm: LLM, bad: list[int]
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        embedded_llm.beam_search(["fine", bad], BeamSearchParams(beam_width=2, max_tokens=3))
    check_all_returned(embedded_llm.core.manager)
