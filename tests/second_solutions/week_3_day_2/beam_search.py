"""Beams that live on and beams that end, chosen one after the other."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .parameter_checks import MOST_COUNT, MOST_SALT_CHARACTERS, flag, number, text, whole_number

MOST_PENALTY = 10  # a number of tokens to this power is still a float, and so is one part in as many


def fork_sequence(parent_table: BlockTable, beam_tables: Iterable[BlockTable]) -> None:
    """Make each of the beams' tables a fork of the parent's: the same blocks and tokens."""
    for table in beam_tables:
        if table is not parent_table:
            table.release()
            for block in parent_table.blocks:
                parent_table.allocator.add_ref(block)
            table.blocks = list(parent_table.blocks)
            table.num_tokens = parent_table.num_tokens


class BeamSearchPageManager:
    """The block tables of one search's living beams, by beam id."""

    def __init__(self, beam_size: int, page_allocator: BlockAllocator, page_size: int = 16) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, not {beam_size}")
        self.beam_size = beam_size
        self._tables = {0: BlockTable(page_allocator, page_size)}
        self._next_id = 1

    @property
    def tables(self) -> Mapping[int, BlockTable]:
        """The block table of each living beam, by its id; not a copy, so it changes with the beams."""
        return self._tables

    def fork_beam(self, parent_beam_id: int) -> int:
        """Add a beam that shares every page of its parent, and return its id, which no beam had before."""
        parent = self._tables[parent_beam_id]
        if len(self._tables) >= self.beam_size:
            raise ValueError("too many beams")
        new = self._next_id
        self._next_id += 1
        self._tables[new] = parent.fork()
        return new

    def expand_beam(self, beam_id: int, new_tokens: list[int]) -> list[BlockCopy]:
        """Add places for a beam's new tokens, and return the copies to make before they are written."""
        return self._tables[beam_id].append_tokens(len(new_tokens))

    def prune(self, beam_ids: Iterable[int]) -> None:
        """End beams: their ids are unknown from now on, and pages that no other beam holds are free."""
        ids = set(beam_ids)
        if unknown := ids - set(self._tables):
            raise KeyError(f"beams {unknown} do not live")
        for beam in ids:
            self._tables.pop(beam).release()

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
    """How one request searches; names and defaults are vLLM's."""

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
            "length_penalty": number("length_penalty", self.length_penalty, -MOST_PENALTY, MOST_PENALTY),
            "cache_salt": text("cache_salt", self.cache_salt, MOST_SALT_CHARACTERS),
            "priority": whole_number("priority", self.priority, -MOST_COUNT),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def score(self, logprob: float, num_tokens: int) -> float:
        """The score of a hypothesis that has ended; higher is better."""
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
    """A beam of the next step: the index of the present beam that it continues, and the token it adds."""

    parent: int
    token: int


class BeamSearch:
    """One search: `beams`, the living hypotheses, best first, and `ended`, the best that have ended, best"""

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int]) -> None:
        self.params = params
        self.beams: list[Hypothesis] = [Hypothesis((), 0.0)]
        self.ended: list[Ended] = []
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)

    @property
    def num_candidates(self) -> int:
        """How many of a beam's likeliest tokens matter: `beam_width` may live on, and the others end."""
        return self.params.beam_width * (1 + len(self._eos))

    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Choice]:
        """Choose the next beams from the likeliest tokens of each present beam."""
        width, old = self.params.beam_width, self.beams
        every = [
            (i, token, Hypothesis((*beam.tokens, token), beam.logprob + logprob))
            for i, beam in enumerate(old)
            for token, logprob in candidates[i]
        ]
        every.sort(key=lambda one: (-one[2].logprob, one[0], one[1]))
        living = [one for one in every if self._finish_reason(one[2]) is None][:width]
        for _, _, grown in every[:width]:
            if why := self._finish_reason(grown):
                self.ended.append(Ended(self.params.score(grown.logprob, len(grown.tokens)), grown, why))
        self.ended.sort(key=lambda one: one.score, reverse=True)
        del self.ended[width:]
        self.beams = [grown for _, _, grown in living]
        if self._nothing_can_improve():
            self.beams = []
            return []
        return [Choice(i, token) for i, token, _ in living]

    def _finish_reason(self, hypothesis: Hypothesis) -> str | None:
        """Why a hypothesis ends with its last token; None if it does not."""
        if hypothesis.tokens[-1] in self._eos:
            return "stop"
        return "length" if len(hypothesis.tokens) == self.params.max_tokens else None

    def _nothing_can_improve(self) -> bool:
        """True if no beam is left, or none can become better than those that have ended."""
        if not self.beams or len(self.ended) < self.params.beam_width:
            return not self.beams
        best = self.beams[0]
        length = self.params.max_tokens if self.params.length_penalty > 0 else len(best.tokens)
        return self.params.score(best.logprob, length) <= self.ended[-1].score
