"""Beam search: the best few continuations grow side by side, and share the pages of what they have in common.

Which hypotheses live is arithmetic over floats (`BeamSearch`); whose pages they are is reference counting
over tables (`BeamSearchPageManager`). Knows nothing of models, arrays or text. Source: the PagedAttention
paper, section 4.4; the rules of transformers' beam search with `early_stopping="never"`.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .parameter_checks import MOST_COUNT, MOST_SALT_CHARACTERS, flag, number, text, whole_number

MOST_PENALTY = 10  # a number of tokens to this power is still a float, and so is one part in as many


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How one request searches; names and defaults are vLLM's.

    beam_width: hypotheses that live at once, and that are returned. max_tokens: longest output.
    ignore_eos: go on after end-of-sequence tokens. length_penalty: a hypothesis's score is the sum of its
    tokens' log-probabilities, divided by their number to this power, from -10 to 10; above 0 prefers longer
    texts.
    cache_salt, priority: as in `SamplingParams`.

    Raises `SamplingParamsError` for a value that cannot work.
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
            "length_penalty": number("length_penalty", self.length_penalty, -MOST_PENALTY, MOST_PENALTY),
            "cache_salt": text("cache_salt", self.cache_salt, MOST_SALT_CHARACTERS),
            "priority": whole_number("priority", self.priority, -MOST_COUNT),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def score(self, logprob: float, num_tokens: int) -> float:
        """What hypotheses are compared by once they have ended; higher is better."""
        return float(logprob / num_tokens**self.length_penalty)


class Hypothesis(NamedTuple):
    """Tokens after the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    logprob: float


class Ended(NamedTuple):
    """A hypothesis that has ended: its score, and why ("stop" for an end-of-sequence token, or "length")."""

    score: float
    hypothesis: Hypothesis
    finish_reason: str


class Choice(NamedTuple):
    """A beam of the next step: which of the present ones it continues, and with which token."""

    parent: int
    token: int


class BeamSearch:
    """One search: the beams that live, best first, and the best that have ended, the highest score first.

    At most `beam_width` of each. It begins with one beam, without a token; a search without beams is over.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int]) -> None:
        self.params = params
        self.beams: list[Hypothesis] = [Hypothesis((), 0.0)]
        self.ended: list[Ended] = []
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)

    @property
    def num_candidates(self) -> int:
        """How many of a beam's likeliest tokens matter: as many as the width go on, and others may end."""
        return self.params.beam_width * (1 + len(self._eos))

    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Choice]:
        """Choose the next beams from the likeliest tokens of each present one; empty when the search is over.

        candidates[i]: tokens that may follow beam i, with their log-probabilities, in any order. Each makes
        an extended hypothesis; these are ranked by their sums. The best `beam_width` of those that do not end
        live on: they are the new `beams`, best first, and the choices say, in this order, which of the old
        ones each continues, and with which token. Those that end join `ended`, but only where they are among
        the best `beam_width` of all. Equal sums: the better parent first, then the smaller token.

        It is over where no beam is left, and where none can become better than what has ended.
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
                break  # those that rank below are neither
        self.ended = sorted(self.ended, key=lambda ended: -ended.score)[:width]
        if self._nothing_can_improve():
            self.beams, choices = [], []
        return choices

    def _finish_reason(self, hypothesis: Hypothesis) -> str | None:
        if hypothesis.tokens[-1] in self._eos:
            return "stop"
        return "length" if len(hypothesis.tokens) == self.params.max_tokens else None

    def _nothing_can_improve(self) -> bool:
        """True when there are enough that have ended, and the best beam cannot become better than the worst.

        Its sum can only fall; the best that a length can do for it is the longest where that is rewarded.
        """
        if not self.beams or len(self.ended) < self.params.beam_width:
            return not self.beams
        best = self.beams[0]
        length = self.params.max_tokens if self.params.length_penalty > 0 else len(best.tokens)
        return self.params.score(best.logprob, length) <= self.ended[-1].score


def fork_sequence(parent_table: BlockTable, beam_tables: Iterable[BlockTable]) -> None:
    """Let each of the beams' tables hold what the parent's holds; what they held before goes back.

    Nothing is copied, and every table goes on without the others. The parent may be one of them.
    """
    for table in beam_tables:
        fork = parent_table.fork()
        table.release()
        table.blocks, table.num_tokens = fork.blocks, fork.num_tokens


class BeamSearchPageManager:
    """The block tables of one search's beams, by beam id.

    beam_size: how many may live at once. page_size: tokens in a block. It begins with beam 0, which is empty.
    """

    def __init__(self, beam_size: int, page_allocator: BlockAllocator, page_size: int = 16) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, not {beam_size}")
        self.beam_size = beam_size
        self._tables = {0: BlockTable(page_allocator, page_size)}
        self._next_id = 1

    @property
    def tables(self) -> Mapping[int, BlockTable]:
        """The table of each living beam."""
        return self._tables

    def fork_beam(self, parent_beam_id: int) -> int:
        """A new beam that shares every page of its parent; returns its id.

        Raises KeyError for a beam that does not live, ValueError when there would be more than `beam_size`.
        """
        if len(self._tables) == self.beam_size:
            raise ValueError(f"beam {parent_beam_id} cannot be forked: all {self.beam_size} beams live")
        beam_id, self._next_id = self._next_id, self._next_id + 1
        self._tables[beam_id] = self._tables[parent_beam_id].fork()
        return beam_id

    def expand_beam(self, beam_id: int, new_tokens: list[int]) -> list[BlockCopy]:
        """Make room for a beam's new tokens; the copies that must happen before they are written.

        A last block that is partly filled and shared is copied on write. All or nothing: raises
        `OutOfBlocksError`, unchanged, when the pool runs short.
        """
        return self._tables[beam_id].append_tokens(len(new_tokens))

    def prune(self, beam_ids: Iterable[int]) -> None:
        """End beams: pages that no other beam holds go back.

        Raises KeyError, and ends none, for one that does not live.
        """
        ending = {beam_id: self._tables[beam_id] for beam_id in beam_ids}
        for beam_id, table in ending.items():
            del self._tables[beam_id]
            table.release()

    @property
    def num_logical_blocks(self) -> int:
        """Blocks that the beams would need without sharing."""
        return sum(len(table.blocks) for table in self._tables.values())

    @property
    def num_physical_blocks(self) -> int:
        """Blocks that they hold."""
        return len({block for table in self._tables.values() for block in table.blocks})
