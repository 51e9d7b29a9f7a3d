"""Promise 2 without a model: no arrays, thousands of steps per second, events in any order.

The oracle for the contents of a page is a pool of plain Python values, `SymbolicPool`: each slot remembers
which token of which stream was written to it, and every sequence must read its own tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from tiny_llm.errors import DoubleFreeError, RequestTooLargeError
from tiny_llm.layer_groups import group_layers
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import BeamStep
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence, completion_ids
from tiny_llm.windowed_prefix import WindowedPrefixSharing

from promises import Watched, check_all_returned, check_first_come_first_served, check_pages, policies
from symbolic_pool import SymbolicPool
from tiny_model import examples

WINDOWS = ((None,), (None,), (5,), (None, 1), (None, 4, 4), (None, 7, 2))


class BatchMachine(RuleBasedStateMachine):
    """Requests arrive, run, share, fork, search, finish and are cancelled; pages move, the pool grows.

    Events come in any order; the promises hold after each.
    """

    requests = Bundle("requests")
    preempts = True
    is_fixed = False  # True: every run has the one configuration in which most happens
    happened: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: dict[str, int] = {}
        self.next_token = 0
        self.ready: list[str] = []
        self.broken = False
        self.searches: set[str] = set()
        self.reported: set[str] = set()
        self.most_drafted = 0

    def build(
        self,
        blocks: int,
        block_size: int,
        max_seqs: int,
        budget: int,
        prefix: bool = True,
        grows: bool = False,
        windows: tuple[int | None, ...] = (None,),
        swap_blocks: int = 0,
    ) -> Watched:
        """A fresh manager with this many blocks per group, and a symbolic pool that performs its plans."""
        self.pool = SymbolicPool(block_size)
        groups = group_layers(windows)
        return Watched(
            blocks * len(groups),
            block_size,
            max_seqs,
            max_batched_tokens=max(max_seqs, budget),
            max_model_len=blocks * block_size,
            policies=replace(policies(self.preempts, prefix, groups, swap_blocks), drafting=self),
            min_pages=1 if grows else None,
            groups=groups,
            watch=self.pool.perform,
            watch_moves=self.pool.move,
        )

    @initialize(
        blocks=st.sampled_from([8, 7, 9, 12, 5, 1]),
        block_size=st.sampled_from([4, 3, 2, 5, 1, 6]),
        max_seqs=st.sampled_from([4, 3, 6, 2, 1]),
        budget=st.sampled_from([16, 8, 24, 3, 40]),
        prefix=st.sampled_from([True, True, False]),
        grows=st.sampled_from([False, False, True]),
        windows=st.sampled_from(WINDOWS),
        swap_blocks=st.sampled_from([100, 0, 5]),
        most_drafted=st.sampled_from([0, 1, 3, 8]),
    )
    def configure(
        self,
        blocks: int,
        block_size: int,
        max_seqs: int,
        budget: int,
        prefix: bool,
        grows: bool,
        windows: tuple[int | None, ...],
        swap_blocks: int,
        most_drafted: int,
    ) -> None:
        self.most_drafted = most_drafted
        if self.is_fixed:
            blocks, block_size, max_seqs, budget, prefix, grows = 6, 4, 5, 16, True, False
        self.manager = self.build(blocks, block_size, max_seqs, budget, prefix, grows, windows, swap_blocks)

    @rule(
        target=requests,
        stream=st.integers(0, 2),
        shared=st.integers(0, 16),
        own=st.integers(0, 6),
        outputs=st.integers(1, 12) | st.none(),
        n=st.sampled_from([1, 1, 2, 3]),
        beams=st.sampled_from([False, False, True]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def add(
        self, stream: int, shared: int, own: int, outputs: int | None, n: int, beams: bool, priority: int
    ) -> str:
        """A prompt that starts with tokens of one of three streams, and goes on with its own."""
        request_id = f"r{len(self.arrivals)}"
        self.arrivals[request_id] = len(self.arrivals)
        tokens = [-1 - (100 * stream + i) for i in range(shared)]
        tokens += [self.fresh_token() for _ in range(own or not shared)]
        before = (self.manager.allocator.num_free, len(self.manager.waiting))
        params = SamplingParams(n=n, max_tokens=outputs, priority=priority)
        try:
            params = replace(params, n=max(n, 2), max_tokens=min(outputs or 8, 8)) if beams else params
            assert self.manager.add_request(tokens, request_id, params, beam_search=beams)
            self.searches |= {request_id} if beams else set()
        except RequestTooLargeError:
            self.manager.happened["rejected requests"] += 1
            assert before == (self.manager.allocator.num_free, len(self.manager.waiting))
        return request_id

    @precondition(lambda self: self.manager.has_work)
    @rule(how_many=st.integers(1, 6))
    def steps(self, how_many: int) -> None:
        for _ in range(how_many):
            self.step()

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def finish_early(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.ready)))
        self.ready.remove(seq_id)
        self.manager.finish(seq_id)

    @rule(request_id=consumes(requests))
    def cancel(self, request_id: str) -> None:
        self.manager.happened["cancels"] += 1
        self.manager.cancel(request_id)
        self.ready = [seq_id for seq_id in self.ready if seq_id.split("/")[0] != request_id]
        self.reported = {seq_id for seq_id in self.reported if seq_id.split("/")[0] != request_id}

    @rule()
    def compact(self) -> None:
        """Move all blocks in use, with their contents, to the front."""
        self.manager.compact()

    @invariant()
    def promises_hold(self) -> None:
        self.broken = True  # until every check below has passed
        check_pages(self.manager)
        check_first_come_first_served(self.manager, self.arrivals)
        for sequence in self.manager.running:
            self.pool.check(sequence)
        self.broken = False

    def teardown(self) -> None:
        """Check that the remaining requests finish in a bounded number of steps, and all pages return."""
        if self.broken:
            return  # after a broken promise, further checks mean nothing
        bound = sum(
            seq.max_len * (1 + seq.num_forks) for seq in [*self.manager.running, *self.manager.waiting]
        )
        bound *= 2 if self.searches else 1  # preempted beams are computed again
        for _ in range(bound):
            if self.manager.has_work:
                self.step()
                self.promises_hold()
        check_all_returned(self.manager)
        self.happened.update(self.manager.happened)

    def step(self) -> None:
        """Run one step with a fresh token for each sequence that is ready; those at full length finish."""
        first = self.manager.running[0] if self.manager.running else None
        computed = list(self.manager.process_batch())
        if first is not None and first not in self.manager.running:
            assert self.manager.running[0].rank < first.rank, "the first by priority was preempted"
        self.ready = [seq_id for seq_id in computed if seq_id.split("/")[0] not in self.searches]
        self.search([seq_id for seq_id in computed if seq_id not in self.ready])
        for seq_id in self.ready:
            draft = self.manager.sequence(seq_id).draft
            for token in (*draft[: self.next_token % (len(draft) + 1)], self.fresh_token()):
                self.manager.commit({seq_id: token})
        self.manager.settle_drafts(1.0)
        drafted = self.manager.draft_stats
        self.manager.happened["guesses accepted"] = drafted.num_accepted_tokens
        self.manager.happened["guesses rejected"] = drafted.num_draft_tokens - drafted.num_accepted_tokens
        for seq_id in list(self.ready):
            sequence = self.manager.sequence(seq_id)
            if sequence.num_tokens >= sequence.max_len:
                self.manager.finish(seq_id)
                self.ready.remove(seq_id)

    def search(self, computed: list[str]) -> None:
        """Advance beams whose siblings are computed too: the first one forks and replaces the last."""
        self.reported.update(computed)
        for request_id in {seq_id.split("/")[0] for seq_id in computed}:
            beams = [s for s in self.manager.running if s.request_id == request_id]
            if not {beam.seq_id for beam in beams} <= self.reported:
                continue
            self.reported -= {beam.seq_id for beam in beams}
            if beams[0].num_tokens >= beams[0].max_len:
                self.manager.cancel(request_id)
                continue
            width = len(beams) + beams[0].num_forks
            parents = [beams[0].seq_id, *(beam.seq_id for beam in beams)][:width]
            self.manager.advance(request_id, [BeamStep(parent, self.fresh_token()) for parent in parents])

    def drafts(self, decodes: Sequence[PagedSequence], num_rows: int, max_drafted: int) -> list[list[int]]:
        """Guess fresh tokens; `step` decides how many of them are right."""
        drafts = []
        for sequence in decodes:
            most = min(self.most_drafted, max_drafted, sequence.max_len - sequence.num_tokens - 1)
            drafts.append([self.fresh_token() for _ in range(most)])
            max_drafted -= len(drafts[-1])
        return drafts

    def observe(self, num_rows: int, seconds: float) -> None:
        """What a step costs changes nothing."""

    def fresh_token(self) -> int:
        """A token that no other sequence has: a token read from a page shows which sequence wrote it."""
        self.next_token += 1
        return self.next_token


def run_machine(
    preempts: bool, is_fixed: bool = False, phases: tuple[Phase, ...] = tuple(Phase)
) -> Counter[str]:
    """Run the machine with or without preemption; returns how often each event happened."""
    happened: Counter[str] = Counter()
    options = {"preempts": preempts, "is_fixed": is_fixed, "happened": happened}
    machine = type("Machine", (BatchMachine,), options)
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples(200, quick=200),
        stateful_step_count=50,
        phases=phases,
        report_multiple_bugs=False,
    )
    case("runTest").runTest()
    return happened


def assert_machine_catches() -> None:
    """Fail unless the machine fails, as it must for a mutant of the engine; examples are not shrunk."""
    with pytest.raises((AssertionError, KeyError, ValueError, DoubleFreeError)):
        _ = [run_machine(True, is_fixed, phases=(Phase.generate,)) for is_fixed in (True, False)]


def test_pages_are_conserved_after_any_events() -> None:
    happened = run_machine(preempts=True) + run_machine(preempts=True, is_fixed=True)
    for name in (
        "preemptions",
        "forks",
        "copies on write",
        "chunked prompts",
        "cancels",
        "rejected requests",
        "prefix hits",
        "beams forked",
        "blocks moved",
        "blocks released by windows",
        "prefix hits under windows",
        "blocks swapped out",
        "blocks swapped in",
        "guesses accepted",
        "guesses rejected",
    ):
        assert happened[name] >= 30, f"the machine hardly tests anything: {happened}"
    assert happened["pool growths"] >= 5, f"the pool hardly ever grew: {happened}"


def test_without_preemption_no_admitted_request_runs_out_of_pages() -> None:
    happened = run_machine(preempts=False)
    assert happened["preemptions"] == 0
    for name in ("forks", "copies on write", "chunked prompts", "cancels", "rejected requests"):
        assert happened[name] >= 30, f"the machine hardly tests anything: {happened}"


# Mutants: a broken engine does not pass.


def test_a_missing_copy_on_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "_last_block_is_shared", lambda self: False)
    assert_machine_catches()


def test_pages_that_a_preempted_sequence_keeps_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(sequence: PagedSequence) -> None:
        sequence.table.blocks.clear()
        sequence.table.num_tokens = sequence.num_computed = 0

    monkeypatch.setattr(PagedSequence, "release_pages", forget)
    assert_machine_catches()


def test_a_fork_that_does_not_count_its_pages_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(table: BlockTable) -> BlockTable:
        child = BlockTable(table.allocator, table.block_size)
        child.blocks, child.num_tokens = list(table.blocks), table.num_tokens
        return child

    monkeypatch.setattr(BlockTable, "fork", fork)
    assert_machine_catches()


def test_a_cancel_that_does_not_release_its_table_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(manager: PagedBatchManager, request_id: str) -> None:
        for seq_id in manager._queues.remove_pending_forks(request_id):
            manager._queues.end(seq_id)

    monkeypatch.setattr(PagedBatchManager, "cancel", cancel)
    assert_machine_catches()


def test_pages_of_rejected_guesses_that_stay_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "remove_tokens", lambda table, num_tokens: [])
    assert_machine_catches()


def test_a_page_with_an_accepted_guess_that_is_released_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = BlockTable.remove_tokens
    monkeypatch.setattr(
        BlockTable, "remove_tokens", lambda table, n: remove(table, min(n + 1, table.num_tokens))
    )
    assert_machine_catches()


def test_a_window_that_releases_blocks_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tiny_llm.page_layout.first_visible", lambda position, window: max(0, position - window + 2)
    )
    assert_machine_catches()


def test_a_hit_without_the_blocks_that_a_window_still_sees_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowedPrefixSharing, "first_needed", lambda self, index, num_blocks: num_blocks)
    assert_machine_catches()


def test_groups_that_share_each_others_blocks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def streams(layout: PageLayout, salt: str) -> list[TokenBlocks]:
        return [TokenBlocks(layout.block_size, salt) for _ in layout.groups]

    monkeypatch.setattr(PageLayout, "streams", streams)
    assert_machine_catches()


def test_preemption_of_the_oldest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tiny_llm.preemption.NewestFirst.choose_victim", lambda self, candidates: candidates[0]
    )
    assert_machine_catches()


def test_completions_have_ids_that_tell_them_apart() -> None:
    assert completion_ids("a", 1) == ["a"]
    assert len(set(completion_ids("a", 3))) == 3
