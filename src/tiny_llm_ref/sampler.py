"""From logits to a token: temperature, the filters, and a draw that depends on the request alone.

Every function here sees one row. A row's token is a pure function of its logits, its parameters,
its seed and its output index: never of the other rows of the batch.
"""

import mlx.core as mx

from .sampling_params import SamplingParams


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """All but the k largest of logits [V] become -inf (ties with the k-th stay)."""
    kth = mx.min(mx.topk(logits, min(k, logits.shape[-1])))
    return mx.where(logits >= kth, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """All but the smallest set of likeliest tokens with total probability >= p become -inf.

    logits [V]; probabilities are those of the logits given, so a filter before this one renormalises
    them. The likeliest token always stays, and so do ties with the last one that stays.
    """
    probabilities = mx.softmax(logits)
    descending = -mx.sort(-probabilities)
    before = mx.cumsum(descending) - descending  # probability of all likelier tokens
    last = mx.min(mx.where((before < p) & (descending > 0), descending, mx.inf))
    return mx.where(probabilities >= last, logits, -mx.inf)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Tokens less likely than min_p times the likeliest become -inf; logits [V]."""
    probabilities = mx.softmax(logits)
    return mx.where(probabilities >= min_p * mx.max(probabilities), logits, -mx.inf)


def uniform(seed: int, index: int) -> mx.array:
    """A number in [0, 1) that depends on the request's seed and the output index alone."""
    odd = 0x9E3779B97F4A7C15  # spreads neighbouring seeds over the key space; invertible modulo 2**64
    return mx.random.uniform(key=mx.random.key((seed * odd + index) % 2**64))


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    """Draw a token id from softmax(logits [V]) by inverting the cumulative distribution.

    The threshold lies in (0, total], so a token of probability zero is never drawn.
    """
    cumulative = mx.cumsum(mx.softmax(logits))
    threshold = (1 - uniform(seed, index)) * cumulative[-1]
    return mx.argmax(cumulative >= threshold)


def sample_token(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """The token id, unevaluated, for one row: logits [V] float32.

    Temperature first, then min-p, top-k and top-p, each on what the one before it left, renormalised.
    """
    if params.greedy:
        return mx.argmax(logits)
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    return draw(logits, seed, index)


def log_probabilities(logits: mx.array) -> mx.array:
    """log softmax of logits [V], before temperature and filters."""
    return logits - mx.logsumexp(logits)
