# A second solution of day 1.7, written from the docstrings alone.
"""From logits to a token: temperature, filters and a draw; penalties and biases; log-probabilities.

Every function sees one row, logits [V]. A row's token is a pure function of its logits, its parameters, its
tokens so far, its seed and its output index: never of the other rows of the batch. A token that must not be
drawn gets the logit -inf, which is a probability of 0.
"""

from collections import Counter
from collections.abc import Iterable

import mlx.core as mx

from .sampling_params import SamplingParams


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k largest of logits [V]; all others become -inf, [V].

    k is at least 1. Tokens with the same logit as the k-th stay too, so more than k may stay, and which ones
    stay does not depend on the order of a sort. A k of V or more keeps all.

    >>> keep_top_k(mx.array([1.0, 3.0, 2.0, 3.0]), 1).tolist()
    [-inf, 3.0, -inf, 3.0]
    """
    kth = mx.sort(logits)[-min(k, logits.size)]
    return mx.where(logits >= kth, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p; logits [V] -> [V].

    All other logits become -inf. Probabilities are the softmax of the logits that are given, so they are
    shares of what a filter before this one has left. p is above 0 and at most 1. The likeliest token always
    stays: going from the likeliest on, a token stays while those before it sum to less than p. Tokens as
    likely as the last one that stays, stay too. A token of probability 0 never stays, even at a p of 1: that
    is a logit of -inf, and also one so low that its probability is 0 in float32.

    >>> keep_top_p(mx.log(mx.array([0.5, 0.125, 0.25, 0.125])), 0.625).tolist()  # 0.5 is less, 0.75 enough
    [-0.6931471824645996, -inf, -1.3862943649291992, -inf]
    """
    probabilities = mx.softmax(logits.astype(mx.float32))
    falling = mx.sort(probabilities)[::-1]
    before = mx.cumsum(falling) - falling
    least = mx.min(mx.where(before < p, falling, mx.inf))
    keep = (probabilities >= least) & (probabilities > 0)
    return mx.where(keep, logits, -mx.inf)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Keep tokens that are at least min_p times as likely as the likeliest; logits [V] -> [V].

    All other logits become -inf; the result has logits, not probabilities. min_p is from 0, which keeps all,
    to 1, which keeps the likeliest token and those as likely.

    >>> keep_min_p(mx.array([0.0, -1.0, -3.0]), 0.25).tolist()  # of the likeliest one's: 1, 0.37 and 0.05
    [0.0, -1.0, -inf]
    """
    ratio = mx.exp(logits - mx.max(logits))
    return mx.where(ratio >= min_p, logits, -mx.inf)


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    """Draw a token id with the probabilities softmax(logits), logits [V]; the result has no axes.

    Invert the cumulative distribution: lay the probabilities side by side in the order of the ids. The token
    is the first whose cumulative sum reaches (1 - u) * total, where u = uniform(seed, index) and total is the
    last cumulative sum. In float32 that need not be 1, and a u near 0 could otherwise reach no token at all.
    u can be 0 but not 1; 1 - u is never 0, so a token of probability 0 is never drawn, not even the first.
    The only randomness is u: the same seed and index give the same token, whatever else is drawn in between.

    >>> probabilities = mx.array([0.25, 0.5, 0.0, 0.25])  # cumulative: 0.25, 0.75, 0.75, 1
    >>> [(round(1 - uniform(7, i), 2), draw(mx.log(probabilities), 7, i).item()) for i in range(4)]
    [(0.15, 0), (0.21, 0), (0.83, 3), (0.67, 1)]
    """
    cumulative = mx.cumsum(mx.softmax(logits))
    point = (1 - uniform(seed, index)) * cumulative[-1]
    return mx.argmax(cumulative >= point)


def sample_token(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """Choose the token of one row, logits [V] in float32, as its parameters say; the result has no axes.

    If `params.greedy` (a temperature of 0, or below 1e-5), it is the index of the largest logit: nothing is
    divided, filtered or drawn. Otherwise, in this order:

    - divide by `params.temperature`;
    - keep by `params.min_p`; 0 is off;
    - keep by `params.top_k`; 0 and -1 are off;
    - keep by `params.top_p`; 1 is off;
    - draw with the seed and the index.

    Each filter sees the logits that the one before it left, so their probabilities sum to 1 again. Return an
    mx.array: `int(...)` or `.item()` here would make MLX compute now, once for each row of the batch.

    >>> logits = mx.array([1.0, 4.0, 3.0])
    >>> sample_token(logits, SamplingParams(temperature=0), seed=1, index=0).item()
    1
    >>> [sample_token(logits, SamplingParams(top_k=2), seed=1, index=i).item() for i in range(8)]
    [1, 1, 1, 1, 1, 2, 1, 1]
    """
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
    """Make the tokens of prompt and output less likely (penalty above 1) or likelier (below 1): logits [V].

    A positive logit of a token in `seen` is divided by the penalty, a negative one is multiplied by it: a
    division would bring it nearer to 0, and so make it likelier. 0 and -inf stay. A token counts once,
    however often it was there; `seen` may be empty, and any iterable. The array that is given stays as it is;
    `change_logits` makes the copy. Source: Keskar et al., "CTRL" (2019).

    >>> penalize_repetition(mx.array([2.0, -2.0, 4.0]), [1, 0, 0], 2.0).tolist()
    [1.0, -4.0, 4.0]
    """

    def penalize(chosen: mx.array) -> mx.array:
        return mx.where(chosen > 0, chosen / penalty, chosen * penalty)

    return change_logits(logits, list(set(seen)), penalize)


def penalize_output(logits: mx.array, outputs: Iterable[int], frequency: float, presence: float) -> mx.array:
    """Make the tokens of the output less likely: logits [V], less `frequency` for each time and `presence`
    once.

    For a token that is n times in `outputs`, n above 0, take n * frequency + presence from its logit;
    negative penalties make it likelier. `outputs` may be empty, and any iterable. The array that is given
    stays as it is; `change_logits` makes the copy. In MLX a subtraction through an index array that names an
    id twice takes effect once, so count first.

    >>> penalize_output(mx.array([5.0, 5.0, 5.0]), [0, 2, 0], 0.5, 1.0).tolist()
    [3.0, 5.0, 3.5]
    """
    counts = Counter(outputs)
    times = mx.array(list(counts.values()))
    return change_logits(logits, list(counts), lambda chosen: chosen - (times * frequency + presence))


def log_probabilities(logits: mx.array) -> mx.array:
    """Return log(softmax(logits)), [V]: what a request's `logprobs` report, of logits before any change.

    Compute it as a difference, logit - max - log(sum of e^(logit - max)): the softmax itself would be 0 for a
    token 200 below the best one, and its log -inf. A logit of -inf gives -inf. Add the exponentials up in two
    rounds, `SUMMED_AT_ONCE` (256) neighbours at a time and then these sums, with zeros where V is no multiple
    of 256. In one long float32 sum each small number is rounded against a large total: at 49,152 tokens the
    result can be off by 0.001 (`mx.logsumexp` too), in two rounds by less than 0.00005.

    >>> log_probabilities(mx.array([0.0, 0.0, -200.0, -mx.inf])).tolist()
    [-0.6931471824645996, -0.6931471824645996, -200.69314575195312, -inf]
    """
    shifted = logits - mx.max(logits)
    exponentials = mx.exp(shifted)
    padded = mx.pad(exponentials, (0, -exponentials.size % SUMMED_AT_ONCE))
    total = mx.sum(mx.sum(padded.reshape(-1, SUMMED_AT_ONCE), axis=1))
    return shifted - mx.log(total)
