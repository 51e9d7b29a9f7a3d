"""Speculative decoding: check guesses of the next tokens in one step, and keep the correct ones.

A row is one token's computation; it gives the logits of the next token. A step computes the row of a
sequence's newest token, and with a draft, which is a guess of the next tokens, one more row for each drafted
token. Each row gives the token that the sequence would have drawn there without speculation, because a draw
depends only on the logits, the seed and the output index. The draft is accepted up to its first token that
differs from the draw. So speculation changes when tokens come, never which.

This module decides how many tokens to draft: rows cost time, and a wrong guess gains nothing. Idea: Leviathan
et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with another rule of acceptance.
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

FIRST_RATES = (0.0, 0.2, 0.3, 0.5, 0.8, 0.9, 0.95)  # of `AcceptanceRates`, before anything was observed
WEIGHT = 0.2  # weight of a new observation in a moving average
PROBE_EVERY = 32  # one step in this many does the opposite of the best choice, so that both costs stay known
LEAST_GAIN = 1.1  # drafts must multiply tokens per second by more than this, because costs are estimates


def num_accepted(draft: Seq[int], drawn: Seq[int]) -> int:
    """Return how many tokens of a draft are accepted: those before the first that differs from its draw.

    drawn: drawn[i] is the token that was drawn at the place of draft[i]. The two may have different lengths;
    extra tokens are ignored.

    >>> num_accepted([5, 6, 7], [5, 6, 9, 7]), num_accepted([5, 6], [5])
    (2, 1)
    """
    pairs = zip(draft, drawn, strict=False)
    return next((i for i, (guess, token) in enumerate(pairs) if guess != token), min(len(draft), len(drawn)))


def best_lengths(gains: Seq[Seq[float]], num_rows: int, max_drafted: int, costs: StepCosts) -> list[int]:
    """Return how many tokens each sequence should draft, so that a step gives most tokens per second.

    gains: gains[i][j] is the probability that the tokens 0 to j of sequence i's guess are all right; that is
    how many tokens drafting token j adds on average. So it never increases with j. num_rows: all rows of the
    step without drafts. One belongs to each of these sequences; the others are mostly prompt tokens.
    max_drafted: the maximum number of drafted tokens, all sequences together.

    Let s = len(gains) / costs.of_step(len(gains)), the tokens per second of a step of decodes only. A step
    without drafts counts as s * costs.of_step(num_rows) tokens, so that prompt rows are worth their time.

    Sort all tokens that could be drafted by what they add, the largest first, and for equal ones the first
    sequence first. For each number of them, from 1 to `max_drafted`, compute tokens / seconds of the step:
    each drafted token is one more row. Choose the number with the highest result; of equal ones the smallest.
    Draft none unless that result is more than `LEAST_GAIN` * s.

    >>> free = StepCosts.of([(1, 1.0), (9, 1.0)])  # more rows cost nothing
    >>> best_lengths([[0.9, 0.8], [0.1, 0.01]], 2, 8, free), best_lengths([[0.04]], 1, 8, free)
    ([2, 2], [0])
    >>> dear = StepCosts.of([(1, 1.0), (9, 5.0)])  # each row costs half of a step
    >>> best_lengths([[0.9, 0.8], [0.1, 0.01]], 2, 8, dear)
    [2, 0]
    >>> steps = StepCosts.of([(1, 1.0), (2, 3.0), (9, 3.0)])  # the second row costs much, the others nothing
    >>> best_lengths([[0.9] * 8], 1, 8, steps), best_lengths([[0.9] * 8], 8, 1, steps)
    ([8], [1])
    """
    lengths = [0] * len(gains)
    added = sorted((-gain, i) for i, of_sequence in enumerate(gains) for gain in of_sequence)
    per_second = len(gains) / costs.of_step(max(1, len(gains)))
    tokens, best, num_best = per_second * costs.of_step(num_rows), LEAST_GAIN * per_second, 0
    for count, (minus_gain, _) in enumerate(added[:max_drafted], start=1):
        tokens -= minus_gain
        speed = tokens / costs.of_step(num_rows + count)
        if speed > best:
            best, num_best = speed, count
    for _, i in added[:num_best]:
        lengths[i] += 1
    return lengths


def can_pay(num_decodes: int, num_rows: int, max_drafted: int, costs: StepCosts) -> bool:
    """Return whether `best_lengths` could draft anything if every guess were right.

    num_decodes: the number of sequences that could draft; the rest as in `best_lengths`. Tokens / seconds has
    its maximum at a measured number of rows, because the costs between two of them are on a straight line, or
    at num_rows + max_drafted. So compare only these. Without decodes, or with max_drafted = 0, the answer is
    False.

    >>> kinked = StepCosts.of([(1, 1.0), (2, 1.0), (9, 16.0)])  # the second row is free
    >>> can_pay(1, 1, 8, kinked), can_pay(4, 4, 8, kinked)
    (True, False)
    """
    if not num_decodes or not max_drafted:
        return False
    per_second = num_decodes / costs.of_step(num_decodes)
    tokens, most = per_second * costs.of_step(num_rows), num_rows + max_drafted
    compared = {most, *(rows for rows in costs.rows if num_rows < rows < most)}
    return any(
        (tokens + rows - num_rows) / costs.of_step(rows) > LEAST_GAIN * per_second for rows in compared
    )


def opposite(lengths: Seq[int], gains: Seq[Seq[float]], max_drafted: int) -> list[int]:
    """Return the lengths for a probe, a step that is made to learn what it costs.

    lengths: the best ones. gains, max_drafted: as in `best_lengths`. If `lengths` drafts anything, return
    zeros. Otherwise draft one token, for the sequence whose first token has the highest gain; of equal ones
    the first. Return zeros too if `max_drafted` is 0 or no gain is above 0.

    >>> opposite([2, 1], [[0.9, 0.8], [0.5]], 8), opposite([0, 0], [[0.4, 0.1], [0.5]], 8)
    ([0, 0], [0, 1])
    """
    probes = [0] * len(lengths)
    firsts = [of_sequence[0] if of_sequence else 0.0 for of_sequence in gains]
    if not any(lengths) and max_drafted > 0 and max(firsts, default=0.0) > 0:
        probes[firsts.index(max(firsts))] = 1
    return probes


class AcceptanceRates:
    """How often guesses are right, by the number of tokens that match before them: moving averages.

    A guess after a long match is right more often: the text is repeating itself. Data compressors predict in
    the same way (the "match model" of Mahoney's PAQ).

    rates: rate 0 is for a guess after no match; rate k for 2**(k-1) to 2**k - 1 matched tokens; the last one
    also for all longer matches.
    """

    def __init__(self, rates: Seq[float] = FIRST_RATES) -> None:
        self._rates = list(rates)

    def copy(self) -> "AcceptanceRates":
        """Return rates that start from these, for one sequence."""
        return AcceptanceRates(self._rates)

    def gains(self, guess: Guess) -> list[float]:
        """Return, for each token of a guess, the probability that it and all before it are right.

        Token i of a guess has the rate of a match of guess.match + i tokens, because the i tokens before it
        are right then.

        >>> rates = AcceptanceRates([0.0, 0.5, 0.75, 1.0])
        >>> rates.gains(Guess([7, 8, 9], match=1)), rates.gains(Guess([5], match=4))
        ([0.5, 0.375, 0.28125], [1.0])
        """
        rates = (self._rates[self._index(guess.match + i)] for i in range(len(guess.tokens)))
        return list(accumulate(rates, mul))

    def observe(self, guess: Guess, tokens: Seq[int]) -> None:
        """Compare a guess with the tokens that came after the text, as far as both go.

        For each compared token move its rate by `WEIGHT` of the distance towards 1 if it is right, and
        towards 0 if it is wrong. Stop after the first wrong token.

        >>> rates = AcceptanceRates([0.0, 0.5, 0.5])
        >>> rates.observe(Guess([7, 8, 9], match=1), [7, 1])
        >>> rates.gains(Guess([5], match=1)), rates.gains(Guess([5], match=2))
        ([0.6], [0.4])
        """
        right = num_accepted(guess.tokens, tokens)
        for i in range(min(right + 1, len(guess.tokens), len(tokens))):
            index = self._index(guess.match + i)
            self._rates[index] += WEIGHT * ((i < right) - self._rates[index])

    def _index(self, match: int) -> int:
        """The index of the rate for a number of matched tokens."""
        return min(match.bit_length(), len(self._rates) - 1)


@dataclass
class _Speculating:
    """A sequence's state: the n-grams of its text so far, and the guess of the tokens after it."""

    lookup: PromptLookup
    rates: AcceptanceRates
    guess: Guess = NO_GUESS


class Speculation:
    """Drafts by prompt lookup, as many tokens as pay. costs: what a step costs.

    A step guesses for every sequence that decodes, even if it drafts none of the guess: comparing it with the
    tokens that come is cheap, and shows how good guesses are. So a sequence starts to draft when its text
    begins to repeat, and stops when that ends. A step makes no guesses if it has so many rows that no draft
    could pay. Every `PROBE_EVERY`-th step of decodes only does the opposite of the best choice.

    A new sequence starts with the moving averages of all sequences. The index of n-grams takes about 450
    bytes for each token of a sequence.
    """

    def __init__(self, config: SpeculativeConfig, costs: StepCosts) -> None:
        self._config = config
        self.costs = costs
        self._num_steps = 0  # of decodes only
        self._rates = AcceptanceRates()
        self._states: WeakKeyDictionary[Sequence, _Speculating] = WeakKeyDictionary()

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> list[list[int]]:
        """Return a draft for each sequence, which may be empty.

        decodes: sequences of which the step computes only the newest token. num_rows: all rows of the step.
        max_drafted: the maximum number of drafted tokens, all sequences together.
        """
        is_probe = num_rows == len(decodes) and self._is_probe()
        most = min(max_drafted, len(decodes) * self._config.num_speculative_tokens)
        if not is_probe and not can_pay(len(decodes), num_rows, most, self.costs):
            return [[] for _ in decodes]
        states = [self._after_new_tokens(sequence) for sequence in decodes]
        gains = [state.rates.gains(state.guess) for state in states]
        lengths = best_lengths(gains, num_rows, max_drafted, self.costs)
        if is_probe:
            lengths = opposite(lengths, gains, max_drafted)
        return [state.guess.tokens[:length] for state, length in zip(states, lengths, strict=True)]

    def observe(self, num_rows: int, seconds: float) -> None:
        """Correct the costs by a step that computed only decodes and drafts."""
        self.costs.observe(num_rows, seconds)

    def _is_probe(self) -> bool:
        """Count a step of decodes only; True for every `PROBE_EVERY`-th."""
        self._num_steps += 1
        return self._num_steps % PROBE_EVERY == 0

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
