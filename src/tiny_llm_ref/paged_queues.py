"""Requests whose sequences are beams: they begin as one, and stop, wait and go on together.

Plain bookkeeping over sequences and their tables; knows nothing of scores, or of when anybody should run.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from .beam_search import fork_sequence
from .queues import RequestQueues
from .sequence import PagedSequence, Parked, SequenceState, completion_ids


class BeamStep(NamedTuple):
    """A beam of the next step: the sequence that it continues, and the token that it adds."""

    parent: str
    token: int


class PagedQueues(RequestQueues[PagedSequence]):
    """The queues of the paged batch manager.

    Invariant: the beams of a request stand side by side among the running, best first, or all but one are
    parked behind that one. Beam i has the i-th of the request's completion ids.
    """

    def put_back(self, sequence: PagedSequence) -> list[PagedSequence]:
        """Make a running sequence wait again, and its fellow beams with it; everybody who stopped."""
        if not sequence.is_beam:
            return super().put_back(sequence)
        leader, *others = self.beams(sequence.request_id)
        if others:
            outputs = [beam.outputs for beam in (leader, *others)]
            num_shared = len(leader.prompt) + _common_length(outputs)
            leader.parked = Parked(others, num_shared)
            leader.num_forks += len(others)
            for beam in others:
                self.running.remove(beam)
                beam.state = SequenceState.WAITING
        return [*super().put_back(leader), *others]

    def join(self, leader: PagedSequence) -> None:
        """Let the beams that are parked behind a running one share its pages, and run beside it."""
        assert leader.parked is not None
        beams, leader.parked = leader.parked.beams, None
        fork_sequence(leader.table, [beam.table for beam in beams])
        for beam in beams:
            beam.num_computed = leader.num_computed
            beam.state = SequenceState.RUNNING
        leader.num_forks -= len(beams)
        self._insert_after(leader, beams)

    def beams(self, request_id: str) -> list[PagedSequence]:
        """The running sequences of a request."""
        return [sequence for sequence in self.running if sequence.request_id == request_id]

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> list[PagedSequence]:
        """Replace a request's beams by their children, each a fork of its parent with one token more.

        Returns the parents, which have ended and still hold their pages.
        """
        parents = self.beams(request_id)
        width = len(parents) + parents[0].num_forks
        ids = completion_ids(request_id, width)
        children = []
        for seq_id, (parent_id, token) in zip(ids, steps, strict=False):
            child = self[parent_id].fork(seq_id, self[parent_id].seed)
            child.outputs.append(token)
            children.append(child)
        children[0].num_forks = width - len(children)
        self._insert_after(parents[-1], children)
        for parent in parents:
            self.running.remove(parent)
            parent.state = SequenceState.FINISHED
        self._sequences.update(dict.fromkeys(ids, children[0]))
        self._sequences.update({child.seq_id: child for child in children})
        return parents


def _common_length(lists: Seq[Seq[int]]) -> int:
    """How many elements all lists have in common, from the first on."""
    length = 0
    for column in zip(*lists, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
