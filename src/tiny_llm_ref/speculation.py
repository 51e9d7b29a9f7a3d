"""Speculative decoding: compute guessed tokens as extra rows of a step, and keep those that turn out right.

A draft is a guess of a sequence's next tokens. The step computes the row after each of them, beside the row
that it computes anyway. Each row gives the token that the sequence would have drawn there without
speculation, because a draw depends only on the logits, the seed and the output index. The draft is accepted
up to its first token that differs from the draw. So speculation changes when tokens come, never which.

Here it is decided how many tokens to guess: rows cost time, and a wrong guess gains nothing. Source:
Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), for the idea.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from weakref import WeakKeyDictionary

from .prompt_lookup import NO_GUESS, Guess, PromptLookup
from .sequence import Sequence
from .speculative_config import SpeculativeConfig
from .step_costs import StepCosts

FIRST_RATES = (0.0, 0.2, 0.3, 0.5, 0.8, 0.9, 0.95)  # assumed before anything was observed
WEIGHT = 0.2  # of a new observation in a rate
PROBE_EVERY = 16  # steps: one of them does the opposite of what seems best, so that its cost stays known
LEAST_GAIN = 1.05  # a step with drafts must be this many times as fast, because the costs are estimates


def num_accepted(draft: Seq[int], drawn: Seq[int]) -> int:
    """Return how many tokens of a draft are accepted: those before the first that differs from its draw.

    drawn: the tokens that were drawn at the draft's places; it may be shorter than the draft or longer.

    >>> num_accepted([5, 6, 7], [5, 6, 9, 7]), num_accepted([5, 6], [5])
    (2, 1)
    """
    pairs = zip(draft, drawn, strict=False)
    return next((i for i, (guess, token) in enumerate(pairs) if guess != token), min(len(draft), len(drawn)))


def best_lengths(gains: Seq[Seq[float]], num_rows: int, max_drafted: int, costs: StepCosts) -> list[int]:
    """Return how many tokens each sequence should draft, so that a step gives most tokens per second.

    gains: for each sequence that decodes, how many tokens each drafted token adds on average: the probability
    that it is right and all before it are. num_rows: the step's rows without drafts: one for each of these
    sequences, and those of prompts. max_drafted: the maximum number of drafted tokens, all sequences
    together.

    Without drafts a step gives one token for each sequence. Take drafted tokens in the order of what they
    add, and stop where (tokens / seconds) is highest. Rows of prompts count as tokens too, as many as decodes
    would have given in their time. If no number of drafted tokens makes the step `LEAST_GAIN` times as fast,
    draft none.

    >>> free = StepCosts.of([(1, 1.0), (9, 1.0)])  # more rows cost nothing
    >>> best_lengths([[0.9, 0.8], [0.1, 0.01]], 2, 8, free)
    [2, 2]
    >>> dear = StepCosts.of([(1, 1.0), (9, 5.0)])  # each row costs half of a step
    >>> best_lengths([[0.9, 0.8], [0.1, 0.01]], 2, 8, dear)
    [2, 0]
    """
    lengths = [0] * len(gains)
    added = sorted(((gain, i) for i, of_sequence in enumerate(gains) for gain in of_sequence), reverse=True)
    per_second = len(gains) / costs.of_step(max(1, len(gains)))
    tokens, best, num_best = per_second * costs.of_step(num_rows), LEAST_GAIN * per_second, 0
    for count, (gain, _) in enumerate(added[:max_drafted], start=1):
        tokens += gain
        if tokens / costs.of_step(num_rows + count) > best:
            best, num_best = tokens / costs.of_step(num_rows + count), count
    for _, i in added[:num_best]:
        lengths[i] += 1
    return lengths


def can_pay(num_decodes: int, num_rows: int, max_drafted: int, costs: StepCosts) -> bool:
    """Return False if `best_lengths` would draft nothing even if all guesses were right.

    Between two measured numbers of rows the costs are on a line, so only these numbers and the most rows need
    to be compared.

    >>> kinked = StepCosts.of([(1, 1.0), (2, 1.0), (9, 8.0)])  # the second row is free
    >>> can_pay(1, 1, 8, kinked), can_pay(4, 4, 8, kinked)
    (True, False)
    """
    per_second = num_decodes / costs.of_step(max(1, num_decodes))
    tokens, most = per_second * costs.of_step(num_rows), num_rows + max_drafted
    compared = {most, *(rows for rows in costs.rows if num_rows < rows < most)}
    return any(
        (tokens + rows - num_rows) / costs.of_step(rows) > LEAST_GAIN * per_second for rows in compared
    )


def opposite(lengths: Seq[int], gains: Seq[Seq[float]], max_drafted: int) -> list[int]:
    """Return no drafts if there are any, and otherwise one token, the best guess; lengths as `best_lengths`.

    >>> opposite([2, 1], [[0.9, 0.8], [0.5]], 8), opposite([0, 0], [[0.4, 0.1], [0.5]], 8)
    ([0, 0], [0, 1])
    """
    firsts = [of_sequence[0] if of_sequence else 0.0 for of_sequence in gains]
    chosen = firsts.index(max(firsts))
    drafts_one = not any(lengths) and max_drafted > 0 and firsts[chosen] > 0
    return [int(drafts_one and i == chosen) for i in range(len(gains))]


class AcceptanceRates:
    """How often guesses are right, by the number of tokens that match before them: moving averages.

    A guess after a long match is right more often: the text is repeating itself. Data compressors predict in
    the same way (the "match model" of Mahoney's PAQ).
    """

    def __init__(self, rates: Seq[float] = FIRST_RATES) -> None:
        self._rates = list(rates)

    def copy(self) -> "AcceptanceRates":
        """Return rates that start from these, for one sequence."""
        return AcceptanceRates(self._rates)

    def gains(self, guess: Guess) -> list[float]:
        """Return, for each token of a guess, the probability that it and all before it are right.

        >>> [round(gain, 2) for gain in AcceptanceRates([0.0, 0.5, 0.75]).gains(Guess([7, 8, 9], match=1))]
        [0.5, 0.38, 0.28]
        """
        rates = (self._rates[self._bucket(guess.match + i)] for i in range(len(guess.tokens)))
        return list(accumulate(rates, mul))

    def observe(self, guess: Guess, tokens: Seq[int]) -> None:
        """Compare a guess with the tokens that came; the first wrong one ends the comparison.

        >>> rates = AcceptanceRates([0.0, 0.5, 0.5])
        >>> rates.observe(Guess([7, 8, 9], match=1), [7, 1])
        >>> rates.gains(Guess([5], match=1)), rates.gains(Guess([5], match=2))
        ([0.6], [0.4])
        """
        right = num_accepted(guess.tokens, tokens)
        for i in range(min(right + 1, len(guess.tokens), len(tokens))):
            bucket = self._bucket(guess.match + i)
            self._rates[bucket] += WEIGHT * ((i < right) - self._rates[bucket])

    def _bucket(self, match: int) -> int:
        """The index of the rate for a match of that many tokens: 1, 2 to 3, 4 to 7, ... tokens."""
        return min(match.bit_length(), len(self._rates) - 1)


@dataclass
class _Speculating:
    """A sequence's state: the n-grams of its text so far, and the guess of the tokens after it."""

    lookup: PromptLookup
    rates: AcceptanceRates
    guess: Guess = NO_GUESS


class Speculation:
    """Drafts by prompt lookup, as many tokens as pay. costs: what a step costs.

    A step makes a guess for every sequence, whether or not it is drafted: comparing it with the tokens that
    come is cheap and tells how good guesses are. So a sequence starts to draft when its text begins to
    repeat, and stops when that ends. A new sequence starts with the average rates of all before it. A step
    that has so many rows that no draft could pay makes no guesses. The index of n-grams takes about 450 bytes
    for each token of a sequence.
    """

    def __init__(self, config: SpeculativeConfig, costs: StepCosts) -> None:
        self._config = config
        self.costs = costs
        self._num_steps = 0
        self._rates = AcceptanceRates()
        self._states: WeakKeyDictionary[Sequence, _Speculating] = WeakKeyDictionary()

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> list[list[int]]:
        """Return a draft for each sequence, which may be empty.

        decodes: sequences of which the step computes only the newest token. num_rows: all rows of the step.
        max_drafted: the maximum number of drafted tokens, all sequences together.
        """
        self._num_steps += 1
        is_probe = self._num_steps % PROBE_EVERY == 0
        most = min(max_drafted, len(decodes) * self._config.num_speculative_tokens)
        if not is_probe and not can_pay(len(decodes), num_rows, most, self.costs):
            return [[]] * len(decodes)
        states = [self._after_new_tokens(sequence) for sequence in decodes]
        gains = [state.rates.gains(state.guess) for state in states]
        lengths = best_lengths(gains, num_rows, max_drafted, self.costs)
        if is_probe:
            lengths = opposite(lengths, gains, max_drafted)
        return [state.guess.tokens[:length] for state, length in zip(states, lengths, strict=True)]

    def observe(self, num_rows: int, seconds: float) -> None:
        """Correct the costs by a step that computed only decodes and drafts."""
        self.costs.observe(num_rows, seconds)

    def _after_new_tokens(self, sequence: Sequence) -> _Speculating:
        """Compare a sequence's last guess with the tokens that came since, and make the next guess."""
        state = self._states.get(sequence)
        if state is None:
            state = _Speculating(PromptLookup(*self._config.ngram_sizes), self._rates.copy())
            self._states[sequence] = state
        new = sequence.tokens(len(state.lookup), sequence.num_tokens)
        for rates in (state.rates, self._rates):
            rates.observe(state.guess, new)
        state.lookup.extend(new)
        most = min(self._config.num_speculative_tokens, sequence.max_len - sequence.num_tokens - 1)
        state.guess = state.lookup.guess(most)
        return state
