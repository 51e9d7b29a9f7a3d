"""From logits to a token: sorted limits, distances of logits, the draw by counting."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from math import log
from random import Random

import mlx.core as mx

from .sampling_params import SamplingParams

SUMMED_AT_ONCE = 256  # numbers that are added one by one; their sums are added again


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """The limit is the k-th of the sorted logits."""
    limit = mx.sort(logits)[-min(k, logits.size)]
    return mx.where(logits < limit, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """From the likeliest on, in Python."""
    probabilities = mx.softmax(logits)
    total, least = 0.0, 2.0
    for probability in sorted(probabilities.tolist(), reverse=True):
        if total >= p or probability == 0:
            break
        total, least = total + probability, probability
    return mx.where(probabilities < least, -mx.inf, logits)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """A fraction of a probability is a distance of logits."""
    if min_p == 0:
        return logits
    return mx.where(logits < mx.max(logits) + log(min_p), -mx.inf, logits)


def uniform(seed: int, index: int) -> float:
    """Return a random number in [0, 1) that depends only on the request's seed and the output index."""
    odd = 0x9E3779B97F4A7C15  # spreads neighbouring seeds over all numbers; invertible modulo 2**64
    return Random((seed * odd + index) % 2**64).random()


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    """The token is the number of sums below the threshold."""
    sums = mx.cumsum(mx.softmax(logits))
    return mx.sum(sums < sums[-1] * (1 - uniform(seed, index)))


def sample_token(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """Every filter with the value at which it is off."""
    if params.greedy:
        return mx.argmax(logits, axis=-1)
    filters = [
        (params.min_p == 0, keep_min_p, params.min_p),
        (params.top_k in (0, -1), keep_top_k, params.top_k),
        (params.top_p == 1, keep_top_p, params.top_p),
    ]
    row = logits * (1 / params.temperature)
    for is_off, keep, limit in filters:
        row = row if is_off else keep(row, limit)
    return draw(row, seed, index)


def change_logits(logits: mx.array, token_ids: list[int], change: Callable[[mx.array], mx.array]) -> mx.array:
    """Return a copy of logits [V] in which those of `token_ids` are `change` of what they were.

    token_ids: no id twice. change: takes the logits [n] of these ids in their order, and gives [n].
    No ids: the logits themselves.

    >>> change_logits(mx.array([1.0, 2.0, 3.0]), [2, 0], lambda chosen: 10 * chosen).tolist()
    [10.0, 2.0, 30.0]
    """
    if not token_ids:
        return logits
    chosen = mx.array(token_ids)
    copy = mx.array(logits)
    copy[chosen] = change(logits[chosen])
    return copy


def penalize_repetition(logits: mx.array, seen: Iterable[int], penalty: float) -> mx.array:
    """The smaller of quotient and product, or the larger."""

    def penalized(chosen: mx.array) -> mx.array:
        both = mx.stack([chosen * penalty, chosen / penalty])
        return both.min(axis=0) if penalty >= 1 else both.max(axis=0)

    return change_logits(logits, list(dict.fromkeys(seen)), penalized)


def penalize_output(logits: mx.array, outputs: Iterable[int], frequency: float, presence: float) -> mx.array:
    """A penalty for every token of the vocabulary, 0 for most."""
    penalties = [0.0] * logits.size
    for token, times in Counter(outputs).items():
        penalties[token] = times * frequency + presence
    return logits - mx.array(penalties)


def log_probabilities(logits: mx.array) -> mx.array:
    """Rows of 256, and what is left over."""
    below = logits - logits.max()
    weights = mx.exp(below)
    whole = logits.size // SUMMED_AT_ONCE * SUMMED_AT_ONCE
    sums = weights[:whole].reshape(-1, SUMMED_AT_ONCE).sum(axis=1)
    return below - mx.log(sums.sum() + weights[whole:].sum())


def forbid(logits: mx.array, token_ids: Iterable[int]) -> mx.array:
    """Set the logits of these tokens to -inf: logits [V] -> [V]."""
    return change_logits(logits, list(token_ids), lambda chosen: mx.full(chosen.shape, -mx.inf))


def add_bias(logits: mx.array, bias: Mapping[int, float]) -> mx.array:
    """Add to the logits of some tokens, by token id: logits [V] -> [V]."""
    return change_logits(logits, list(bias), lambda chosen: chosen + mx.array(list(bias.values())))


def adjust_logits(
    logits: mx.array,
    params: SamplingParams,
    prompt: Seq[int],
    outputs: Seq[int],
    end_token_ids: Iterable[int],
) -> mx.array:
    """Return the logits [V] that a token is chosen from: limits, bias and penalties, in vLLM's order.

    end_token_ids: tokens that would end the sequence; impossible while it has fewer than `min_tokens`.
    """
    if len(outputs) < params.min_tokens:
        logits = forbid(logits, end_token_ids)
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    if params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, [*prompt, *outputs], params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        logits = penalize_output(logits, outputs, params.frequency_penalty, params.presence_penalty)
    return logits
