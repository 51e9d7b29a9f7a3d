# A second solution, written from the docstrings and the first hints.
"""Beam search: the best few continuations of a prompt grow side by side, and share the pages that they can.

The pages are reference counting over block tables (`BeamSearchPageManager`); which continuations live on is
arithmetic over log-probabilities (`BeamSearch`). Knows nothing of models, arrays or text. Source: the
PagedAttention paper, section 4.4; the rules of transformers' beam search with `early_stopping="never"`.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from .paged_attention import BlockTable


def fork_sequence(parent_table: BlockTable, beam_tables: Iterable[BlockTable]) -> None:
    """Make each of the beams' tables a fork of the parent's: the same blocks and tokens, counted once more.

    The tables stay the same objects. The blocks that they held before are freed; no block is copied, and
    afterwards all tables are independent. The parent may be one of `beam_tables`: it stays as it is. All
    tables have the parent's allocator and block size.

    >>> allocator = BlockAllocator(8)
    >>> parent, beam = BlockTable(allocator, block_size=4), BlockTable(allocator, block_size=4)
    >>> _, _ = parent.append_tokens(6), beam.append_tokens(9)
    >>> fork_sequence(parent, [beam])
    >>> beam.blocks == parent.blocks, beam.num_tokens, allocator.num_free
    (True, 6, 6)
    """
    for table in beam_tables:
        if table is parent_table:
            continue
        forked = parent_table.fork()
        table.release()
        table.blocks, table.num_tokens = forked.blocks, forked.num_tokens


class BeamSearchPageManager:
    def fork_beam(self, parent_beam_id: int) -> int:
        """Add a beam that shares every page of its parent, and return its id, which no beam had before.

        Raises, and changes nothing: ValueError if `beam_size` beams live already, KeyError if the parent is
        no living beam.

        >>> beams = BeamSearchPageManager(beam_size=2, page_allocator=BlockAllocator(8), page_size=4)
        >>> _ = beams.expand_beam(0, [5, 6, 7, 8, 9, 10])
        >>> child = beams.fork_beam(0)
        >>> beams.tables[child].num_tokens, beams.num_logical_blocks, beams.num_physical_blocks
        (6, 4, 2)
        """
        if len(self._tables) >= self.beam_size:
            raise ValueError(f"{self.beam_size} beams live already")
        child = self._tables[parent_beam_id].fork()
        beam_id = self._next_id
        self._next_id += 1
        self._tables[beam_id] = child
        return beam_id

    def prune(self, beam_ids: Iterable[int]) -> None:
        """End beams: their ids are unknown from now on, and pages that no other beam holds are free.

        beam_ids: may be `tables` itself. Raises KeyError, and ends none of them, if one is no living beam.

        >>> allocator = BlockAllocator(8)
        >>> beams = BeamSearchPageManager(beam_size=2, page_allocator=allocator, page_size=4)
        >>> _ = beams.expand_beam(0, [5, 6, 7, 8, 9, 10])
        >>> child = beams.fork_beam(0)
        >>> _ = beams.expand_beam(child, [11])  # copies the last block: one page is shared, each has one more
        >>> beams.prune([0])
        >>> list(beams.tables) == [child], allocator.num_free
        (True, 6)
        """
        doomed = set(beam_ids)
        for beam_id in doomed:
            if beam_id not in self._tables:
                raise KeyError(beam_id)
        for beam_id in doomed:
            self._tables.pop(beam_id).release()


class BeamSearch:
    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Choice]:
        """Choose the next beams from the likeliest tokens of each present beam; [] when the search is over.

        candidates[i]: tokens that may follow beam i, with their log-probabilities, in any order. Each makes a
        longer hypothesis, with beam i's sum plus its log-probability. Rank all of them by their sums, the
        highest first; of equal sums first the one with the better parent (the smaller i), then the smaller
        token.

        - The best `beam_width` of those that do not end are the new `beams`, in this order. The returned
          choices say of each which beam it continues and with which token.
        - One that ends (`_finish_reason` says why) joins `ended` with its `params.score`, but only if its
          rank among all of them, ended or not, is below `beam_width`. So an end takes no beam's place.
        - `ended` has the highest score first, of equal scores the older first, and keeps at most
          `beam_width`.
        - The search is over, with no beams and no choices, if no beam is left or if `_nothing_can_improve()`,
          which looks at the new `beams` and `ended`.

        >>> search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), eos_token_ids=[7])
        >>> search.advance([[(5, -1.0), (6, -3.0), (7, -2.0), (8, -2.5)]])  # 7 ends, with rank 1
        [Choice(parent=0, token=5), Choice(parent=0, token=8)]
        >>> search.beams[1], search.ended[0].hypothesis
        (Hypothesis(tokens=(8,), logprob=-2.5), Hypothesis(tokens=(7,), logprob=-2.0))
        """
        width = self.params.beam_width
        ranked = sorted(
            (-(self.beams[parent].logprob + logprob), parent, token)
            for parent, tokens in enumerate(candidates)
            for token, logprob in tokens
        )
        beams: list[Hypothesis] = []
        choices: list[Choice] = []
        for rank, (negative, parent, token) in enumerate(ranked):
            longer = Hypothesis((*self.beams[parent].tokens, token), -negative)
            reason = self._finish_reason(longer)
            if reason is None:
                if len(beams) < width:
                    beams.append(longer)
                    choices.append(Choice(parent, token))
            elif rank < width:
                score = self.params.score(longer.logprob, len(longer.tokens))
                self.ended.append(Ended(score, longer, reason))
        self.ended.sort(key=lambda ended: -ended.score)
        del self.ended[width:]
        self.beams = beams
        if self._nothing_can_improve():
            self.beams, choices = [], []
        return choices
