"""Day 3.2, tasks 7 to 10: beams that share pages, and the selection of beams in each step."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import cast

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
from tiny_llm.beam_search import (
    BeamSearch,
    BeamSearchPageManager,
    BeamSearchParams,
    Choice,
    Ended,
    Hypothesis,
    fork_sequence,
)
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.paged_attention import BlockAllocator, BlockTable

from common.beams import Table, by_definition, check_found
from common.blocks import filled
from common.examples import quick
from common.plain_pool import PlainPool, check_conserved

# Task 7: fork_sequence


def test_task_7_all_beams_share_the_blocks_of_the_parent() -> None:
    """Oracle: by hand: 6 tokens in 2 blocks of 4, and three more references to each. Nothing is copied."""
    allocator = BlockAllocator(8)
    parent = filled(allocator, 6)
    beams = [BlockTable(allocator, 4) for _ in range(3)]
    fork_sequence(parent, beams)
    assert [(beam.blocks, beam.num_tokens) for beam in beams] == [(parent.blocks, 6)] * 3
    counts = Counter(allocator.ref_count(block) for block in parent.blocks)
    assert counts == Counter({4: 2})
    assert allocator.num_free == 6


def test_task_7_blocks_that_a_beam_held_before_are_freed() -> None:
    """Oracle: by hand: 9 tokens were 3 blocks. Overwriting the table without releasing it leaks them."""
    allocator = BlockAllocator(8)
    parent, beam, other = filled(allocator, 6), filled(allocator, 9), filled(allocator, 3)
    fork_sequence(parent, [beam])
    assert allocator.num_free == 5, "the 3 blocks that the beam's table held before must be freed"
    check_conserved(allocator, parent, beam, other)


def test_task_7_forked_tables_grow_independently() -> None:
    """Oracle: by hand: a write to one does not change the others. Common mistake: one list for all."""
    allocator = BlockAllocator(8)
    parent, first, second = filled(allocator, 6), BlockTable(allocator, 4), BlockTable(allocator, 4)
    fork_sequence(parent, [first, second])
    first.append_tokens(5)
    assert (parent.num_tokens, second.num_tokens, first.num_tokens) == (6, 6, 11)
    assert len(first.blocks) == 3
    assert second.blocks == parent.blocks
    assert first.blocks[:1] == parent.blocks[:1]
    check_conserved(allocator, parent, first, second)
    for table in (first, parent, second):
        table.release()
    assert allocator.num_free == 8


def test_task_7_forking_again_changes_nothing() -> None:
    """Oracle: by hand: the parent may be one of the beams, and the beams may be any iterable."""
    allocator = BlockAllocator(4)
    parent, beam = filled(allocator, 6), BlockTable(allocator, 4)
    for _ in range(3):
        fork_sequence(parent, iter([beam, parent]))
        assert (beam.blocks, beam.num_tokens, parent.num_tokens) == (parent.blocks, 6, 6)
        check_conserved(allocator, parent, beam)
    fork_sequence(parent, [])
    check_conserved(allocator, parent, beam)


def test_task_7_an_empty_parent_empties_its_beams() -> None:
    """Oracle: by hand."""
    allocator = BlockAllocator(4)
    parent, beam = BlockTable(allocator, 4), filled(allocator, 5)
    fork_sequence(parent, [beam])
    assert (len(beam.blocks), beam.num_tokens, allocator.num_free) == (0, 0, 4)


# Task 8: BeamSearchPageManager.fork_beam


def beams_of(prompt: int = 6, *, beam_size: int = 3, num_blocks: int = 8) -> BeamSearchPageManager:
    """Beam 0 with a prompt of `prompt` tokens, in blocks of 4."""
    beams = BeamSearchPageManager(beam_size, BlockAllocator(num_blocks), page_size=4)
    beams.tables[0].append_tokens(prompt)
    return beams


def test_task_8_a_new_beam_shares_every_page() -> None:
    """Oracle: by hand: 6 tokens are 2 pages; three beams of them hold the same 2."""
    beams = beams_of()
    allocator = beams.tables[0].allocator
    ids = [beams.fork_beam(0) for _ in range(2)]
    assert len({0, *ids}) == 3
    assert set(beams.tables) == {0, *ids}
    assert all(beams.tables[i].blocks == beams.tables[0].blocks for i in ids)
    assert [beams.tables[i].num_tokens for i in ids] == [6, 6]
    assert (beams.num_logical_blocks, beams.num_physical_blocks, allocator.num_free) == (6, 2, 6)
    check_conserved(allocator, *beams.tables.values())


def test_task_8_a_forked_beam_can_be_forked() -> None:
    """Oracle: by hand: it shares the pages of the beam that it was forked from."""
    beams = beams_of()
    child = beams.fork_beam(0)
    beams.tables[child].append_tokens(7)
    grandchild = beams.fork_beam(child)
    assert beams.tables[grandchild].blocks == beams.tables[child].blocks
    assert beams.tables[grandchild].num_tokens == 13
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


def test_task_8_a_fork_beyond_the_beam_size_is_rejected() -> None:
    """Oracle: the docstring: with two of two beams nothing is forked, not even an unknown one; no leak."""
    beams = beams_of(beam_size=2)
    child = beams.fork_beam(0)
    for parent in (0, child, 9):
        with pytest.raises(ValueError):
            beams.fork_beam(parent)
    assert set(beams.tables) == {0, child}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


@pytest.mark.parametrize("beam_id", [1, 7, -1])
def test_task_8_forking_an_unknown_beam_raises_key_error(beam_id: int) -> None:
    """Oracle: the docstring."""
    beams = beams_of()
    with pytest.raises(KeyError):
        beams.fork_beam(beam_id)
    assert set(beams.tables) == {0}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


@pytest.mark.parametrize("ended", [1, 2])
def test_task_8_a_beam_id_is_never_reused(ended: int) -> None:
    """Oracle: the docstring: of the beams 0, 1 and 2 one was pruned; the next id differs from all three.

    Common mistakes: the number of active beams, one more than the highest active id.
    """
    beams = beams_of()
    ids = {0, beams.fork_beam(0), beams.fork_beam(0)}
    tables = cast("dict[int, BlockTable]", beams.tables)
    tables.pop(sorted(ids)[ended]).release()  # as `prune`, the next exercise, does
    child = beams.fork_beam(0)
    assert child not in ids, "the id of a pruned beam was reused"
    assert len(beams.tables) == 3
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


class BeamPages(PlainPool):
    """The pages of the beams of one search."""

    def expand(self, beams: BeamSearchPageManager, beam_id: int, tokens: list[int]) -> int:
        """Append these tokens to a beam; return the number of copied blocks."""
        copies = beams.expand_beam(beam_id, tokens)
        self.copy(copies, beams.tables[beam_id].block_size)
        self.write(beams.tables[beam_id], tokens)
        return len(copies)


def test_task_8_diverging_beams_copy_the_last_block_and_read_their_own_tokens() -> None:
    """Oracle: the tokens; by hand: 6 tokens in blocks of 4, two copies for three beams, 1 + 3 pages."""
    pages, beams = BeamPages(), BeamSearchPageManager(3, BlockAllocator(4), page_size=4)
    prompt = [100, 101, 102, 103, 104, 105]
    pages.expand(beams, 0, prompt)
    ids = [0, beams.fork_beam(0), beams.fork_beam(0)]
    assert sum(pages.expand(beams, beam_id, [beam_id]) for beam_id in ids) == 2
    assert [pages.read(beams.tables[beam_id]) for beam_id in ids] == [[*prompt, beam_id] for beam_id in ids]
    assert (beams.num_logical_blocks, beams.num_physical_blocks) == (6, 4)
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


def test_task_8_full_blocks_are_never_copied() -> None:
    """Oracle: by hand: 8 tokens are 2 full blocks, which stay shared; each beam takes one more."""
    pages, beams = BeamPages(), beams_of(prompt=8)
    ids = [0, beams.fork_beam(0)]
    assert [pages.expand(beams, beam_id, [beam_id]) for beam_id in ids] == [0, 0]
    assert beams.num_physical_blocks == 4


@pytest.mark.parametrize("new", [[7], [7, 8, 9], [7] * 9])
def test_task_8_an_expansion_that_does_not_fit_changes_nothing(new: list[int]) -> None:
    """Oracle: the docstring: both blocks are taken, and the last one is shared."""
    beams = beams_of(num_blocks=2)
    child = beams.fork_beam(0)
    for beam_id in (0, child):
        with pytest.raises(OutOfBlocksError):
            beams.expand_beam(beam_id, new)
        assert [table.num_tokens for table in beams.tables.values()] == [6, 6]
        assert beams.tables[0].blocks == beams.tables[child].blocks
        check_conserved(beams.tables[0].allocator, *beams.tables.values())


# Task 9: BeamSearchPageManager.prune


def test_task_9_pruning_a_beam_frees_its_unshared_blocks() -> None:
    """Oracle: by hand: 6 tokens, two beams that have diverged: 1 shared block and 1 each.

    Dropping a table without releasing it leaks its pages.
    """
    beams = beams_of()
    allocator, child = beams.tables[0].allocator, beams.fork_beam(0)
    beams.expand_beam(child, [7])
    assert allocator.num_free == 5
    beams.prune([0])
    assert set(beams.tables) == {child}
    assert allocator.num_free == 6
    check_conserved(allocator, beams.tables[child])
    beams.prune([child])
    assert (len(beams.tables), allocator.num_free) == (0, 8)


def test_task_9_ids_may_be_an_iterator_over_all_beams() -> None:
    """Oracle: by hand: the beams change while the ids are iterated."""
    beams = beams_of()
    allocator = beams.tables[0].allocator
    beams.fork_beam(0)
    beams.prune(iter(list(beams.tables)))
    assert (len(beams.tables), allocator.num_free) == (0, 8)
    beams.prune([])


def test_task_9_a_repeated_id_is_pruned_once() -> None:
    """Oracle: the docstring: it is one beam, and its references are freed once."""
    beams = beams_of()
    allocator, child = beams.tables[0].allocator, beams.fork_beam(0)
    beams.prune([0, 0])
    assert set(beams.tables) == {child}
    check_conserved(allocator, beams.tables[child])


def test_task_9_pruning_a_beam_frees_its_slot_for_a_new_one() -> None:
    """Oracle: by hand: two of two beams exist. After the prune a new beam gets a new id."""
    beams = beams_of(beam_size=2)
    child = beams.fork_beam(0)
    beams.prune([0])
    grandchild = beams.fork_beam(child)
    assert grandchild not in (0, child)
    assert set(beams.tables) == {child, grandchild}


@pytest.mark.parametrize("ids", [[5], [0, 5], [5, 0]])
def test_task_9_an_unknown_id_is_rejected_and_nothing_is_pruned(ids: list[int]) -> None:
    """Oracle: the docstring."""
    beams = beams_of()
    child = beams.fork_beam(0)
    with pytest.raises(KeyError):
        beams.prune(ids)
    assert set(beams.tables) == {0, child}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


class Beams(RuleBasedStateMachine):
    """Beams grow, fork and are pruned in any order, on a pool that is often too small."""

    allocator: BlockAllocator
    texts: dict[int, list[int]]  # the tokens that each beam's pages must hold

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 4), beam_size=st.integers(1, 4))
    def build(self, num_blocks: int, block_size: int, beam_size: int) -> None:
        self.allocator, self.pages, self.fresh = BlockAllocator(num_blocks), BeamPages(), count()
        self.beams = BeamSearchPageManager(beam_size, self.allocator, block_size)
        self.texts = {0: []}

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, 6))
    def expand(self, which: int, num_tokens: int) -> None:
        beam_id, tokens = self.chosen(which), [next(self.fresh) for _ in range(num_tokens)]
        if self.beams.tables[beam_id].blocks_to_append(num_tokens) <= self.allocator.num_free:
            self.pages.expand(self.beams, beam_id, tokens)
            self.texts[beam_id] += tokens
        else:
            with pytest.raises(OutOfBlocksError):
                self.beams.expand_beam(beam_id, tokens)

    @precondition(lambda self: len(self.texts) < self.beams.beam_size)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        parent = self.chosen(which)
        child = self.beams.fork_beam(parent)
        assert child not in self.texts
        self.texts[child] = list(self.texts[parent])

    @precondition(lambda self: len(self.texts) > 1)
    @rule(which=st.integers(0, 3))
    def prune(self, which: int) -> None:
        beam_id = self.chosen(which)
        self.beams.prune([beam_id])
        del self.texts[beam_id]

    def chosen(self, which: int) -> int:
        return sorted(self.texts)[which % len(self.texts)]

    @invariant()
    def check(self) -> None:
        assert set(self.beams.tables) == set(self.texts)
        check_conserved(self.allocator, *self.beams.tables.values())
        for beam_id, text in self.texts.items():
            assert self.pages.read(self.beams.tables[beam_id]) == text, "a beam reads the tokens of another"

    def teardown(self) -> None:
        if hasattr(self, "beams"):
            self.beams.prune(list(self.texts))
            assert self.allocator.num_free == self.allocator.num_blocks, "pages were leaked"


def test_task_9_pages_are_conserved_in_any_order_of_operations() -> None:
    """Oracle: a count of every table's blocks, and a pool of plain values: each beam reads its own tokens."""
    run_state_machine_as_test(Beams, settings=settings(quick, max_examples=40, stateful_step_count=25))


# Task 10: BeamSearch.advance


def uneven(prefix: tuple[int, ...], vocab: int, seed: int) -> list[float]:
    """Log-probabilities that depend on the whole prefix."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).normal(size=vocab) * 1.5
    return [float(x) for x in row - np.log(np.exp(row).sum())]


def coarse(prefix: tuple[int, ...], vocab: int, seed: int) -> list[float]:
    """Small integers, so that many sums are exactly equal; they need not be log-probabilities."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).integers(-3, 0, size=vocab)
    return [float(x) for x in row]


def fixed(rows: Mapping[tuple[int, ...], Sequence[float]]) -> Table:
    """A table of a few rows, given as probabilities."""
    return lambda prefix: [float(np.log(p)) for p in rows[prefix]]


def run_search(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> tuple[BeamSearch, int]:
    """Run a search to its end; return it and its number of steps.

    Beams offer `num_candidates` tokens each.
    """
    search = BeamSearch(params, eos)
    for steps in count():
        if not search.beams:
            return search, steps
        assert steps < params.max_tokens, "the search continues after max_tokens"
        parents, offered = list(search.beams), []
        for beam in parents:
            row = table(beam.tokens)
            best = sorted(range(len(row)), key=lambda token: -row[token])[: search.num_candidates]
            offered.append([(token, row[token]) for token in reversed(best)])
        choices = search.advance(offered)
        assert len(choices) == len(search.beams) <= params.beam_width
        for choice, beam in zip(choices, search.beams, strict=True):
            parent = parents[choice.parent]
            assert beam.tokens == (*parent.tokens, choice.token), "the choices do not match the beams"
            assert beam.logprob == pytest.approx(parent.logprob + table(parent.tokens)[choice.token])
    raise AssertionError


def all_outputs(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> list[Ended]:
    """Every possible output that ends by end of sequence or by length, the best first."""

    def grow(tokens: tuple[int, ...], logprob: float) -> Iterator[Ended]:
        for token, more in enumerate(table(tokens)):
            grown = Hypothesis((*tokens, token), logprob + more)
            if token in eos or len(grown.tokens) == params.max_tokens:
                score = grown.logprob / len(grown.tokens) ** params.length_penalty
                yield Ended(score, grown, "stop" if token in eos else "length")
            else:
                yield from grow(*grown)

    return sorted(grow((), 0.0), key=lambda one: -one.score)


def test_task_10_the_best_candidates_become_beams_and_name_their_parents() -> None:
    """Oracle: by hand: sums of -1.5 and -1.6.

    First the second parent has no child, then the first has none.
    """
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), ())
    assert search.advance([[(1, -2.0), (0, -1.0), (2, -3.0)]]) == [Choice(0, 0), Choice(0, 1)]
    assert search.advance([[(4, -0.5), (5, -0.6)], [(6, -0.1), (7, -9.0)]]) == [Choice(0, 4), Choice(0, 5)]
    assert [beam.tokens for beam in search.beams] == [(0, 4), (0, 5)]
    assert [beam.logprob for beam in search.beams] == pytest.approx([-1.5, -1.6])
    assert search.advance([[(1, -5.0), (2, -6.0)], [(3, -0.1), (4, -0.2)]]) == [Choice(1, 3), Choice(1, 4)]


def test_task_10_ties_go_to_the_better_parent_and_then_to_the_smaller_token() -> None:
    """Oracle: the docstring."""
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=9), ())
    assert list(search.advance([[(5, -1.0), (2, -1.0), (9, -1.0), (1, -2.0)]])) == [(0, 2), (0, 5), (0, 9)]
    level = [(7, -1.0), (3, -1.0)]
    assert list(search.advance([level, level, level])) == [(0, 3), (0, 7), (1, 3)]


def test_task_10_a_finished_candidate_takes_no_beam_slot() -> None:
    """Oracle: by hand: token 2 ends a sequence. The best of three candidates finishes; two become beams.

    Common mistakes: continuing a finished hypothesis, keeping one beam too few.
    """
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9, length_penalty=0), (2,))
    assert search.advance([[(0, -1.5), (1, -2.0), (2, -0.5)]]) == [Choice(0, 0), Choice(0, 1)]
    assert list(search.ended) == [Ended(-0.5, Hypothesis((2,), -0.5), "stop")]


def test_task_10_a_finished_candidate_is_kept_only_if_it_ranks_within_the_beam_width() -> None:
    """Oracle: by hand: with a width of 2, the finished candidate is third in its step and is dropped."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), (2,))
    search.advance([[(0, -1.0), (1, -2.0), (2, -3.0)]])
    assert len(search.ended) == 0, "a finished candidate outside the top `beam_width` was kept"


def test_task_10_at_most_beam_width_finished_hypotheses_are_kept() -> None:
    """Oracle: by hand: token 2 ends one hypothesis in each of three steps.

    With a width of 2 the worst is dropped.
    """
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9, length_penalty=0), (2,))
    search.advance([[(1, -0.1), (2, -1.0), (0, -1.5)]])
    search.advance([[(1, -0.2), (2, -0.3), (0, -9.0)], []])
    search.advance([[(1, -0.1), (2, -0.2), (0, -9.0)], []])
    assert [one.hypothesis.tokens for one in search.ended] == [(1, 2), (1, 1, 2)], (
        "`ended` must keep the best `beam_width`, in every step"
    )


def test_task_10_finished_candidates_count_in_the_ranking_but_take_no_beam_slot() -> None:
    """Oracle: by hand: the first and the last of four finish; with a width of 2 the last is dropped."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9, length_penalty=0), (0, 3))
    choices = search.advance([[(0, -0.5), (1, -1.0), (2, -1.2), (3, -1.4)]])
    assert choices == [Choice(0, 1), Choice(0, 2)]
    assert [one.hypothesis.tokens for one in search.ended] == [(0,)]


def test_task_10_finished_candidates_with_equal_scores_keep_their_rank_order() -> None:
    """Oracle: the docstring: scores are equal, so the older one comes first, then the smaller token."""
    search = BeamSearch(BeamSearchParams(beam_width=4, max_tokens=9, length_penalty=0), (2, 3))
    search.advance([[(3, -2.0), (1, -1.0)]])
    search.advance([[(3, -1.0), (2, -1.0), (1, -0.5)]])
    assert [one.hypothesis.tokens for one in search.ended] == [(3,), (1, 2), (1, 3)]


def test_task_10_a_hypothesis_that_reaches_max_tokens_finishes_with_reason_length() -> None:
    """Oracle: by hand: two tokens at most; an end token in the last position gives "stop", not "length"."""
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=2, length_penalty=0), (0,))
    search.advance([[(1, -0.5), (0, -2.0)]])
    assert list(search.advance([[(1, -0.3), (0, -1.0)]])) == []
    assert len(search.beams) == 0
    assert [(one.hypothesis.tokens, one.finish_reason) for one in search.ended] == [
        ((1, 1), "length"),
        ((1, 0), "stop"),
        ((0,), "stop"),
    ]


@pytest.mark.parametrize(("penalty", "length"), [(-1.0, 1), (0.0, 1), (1.0, 4), (2.0, 4)])
def test_task_10_a_score_is_the_sum_divided_by_a_power_of_the_length(penalty: float, length: int) -> None:
    """Oracle: by hand: one token of 0.4, or four tokens of 0.6 * 0.7 ** 3: sums of -0.92 and -1.58.

    A penalty of 0 compares sums, 1 compares means, and -1 compares sums times lengths.
    """
    table = fixed({(): [0.4, 0.6], **{(1,) * n: [0.3, 0.7] for n in (1, 2, 3)}})
    params = BeamSearchParams(beam_width=4, max_tokens=4, length_penalty=penalty)
    best = run_search(table, params, (0,))[0].ended[0]
    assert len(best.hypothesis.tokens) == length
    logprob = {1: np.log(0.4), 4: np.log(0.6 * 0.7**3)}[length]
    assert best.hypothesis.logprob == pytest.approx(logprob)
    assert best.score == pytest.approx(logprob / length**penalty)


def test_task_10_a_search_stops_when_no_beam_can_improve_the_result() -> None:
    """Oracle: by hand: 0.9 finishes at once, and 0.1 can only fall.

    With a reward for length it may still win.
    """
    table = fixed({(): [0.9, 0.1], (1,): [0.5, 0.5], (1, 1): [0.5, 0.5]})
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=0)
    search, steps = run_search(table, params, (0,))
    assert (steps, search.ended[0].hypothesis.tokens) == (1, (0,))
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=5.0)
    search, steps = run_search(table, params, (0,))
    assert (steps, len(search.ended[0].hypothesis.tokens)) == (3, 3)


def test_task_10_end_tokens_may_be_ignored() -> None:
    """Oracle: the definition, without end tokens."""
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    table = partial(uneven, vocab=3, seed=1)
    search, steps = run_search(table, params, (0, 1, 2))
    assert steps == 3
    check_found(search.ended, by_definition(table, params, ()))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [(), (1,), (0, 2)], ids=["no_eos", "one_eos", "two_eos"])
def test_task_10_a_search_of_unlimited_width_finds_every_output(penalty: float, eos: tuple[int, ...]) -> None:
    """Oracle: all outputs of up to 4 tokens from a vocabulary of 3."""
    for seed in range(3):
        table = partial(uneven, vocab=3, seed=seed)
        params = BeamSearchParams(beam_width=3**4, max_tokens=4, length_penalty=penalty)
        check_found(run_search(table, params, eos)[0].ended, all_outputs(table, params, eos))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_task_10_a_beam_wide_enough_for_every_prefix_finds_the_best_outputs(penalty: float) -> None:
    """Oracle: all outputs: one of 4 tokens ends, so at most 9 prefixes are active and 36 are ranked."""
    for seed in range(4):
        table = partial(uneven, vocab=4, seed=seed)
        params = BeamSearchParams(beam_width=36, max_tokens=3, length_penalty=penalty)
        check_found(run_search(table, params, (2,))[0].ended, all_outputs(table, params, (2,))[:36])


@settings(quick, max_examples=150)
@given(
    table=st.sampled_from([uneven, coarse]),
    vocab=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    eos=st.sets(st.integers(0, 4), max_size=2),
    width=st.integers(1, 6),
    max_tokens=st.integers(1, 6),
    penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
)
@example(table=uneven, vocab=2, seed=0, eos={0}, width=5, max_tokens=1, penalty=1.0)
def test_task_10_a_narrow_beam_matches_the_definition(
    table: Callable[..., list[float]],
    vocab: int,
    seed: int,
    eos: set[int],
    width: int,
    max_tokens: int,
    penalty: float,
) -> None:
    """Oracle: beam search in plain loops without early stopping; some sums are equal."""
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty)
    known = partial(table, vocab=vocab, seed=seed)
    check_found(run_search(known, params, sorted(eos))[0].ended, by_definition(known, params, sorted(eos)))
