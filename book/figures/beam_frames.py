"""Steps of beam searches for the interactive figure: what the reference's search and its page manager do.

A small table of words takes the model's place: it gives the probabilities of the next word after each word.
"""

from collections.abc import Iterable, Sequence
from math import log
from typing import Any

from tiny_llm_ref.beam_search import BeamSearch, BeamSearchPageManager, BeamSearchParams, Choice
from tiny_llm_ref.paged_attention import BlockAllocator, BlockCopy

WIDTHS = (2, 3, 4)
NUM_BLOCKS, BLOCK_SIZE = 12, 4
NUM_HUES = 6
PROMPT = ("the", "cat", "sat", "on", "the", "mat")
END = "."
NEXT = {
    "mat": {"and": 0.5, "while": 0.3, "because": 0.2},
    "and": {"purred": 0.5, "slept": 0.4, "waited": 0.1},
    "while": {"it": 0.6, "rain": 0.4},
    "because": {"it": 0.9, "rain": 0.1},
    "it": {"was": 0.6, "purred": 0.2, "slept": 0.2},
    "purred": {"softly": 0.6, "all": 0.25, END: 0.15},
    "slept": {"all": 0.5, "until": 0.3, END: 0.2},
    "waited": {"for": 0.9, END: 0.1},
    "was": {"warm": 0.7, "tired": 0.3},
    "softly": {END: 0.6, "and": 0.4},
    "all": {"day": 0.7, "night": 0.3},
    "until": {"noon": 0.8, "night": 0.2},
    "rain": {"fell": 0.8, "stopped": 0.2},
}
OTHERWISE = {END: 0.7, "and": 0.3}
WORDS = sorted({*PROMPT, *NEXT, *OTHERWISE, *(word for after in NEXT.values() for word in after)})


def frames() -> dict[str, list[dict[str, Any]]]:
    """The frames of one search for each beam width."""
    return {str(width): Recorder(width).record() for width in WIDTHS}


class Recorder:
    """Runs one search and records two frames for each of its steps: beams are chosen, and tokens appended."""

    def __init__(self, width: int) -> None:
        params = BeamSearchParams(beam_width=width, max_tokens=6)
        self._search = BeamSearch(params, [WORDS.index(END)])
        self._allocator = BlockAllocator(NUM_BLOCKS)
        self._pages = BeamSearchPageManager(width, self._allocator, BLOCK_SIZE)
        self._order = [0]  # the beams' ids, best first
        self._hues = {0: 0}
        self._contents: list[list[str]] = [[] for _ in range(NUM_BLOCKS)]
        self._frames: list[dict[str, Any]] = []

    def record(self) -> list[dict[str, Any]]:
        """Run the search to its end and return the frames."""
        self._append(0, PROMPT)
        held = listed(map(str, self._pages.tables[0].blocks))
        self._frame(f"One beam has the prompt's {len(PROMPT)} tokens in blocks {held}.")
        step = 0
        while self._search.beams:
            step += 1
            self._step(step)
        return self._frames

    def _step(self, step: int) -> None:
        search, before = self._search, list(self._order)
        likeliest = [self._likeliest(beam.tokens) for beam in search.beams]
        sums = [
            (beam.logprob + logprob, parent, token)
            for parent, beam in enumerate(search.beams)
            for token, logprob in likeliest[parent]
        ]
        ended = len(search.ended)
        choices = search.advance(likeliest)
        ranked = sorted(sums, key=lambda one: (-one[0], one[1], one[2]))
        best = f"Step {step}: {len(ranked)} candidates are ranked"
        if not choices:
            self._pages.prune(before)
            self._order = []
            text = " ".join(WORDS[token] for token in search.ended[0].hypothesis.tokens)
            self._frame(f'{best}. The search is over, and its blocks are free. The best text is "{text}".')
            return
        told = [f"{best}, and the best {len(choices)} continue", *self._follow(choices)]
        if len(search.ended) > ended:
            told[0] = f"{best}: the best {len(choices)} without a full stop continue"
        candidates = self._candidates(ranked, before, choices)
        self._frame(f"{'. '.join(told)}.", candidates)
        copies = [
            (beam, copy)
            for beam, choice in zip(self._order, choices, strict=True)
            for copy in self._append(beam, [WORDS[choice.token]])
        ]
        self._frame(appended(copies), copies=[copy for _, copy in copies])

    def _likeliest(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        after = NEXT.get(WORDS[tokens[-1]] if tokens else PROMPT[-1], OTHERWISE)
        return [(WORDS.index(word), log(chance)) for word, chance in after.items()]

    def _follow(self, choices: Sequence[Choice]) -> list[str]:
        """Prune and fork the beams, so that there is one for each choice; say what was done."""
        before = self._order
        ends = [beam for place, beam in enumerate(before) if all(one.parent != place for one in choices)]
        self._pages.prune(ends)
        self._order = []
        forks: dict[int, list[int]] = {}
        for place, choice in enumerate(choices):
            parent = before[choice.parent]
            if all(earlier.parent != choice.parent for earlier in choices[:place]):
                self._order.append(parent)
                continue
            child = self._pages.fork_beam(parent)
            free = set(range(NUM_HUES)) - {
                self._hues[beam] for beam in self._pages.tables if beam in self._hues
            }
            self._hues[child] = min(free)
            self._order.append(child)
            forks.setdefault(parent, []).append(child)
        told = [f"Beam {beam} has no successor and is pruned" for beam in ends]
        for parent, children in forks.items():
            one = len(children) == 1
            who = f"{'Beam' if one else 'Beams'} {listed(map(str, children))}"
            told.append(f"{who} {'is a fork' if one else 'are forks'} of beam {parent}")
        return told or ["Each beam has one successor"]

    def _candidates(
        self, ranked: Sequence[tuple[float, int, int]], before: Sequence[int], choices: Sequence[Choice]
    ) -> list[list[Any]]:
        """The best candidates: the beam that each continues, its word, its sum, and the new beam or None."""
        chosen = {
            (choice.parent, choice.token): beam for choice, beam in zip(choices, self._order, strict=True)
        }
        return [
            [before[parent], WORDS[token], round(total, 2), chosen.get((parent, token))]
            for total, parent, token in ranked[: 2 * len(choices) + 2]
        ]

    def _append(self, beam: int, words: Sequence[str]) -> list[BlockCopy]:
        """Append words to a beam, in the page manager and in the contents of the blocks."""
        table = self._pages.tables[beam]
        start = table.num_tokens
        copies = self._pages.expand_beam(beam, [WORDS.index(word) for word in words])
        for copy in copies:
            self._contents[copy.dst] = self._contents[copy.src][: copy.length]
        for place, word in enumerate(words, start):
            block, offset = table.blocks[place // BLOCK_SIZE], place % BLOCK_SIZE
            self._contents[block][offset:] = [word]
        return copies

    def _frame(
        self, says: str, candidates: Sequence[Sequence[Any]] = (), copies: Sequence[BlockCopy] = ()
    ) -> None:
        sums = {
            beam: round(one.logprob, 2) for beam, one in zip(self._order, self._search.beams, strict=False)
        }
        self._frames.append(
            {
                "says": says,
                "beams": [
                    [beam, self._hues[beam], sums[beam], list(self._pages.tables[beam].blocks)]
                    for beam in self._order
                ],
                "contents": {
                    block: " ".join(words)
                    for block, words in enumerate(self._contents)
                    if self._allocator.ref_count(block)
                },
                "candidates": [list(one) for one in candidates],
                "copies": [[copy.src, copy.dst] for copy in copies],
                "logical": self._pages.num_logical_blocks,
                "physical": self._pages.num_physical_blocks,
                "ended": [
                    [" ".join(WORDS[token] for token in one.hypothesis.tokens), round(one.score, 2)]
                    for one in self._search.ended
                ],
            }
        )


def appended(copies: Sequence[tuple[int, BlockCopy]]) -> str:
    """Say what appending a token to each beam did."""
    if not copies:
        return "Each beam appends its token. No block is both shared and partly filled, so nothing is copied."
    told = listed(
        f"beam {beam} copies {copy.length} token{'s' if copy.length > 1 else ''} "
        f"of block {copy.src} to block {copy.dst}"
        for beam, copy in copies
    )
    return f"Each beam appends its token. Before it writes to a shared block, {told}."


def listed(items: Iterable[str]) -> str:
    """ "1", "1 and 2", "1, 2 and 3" """
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
