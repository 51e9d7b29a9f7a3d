"""PagedQueues: the beams of a request are preempted, wait, resume and go on together. Bookkeeping only, no
model.
"""

from collections import Counter
from collections.abc import Sequence as Seq

import pytest
from tiny_llm.errors import DuplicateRequestError
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_queues import BeamStep, PagedQueues
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence, SequenceState, completion_ids

SIZE = 4  # tokens in a block


class Queues(PagedQueues):
    """Queues whose sequences are computed by hand: their tables grow as if a step had run."""

    def __init__(self, num_blocks: int = 32) -> None:
        super().__init__()
        self.allocator = BlockAllocator(num_blocks)

    def request(
        self, request_id: str, prompt: int = 6, width: int = 1, *, beams: bool = True
    ) -> PagedSequence:
        """A running request whose prompt is computed."""
        leader = PagedSequence(
            seq_id=completion_ids(request_id, width)[0],
            request_id=request_id,
            prompt=tuple(range(prompt)),
            params=SamplingParams(n=width),
            seed=5,
            max_len=64,
            tables=[BlockTable(self.allocator, SIZE)],
            streams=[TokenBlocks(SIZE)],
            num_forks=width - 1,
            is_beam=beams,
        )
        self.add(leader)
        assert self.start_next() is leader
        self.compute(leader)
        return leader

    def compute(self, *sequences: PagedSequence) -> None:
        """Compute all known tokens of these sequences."""
        for sequence in sequences:
            sequence.table.append_tokens(sequence.num_uncomputed)
            sequence.num_computed = sequence.table.num_tokens

    def advance_and_compute(self, request_id: str, *steps: tuple[str, int]) -> list[PagedSequence]:
        """Advance a search and release its parents' pages; returns its beams."""
        for parent in self.advance(request_id, [BeamStep(*step) for step in steps]):
            parent.release_pages()
        beams = self.beams(request_id)
        self.compute(*beams)
        return beams

    def check(self, *parked: PagedSequence) -> None:
        """Check that every reference is a running sequence's; waiting and parked sequences hold no pages."""
        held = Counter(block for sequence in self.running for block in sequence.table.blocks)
        counts = [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]
        assert counts == [held[block] for block in range(self.allocator.num_blocks)]
        for sequence in [*self.waiting, *parked]:
            assert sequence.state is SequenceState.WAITING
        assert all(sequence.state is SequenceState.RUNNING for sequence in self.running)
        assert not set(map(id, parked)) & set(map(id, [*self.running, *self.waiting]))


def ids(sequences: Seq[PagedSequence]) -> list[str]:
    return [sequence.seq_id for sequence in sequences]


def outputs(sequences: Seq[PagedSequence]) -> list[list[int]]:
    return [sequence.outputs for sequence in sequences]


# ---- advancing ----


def test_a_search_starts_as_one_sequence_that_represents_all_its_beams() -> None:
    queues = Queues()
    leader = queues.request("a", width=3)
    assert ids(queues.running) == ["a/0"]
    assert all(queues[f"a/{i}"] is leader for i in range(3))
    assert (leader.num_forks, len(queues)) == (2, 3)


def test_children_share_their_parents_pages_and_have_one_more_token() -> None:
    queues = Queues()
    leader = queues.request("a", prompt=6, width=3)
    [ended] = queues.advance("a", [BeamStep("a/0", token) for token in (11, 12, 13)])
    assert ended is leader
    assert leader.state is SequenceState.FINISHED
    beams = queues.beams("a")
    assert ids(beams) == ids(queues.running) == ["a/0", "a/1", "a/2"]
    assert outputs(beams) == [[11], [12], [13]]
    assert [beam.num_computed for beam in beams] == [6, 6, 6]
    assert all(beam.table.blocks == leader.table.blocks for beam in beams)
    assert [queues.allocator.ref_count(block) for block in leader.table.blocks] == [4, 4]
    leader.release_pages()
    queues.check()
    queues.compute(*beams)
    assert queues.allocator.num_blocks - queues.allocator.num_free == 1 + 3
    queues.check()


def test_beams_are_ordered_best_first_whatever_their_parents() -> None:
    queues = Queues()
    queues.request("a", width=3)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2), ("a/0", 3))
    beams = queues.advance_and_compute("a", ("a/2", 4), ("a/0", 5), ("a/2", 6))
    assert ids(beams) == ["a/0", "a/1", "a/2"]
    assert outputs(beams) == [[3, 4], [1, 5], [3, 6]]
    assert all(queues[beam.seq_id] is beam for beam in beams)
    queues.check()


def test_a_token_added_to_one_beam_is_invisible_to_the_others() -> None:
    queues = Queues()
    queues.request("a", prompt=2, width=2)
    first, second = queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2))
    first.outputs.append(9)
    assert second.outputs == [2]
    assert first.stream is not second.stream
    assert first.table.blocks != second.table.blocks


def test_sequence_slots_are_reserved_for_future_beams() -> None:
    """Four slots: two beams, then three, then one, then four."""
    queues = Queues()
    queues.request("a", width=4)
    for steps in (
        [("a/0", 1), ("a/0", 2)],
        [("a/1", 3), ("a/0", 4), ("a/1", 5)],
        [("a/1", 6)],
        [("a/0", token) for token in (7, 8, 9, 10)],
    ):
        beams = queues.advance_and_compute("a", *steps)
        assert ids(beams) == [f"a/{i}" for i in range(len(steps))]
        assert sum(1 + beam.num_forks for beam in queues.running) == 4
        assert [beam.num_forks for beam in beams[1:]] == [0] * (len(steps) - 1)
        assert all(queues[f"a/{i}"] is beams[0] for i in range(len(steps), 4)), "an id that no beam has yet"
        assert len(queues) == 4
        queues.check()


def test_beams_keep_their_position_among_other_requests() -> None:
    queues = Queues()
    queues.request("old", beams=False)
    queues.request("a", width=2)
    queues.request("new", width=2)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2))
    queues.advance_and_compute("new", ("new/0", 1), ("new/0", 2))
    queues.advance_and_compute("a", ("a/1", 3), ("a/1", 4))
    assert ids(queues.running) == ["old", "a/0", "a/1", "new/0", "new/1"]
    assert outputs(queues.beams("a")) == [[2, 3], [2, 4]]


def test_a_beam_of_width_one_has_the_id_of_its_request() -> None:
    queues = Queues()
    queues.request("a")
    [beam] = queues.advance_and_compute("a", ("a", 1))
    assert (beam.seq_id, beam.outputs, queues["a"]) == ("a", [1], beam)


def test_ids_of_a_search_are_in_use_until_it_ends() -> None:
    queues = Queues()
    queues.request("a", width=3)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2))
    for request_id, seq_ids in (("a", ["a"]), ("b", ["a/2"]), ("a/0", ["a/0"])):
        with pytest.raises(DuplicateRequestError):
            queues.refuse_id_in_use(request_id, seq_ids)
    assert queues.remove_pending_forks("a") == ["a/0", "a/1"]
    for seq_id in ("a/0", "a/1"):
        queues.end(seq_id).release_pages()
    queues.refuse_id_in_use("a", ["a/0", "a/1", "a/2"])
    assert (len(queues), queues.running, queues.allocator.num_free) == (0, [], 32)


# ---- preemption ----


def preempt(queues: Queues, sequence: PagedSequence) -> list[PagedSequence]:
    """Preempt; returns the preempted sequences, whose pages are released."""
    preempted = queues.return_to_waiting(sequence)
    for one in preempted:
        one.release_pages()
    return preempted


@pytest.mark.parametrize("which", [0, 1, 2])
def test_beams_are_preempted_together_and_the_best_one_leads_them(which: int) -> None:
    queues = Queues()
    queues.request("old", beams=False)
    queues.request("a", width=4)
    queues.request("new", beams=False)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2), ("a/0", 3))
    leader, second, third = queues.advance_and_compute("a", ("a/1", 4), ("a/1", 5), ("a/1", 6))
    preempted = preempt(queues, queues.beams("a")[which])
    assert preempted == [leader, second, third]
    assert ids(queues.running) == ["old", "new"]
    assert list(queues.waiting) == [leader]
    assert leader.parked is not None
    assert leader.parked.beams == [second, third]
    assert leader.parked.num_shared == 6 + 1, "the prompt and the token 2; then they differ"
    assert leader.num_forks == 1 + 2, "a slot for each parked beam, and for the future one"
    assert outputs(preempted) == [[2, 4], [2, 5], [2, 6]], "earlier outputs are unchanged"
    queues.check(second, third)


def test_the_request_that_has_waited_longest_still_comes_first() -> None:
    queues = Queues()
    queues.request("a", width=2)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2))
    later = PagedSequence(
        seq_id="later",
        request_id="later",
        prompt=(1,),
        params=SamplingParams(),
        seed=0,
        max_len=9,
        tables=[BlockTable(queues.allocator, SIZE)],
        streams=[TokenBlocks(SIZE)],
    )
    queues.add(later)
    leader, _ = preempt(queues, queues["a/1"])
    assert list(queues.waiting) == [leader, later]


@pytest.mark.parametrize("beams", [True, False])
def test_a_leader_that_has_not_forked_is_preempted_as_one_sequence(beams: bool) -> None:
    queues = Queues()
    leader = queues.request("a", width=3, beams=beams)
    assert preempt(queues, leader) == [leader]
    assert (leader.parked, leader.num_forks, list(queues.waiting)) == (None, 2, [leader])
    queues.check()


def test_completions_that_are_not_beams_are_preempted_one_by_one() -> None:
    queues = Queues()
    leader, fork = queues.fork(queues.request("a", width=2, beams=False))
    assert preempt(queues, fork) == [fork]
    assert queues.running == [leader]
    queues.check()


# ---- resuming ----


def resume(queues: Queues, leader: PagedSequence) -> None:
    """The leader runs again, and computes the common prefix of all beams."""
    assert queues.start_next() is leader
    assert leader.parked is not None
    assert leader.num_uncomputed == leader.parked.num_shared
    queues.compute(leader)
    assert leader.num_uncomputed == 0


def test_parked_beams_resume_as_forks_once_their_common_prefix_is_computed() -> None:
    queues = Queues()
    queues.request("a", width=3)
    queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2), ("a/0", 3))
    beams = queues.advance_and_compute("a", ("a/1", 4), ("a/1", 5))
    queues.request("new", beams=False)
    before = [list(beam.outputs) for beam in beams]
    preempt(queues, beams[1])
    resume(queues, beams[0])
    queues.join(beams[0])
    assert ids(queues.running) == ["a/0", "a/1", "new"]
    assert queues.beams("a") == beams
    assert outputs(beams) == before
    assert [beam.num_computed for beam in beams] == [7, 7]
    assert beams[0].table.blocks == beams[1].table.blocks
    assert (beams[0].parked, beams[0].num_forks) == (None, 1)
    queues.check()
    queues.compute(*beams)
    assert beams[0].table.blocks[:1] == beams[1].table.blocks[:1]
    assert beams[0].table.blocks[1] != beams[1].table.blocks[1]
    queues.check()


def test_resumed_beams_advance_as_before() -> None:
    queues = Queues()
    queues.request("a", width=2)
    beams = queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2))
    preempt(queues, beams[0])
    resume(queues, beams[0])
    queues.join(beams[0])
    queues.compute(*beams)
    beams = queues.advance_and_compute("a", ("a/1", 3), ("a/0", 4))
    assert outputs(beams) == [[2, 3], [1, 4]]
    queues.check()


def test_a_leader_that_is_preempted_again_keeps_its_parked_beams() -> None:
    queues = Queues()
    queues.request("a", width=3)
    leader, *others = queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2), ("a/0", 3))
    preempt(queues, leader)
    resume(queues, leader)
    assert preempt(queues, leader) == [leader]
    assert leader.parked is not None
    assert (leader.parked.beams, leader.parked.num_shared, leader.num_forks) == (others, 6, 2)
    queues.check(*others)
    resume(queues, leader)
    queues.join(leader)
    assert queues.running == [leader, *others]


def test_parked_beams_end_with_their_request() -> None:
    queues = Queues()
    queues.request("a", width=4)
    beams = queues.advance_and_compute("a", ("a/0", 1), ("a/0", 2), ("a/0", 3))
    preempt(queues, beams[2])
    for seq_id in queues.remove_pending_forks("a"):
        queues.end(seq_id)
    assert all(beam.state is SequenceState.FINISHED for beam in beams)
    assert (len(queues), len(queues.waiting), queues.running) == (0, 0, [])
    assert queues.allocator.num_free == 32
