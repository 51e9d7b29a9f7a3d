# A second solution, written only from the docstrings and the first hints.
"""Beam search: follows the best few continuations of a prompt at once, which share pages where they agree.

A continuation is called a hypothesis, and one that is still being extended is a beam. `BeamSearchPageManager`
shares the pages: reference counting over block tables. `BeamSearch` chooses the hypotheses: arithmetic over
log-probabilities. Knows nothing of models, arrays or text. Source: the PagedAttention paper, section 4.4; the
rules are those of transformers' beam search with `early_stopping="never"`.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from .paged_attention import BlockTable


def fork_sequence(parent_table: BlockTable, beam_tables: Iterable[BlockTable]) -> None:
    for table in beam_tables:
        if table is parent_table:
            continue
        forked = parent_table.fork()
        table.release()
        table.blocks, table.num_tokens = forked.blocks, forked.num_tokens


class BeamSearchPageManager:
    def fork_beam(self, parent_beam_id: int) -> int:
        if len(self._tables) >= self.beam_size:
            raise ValueError(f"there are already {self.beam_size} beams")
        child = self._tables[parent_beam_id].fork()
        beam_id = self._next_id
        self._next_id += 1
        self._tables[beam_id] = child
        return beam_id

    def prune(self, beam_ids: Iterable[int]) -> None:
        to_prune = set(beam_ids)
        for beam_id in to_prune:
            if beam_id not in self._tables:
                raise KeyError(beam_id)
        for beam_id in to_prune:
            self._tables.pop(beam_id).release()


class BeamSearch:
    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Choice]:
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
