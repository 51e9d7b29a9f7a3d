"""Beam search: follows the best few continuations of a prompt at once, which share pages where they agree.

A continuation is called a hypothesis, and one that is still being extended is a beam. `BeamSearchPageManager`
shares the pages: reference counting over block tables. `BeamSearch` chooses the hypotheses: arithmetic over
log-probabilities. Knows nothing of models, arrays or text. Source: the PagedAttention paper, section 4.4; the
rules are those of transformers' beam search with `early_stopping="never"`.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .parameter_checks import MAX_COUNT, MAX_SALT_CHARACTERS, flag, number, text, whole_number

MAX_LENGTH_PENALTY = 10  # num_tokens ** 10 and num_tokens ** -10 are still floats above 0


def fork_sequence(parent_table: BlockTable, beam_tables: Iterable[BlockTable]) -> None:
    """Turn each of the beams' tables into a fork of the parent's: the same blocks and tokens.

    Each table counts as one more holder of the parent's blocks. The table objects stay the same. References
    to the blocks that they held before are freed. No block is copied, and afterwards all tables are
    independent. The parent may be in `beam_tables` too: it keeps its blocks. All tables have the parent's
    allocator and block size.

    >>> allocator = BlockAllocator(8)
    >>> parent, beam = BlockTable(allocator, block_size=4), BlockTable(allocator, block_size=4)
    >>> _, _ = parent.append_tokens(6), beam.append_tokens(9)
    >>> fork_sequence(parent, [beam])
    >>> beam.blocks == parent.blocks, beam.num_tokens, allocator.num_free
    (True, 6, 6)
    """
    for table in beam_tables:
        fork = parent_table.fork()
        table.release()
        table.blocks, table.num_tokens = fork.blocks, fork.num_tokens


class BeamSearchPageManager:
    """The block tables of one search's active beams, by beam id.

    beam_size: the maximum number of beams at once. page_size: tokens in a block. The search starts with beam
    0, which is empty. `_tables` has the table of each active beam. Ids are never reused: `_next_id` only
    grows. Raises ValueError for a beam_size or page_size below 1.
    """

    def __init__(self, beam_size: int, page_allocator: BlockAllocator, page_size: int = 16) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, not {beam_size}")
        self.beam_size = beam_size
        self._tables = {0: BlockTable(page_allocator, page_size)}
        self._next_id = 1

    @property
    def tables(self) -> Mapping[int, BlockTable]:
        """The block table of each active beam, by its id; not a copy, so it changes with the beams."""
        return self._tables

    def fork_beam(self, parent_beam_id: int) -> int:
        """Add a beam that shares every page of its parent, and return its id, which no beam had before.

        Raises, and changes nothing: ValueError if there are `beam_size` beams already, otherwise KeyError if
        the parent is not an active beam.

        >>> beams = BeamSearchPageManager(beam_size=2, page_allocator=BlockAllocator(8), page_size=4)
        >>> _ = beams.expand_beam(0, [5, 6, 7, 8, 9, 10])
        >>> child = beams.fork_beam(0)
        >>> beams.tables[child].num_tokens, beams.num_logical_blocks, beams.num_physical_blocks
        (6, 4, 2)
        """
        if len(self._tables) == self.beam_size:
            raise ValueError(f"beam {parent_beam_id} cannot be forked: all {self.beam_size} beams are in use")
        forked = self._tables[parent_beam_id].fork()
        beam_id, self._next_id = self._next_id, self._next_id + 1
        self._tables[beam_id] = forked
        return beam_id

    def expand_beam(self, beam_id: int, new_tokens: list[int]) -> list[BlockCopy]:
        """Add places for a beam's new tokens, and return the copies to make before they are written.

        If the last block is partly filled and shared, it is copied on write. Raises, and changes nothing:
        KeyError for a beam that is not active, `OutOfBlocksError` if too few blocks are free.
        """
        return self._tables[beam_id].append_tokens(len(new_tokens))

    def prune(self, beam_ids: Iterable[int]) -> None:
        """End beams: remove their ids from `tables`, and free their references to pages.

        beam_ids: any iterable, even `tables` itself; an id that appears twice counts once. Raises KeyError,
        and ends no beam, if one of the ids is not an active beam.

        >>> allocator = BlockAllocator(8)
        >>> beams = BeamSearchPageManager(beam_size=2, page_allocator=allocator, page_size=4)
        >>> _ = beams.expand_beam(0, [5, 6, 7, 8, 9, 10])
        >>> child = beams.fork_beam(0)
        >>> _ = beams.expand_beam(child, [11])  # now both share one page, and each has a second one
        >>> beams.prune([0])
        >>> list(beams.tables) == [child], allocator.num_free
        (True, 6)
        """
        ending = {beam_id: self._tables[beam_id] for beam_id in beam_ids}
        for beam_id, table in ending.items():
            del self._tables[beam_id]
            table.release()

    @property
    def num_logical_blocks(self) -> int:
        """The number of blocks that the beams would need without sharing."""
        return sum(len(table.blocks) for table in self._tables.values())

    @property
    def num_physical_blocks(self) -> int:
        """The number of blocks that the beams hold, a shared one counted once."""
        return len({block for table in self._tables.values() for block in table.blocks})


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """The parameters of one beam search; names and defaults are vLLM's.

    beam_width: the maximum number of beams, both during the search and in its result. max_tokens: longest
    output. ignore_eos: continue after end-of-sequence tokens. length_penalty: from -10 to 10. A hypothesis's
    score is the sum of its tokens' log-probabilities divided by num_tokens ** length_penalty; a value above 0
    prefers longer texts. cache_salt, priority: as in `SamplingParams`.

    Raises `SamplingParamsError` for an invalid value.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    cache_salt: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        checked = {
            "beam_width": whole_number("beam_width", self.beam_width, 1),
            "max_tokens": whole_number("max_tokens", self.max_tokens, 1),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "length_penalty": number(
                "length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY
            ),
            "cache_salt": text("cache_salt", self.cache_salt, MAX_SALT_CHARACTERS),
            "priority": whole_number("priority", self.priority, -MAX_COUNT),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def score(self, logprob: float, num_tokens: int) -> float:
        """Return the score of a hypothesis that has ended; higher is better."""
        return float(logprob / num_tokens**self.length_penalty)


class Hypothesis(NamedTuple):
    """Tokens after the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    logprob: float


class Ended(NamedTuple):
    """A hypothesis that has ended, its score, and why: "stop" (an end-of-sequence token) or "length"."""

    score: float
    hypothesis: Hypothesis
    finish_reason: str


class Choice(NamedTuple):
    """A beam of the next step: the index of the current beam that it continues, and the token it adds."""

    parent: int
    token: int


class BeamSearch:
    """One search: `beams` are the active hypotheses, and `ended` the best that have ended; both best first.

    There are at most `beam_width` of each. A search starts with one beam without tokens. It is over when it
    has no beams.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int]) -> None:
        self.params = params
        self.beams: list[Hypothesis] = [Hypothesis((), 0.0)]
        self.ended: list[Ended] = []
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)

    @property
    def num_candidates(self) -> int:
        """How many of the likeliest tokens `advance` needs for each beam, as some may end the beam."""
        return self.params.beam_width * (1 + len(self._eos))

    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Choice]:
        """Choose the next beams from the likeliest tokens of each current beam; [] when the search is over.

        candidates[i]: tokens that may follow beam i, each with its log-probability, in any order. Each makes
        a new hypothesis: beam i's tokens and this one, with beam i's sum plus this log-probability. Rank all
        new hypotheses together by their sums, the highest first. Of equal sums, the one with the smaller i
        comes first, then the one with the smaller token. Ranks start at 0.

        - `_finish_reason` returns why a hypothesis ends, or None if it continues.
        - The best `beam_width` of those that continue are the new `beams`, in this order. Return a `Choice`
          for each: the beam that it continues, and its token.
        - A hypothesis that ends takes no place in `beams`. It joins `ended`, with its `params.score`, only if
          its rank among all new hypotheses is below `beam_width`.
        - `ended` is sorted by score, the highest first. Of equal scores, one that ended in an earlier step
          comes first, then one with the better rank. Only the best `beam_width` stay.
        - Then, if `_nothing_can_improve()` (it looks at the new `beams` and `ended`, and is True without
          beams), the search is over: `beams` becomes empty and the result is [].

        >>> search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), eos_token_ids=[7])
        >>> search.advance([[(5, -1.0), (6, -3.0), (7, -2.0), (8, -2.5)]])  # ranked 5, 7, 8, 6; and 7 ends
        [Choice(parent=0, token=5), Choice(parent=0, token=8)]
        >>> search.beams[1], search.ended[0].hypothesis
        (Hypothesis(tokens=(8,), logprob=-2.5), Hypothesis(tokens=(7,), logprob=-2.0))
        """
        width = self.params.beam_width
        ranked = sorted(
            (-(beam.logprob + logprob), parent, token)
            for parent, beam in enumerate(self.beams)
            for token, logprob in candidates[parent]
        )
        parents, self.beams = self.beams, []
        choices: list[Choice] = []
        for rank, (cost, parent, token) in enumerate(ranked):
            grown = Hypothesis((*parents[parent].tokens, token), -cost)
            reason = self._finish_reason(grown)
            if reason is None and len(choices) < width:
                self.beams.append(grown)
                choices.append(Choice(parent, token))
            elif reason is not None and rank < width:
                self.ended.append(Ended(self.params.score(grown.logprob, len(grown.tokens)), grown, reason))
            if len(choices) == width and rank + 1 >= width:
                break  # the remaining ones can be neither in `beams` nor in `ended`
        self.ended = sorted(self.ended, key=lambda ended: -ended.score)[:width]
        if self._nothing_can_improve():
            self.beams, choices = [], []
        return choices

    def _finish_reason(self, hypothesis: Hypothesis) -> str | None:
        """Return why a hypothesis ends with its last token, or None if it continues."""
        if hypothesis.tokens[-1] in self._eos:
            return "stop"
        return "length" if len(hypothesis.tokens) == self.params.max_tokens else None

    def _nothing_can_improve(self) -> bool:
        """True if no beam is left, or if no beam can still enter a full `ended`.

        `ended` is full if it has `beam_width` hypotheses; a beam must then beat the worst of them. A beam's
        sum can only fall, so its best possible score is that of its present sum at its present length, or at
        length `max_tokens` if the penalty rewards length.
        """
        if not self.beams or len(self.ended) < self.params.beam_width:
            return not self.beams
        best = self.beams[0]
        length = self.params.max_tokens if self.params.length_penalty > 0 else len(best.tokens)
        return self.params.score(best.logprob, length) <= self.ended[-1].score
