"""Queues that also hold beam searches: a search starts as one sequence; its beams stop and resume together.

This is plain bookkeeping over sequences and their block tables: scores and scheduling are elsewhere.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from .queues import RequestQueues
from .sequence import PagedSequence, Parked, SequenceState, completion_ids
from .sliding_window import first_block


class BeamStep(NamedTuple):
    """A beam of the next step: the id of its parent sequence, and the token that it adds."""

    parent: str
    token: int


class PagedQueues(RequestQueues[PagedSequence]):
    """The queues of the paged batch manager.

    Invariant: either all beams of a request are running, next to each other and best first, or the first beam
    is waiting or running and all others are parked with it (`Parked`). Beam i has the i-th of the request's
    completion ids.
    """

    def return_to_waiting(self, sequence: PagedSequence) -> list[PagedSequence]:
        """Make a running sequence wait again, with all beams of its request; returns all that stopped."""
        if not sequence.is_beam:
            return super().return_to_waiting(sequence)
        leader, *others = self.beams(sequence.request_id)
        if others:
            outputs = [beam.outputs for beam in (leader, *others)]
            num_shared = len(leader.prompt) + _common_length(outputs)
            leader.parked = Parked(others, num_shared)
            leader.num_forks += len(others)
            for beam in others:
                self.running.discard(beam)
                beam.state = SequenceState.WAITING
        return [*super().return_to_waiting(leader), *others]

    def join(self, leader: PagedSequence) -> None:
        """Let the beams that are parked with a running leader share its pages and run too."""
        assert leader.parked is not None
        beams, leader.parked = leader.parked.beams, None
        for beam in beams:
            beam.share_pages(leader)
            self._run(beam)
        leader.num_forks -= len(beams)

    def beams(self, request_id: str) -> list[PagedSequence]:
        """The running sequences of a request, in the order of their ranks."""
        return self._in_order(request_id, self.running)

    def blocks_of_others(self, sequence: PagedSequence) -> dict[bytes, int]:
        """The full blocks of a request's other running sequences, by the hash of their content."""
        blocks: dict[bytes, int] = {}
        for other in self.beams(sequence.request_id):
            for index, table in enumerate(other.tables if other is not sequence else ()):
                first, stop = first_block(table), other.num_computed // table.block_size
                hashes = other.stream_of(index, stop).hashes[first:stop]
                blocks.update(zip(hashes, table.blocks, strict=False))
        return blocks

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> list[PagedSequence]:
        """Replace a request's beams by their children, each a fork of its parent with one more token.

        Returns the parents, which have ended but still hold their pages.
        """
        parents = self.beams(request_id)
        width = len(parents) + parents[0].num_forks
        ids = completion_ids(request_id, width)
        children = []
        for place, (seq_id, (parent_id, token)) in enumerate(zip(ids, steps, strict=False)):
            child = self[parent_id].fork(seq_id, self[parent_id].seed)
            child.rank = (*child.rank[:2], place)
            child.outputs.append(token)
            children.append(child)
        children[0].num_forks = width - len(children)
        for parent in parents:
            self.running.discard(parent)
            parent.state = SequenceState.FINISHED
        self._know(request_id, ids, children[0])
        for child in children:
            self._run(child)
            self._know(request_id, [child.seq_id], child)
        return parents


def _common_length(lists: Seq[Seq[int]]) -> int:
    """The length of the common prefix of all lists."""
    length = 0
    for column in zip(*lists, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
