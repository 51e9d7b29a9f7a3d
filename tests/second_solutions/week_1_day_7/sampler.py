# A second solution of day 1.7, written only from the docstrings.
"""From logits to a token: temperature, filters and a draw; penalties and biases; log-probabilities.

Every function takes one row, logits [V]. A row's token depends only on its logits, its parameters, its tokens
so far, its seed and its output index, never on the other rows of the batch. A token that must not be drawn
gets the logit -inf, which is a probability of 0.
"""

from collections import Counter
from collections.abc import Iterable

import mlx.core as mx

from .sampling_params import SamplingParams


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    kth = mx.sort(logits)[-min(k, logits.size)]
    return mx.where(logits >= kth, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    probabilities = mx.softmax(logits.astype(mx.float32))
    falling = mx.sort(probabilities)[::-1]
    before = mx.cumsum(falling) - falling
    least = mx.min(mx.where(before < p, falling, mx.inf))
    keep = (probabilities >= least) & (probabilities > 0)
    return mx.where(keep, logits, -mx.inf)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    ratio = mx.exp(logits - mx.max(logits))
    return mx.where(ratio >= min_p, logits, -mx.inf)


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    cumulative = mx.cumsum(mx.softmax(logits))
    point = (1 - uniform(seed, index)) * cumulative[-1]
    return mx.argmax(cumulative >= point)


def sample_token(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    if params.greedy:
        return mx.argmax(logits)
    kept = logits / params.temperature
    if params.min_p > 0:
        kept = keep_min_p(kept, params.min_p)
    if params.top_k > 0:
        kept = keep_top_k(kept, params.top_k)
    if params.top_p < 1:
        kept = keep_top_p(kept, params.top_p)
    return draw(kept, seed, index)


def penalize_repetition(logits: mx.array, seen: Iterable[int], penalty: float) -> mx.array:

    def penalize(chosen: mx.array) -> mx.array:
        return mx.where(chosen > 0, chosen / penalty, chosen * penalty)

    return change_logits(logits, list(set(seen)), penalize)


def penalize_output(logits: mx.array, outputs: Iterable[int], frequency: float, presence: float) -> mx.array:
    counts = Counter(outputs)
    times = mx.array(list(counts.values()))
    return change_logits(logits, list(counts), lambda chosen: chosen - (times * frequency + presence))


def log_probabilities(logits: mx.array) -> mx.array:
    shifted = logits - mx.max(logits)
    exponentials = mx.exp(shifted)
    padded = mx.pad(exponentials, (0, -exponentials.size % SUM_GROUP_SIZE))
    total = mx.sum(mx.sum(padded.reshape(-1, SUM_GROUP_SIZE), axis=1))
    return shifted - mx.log(total)
