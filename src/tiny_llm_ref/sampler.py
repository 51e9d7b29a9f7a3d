"""From logits to a token: temperature, filters and a draw; penalties and biases; log-probabilities.

Every function takes one row, logits [V]. A row's token depends only on its logits, its parameters, its tokens
so far, its seed and its output index, never on the other rows of the batch. A token that must not be drawn
gets the logit -inf, which is a probability of 0.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from random import Random

import mlx.core as mx

from .kernels import accelerated, compiled_kernel
from .sampling_params import SamplingParams

MASK_BITS = 32  # tokens in a word of a mask
SUM_GROUP_SIZE = 256  # numbers added in the first round of a sum; the second round adds the results


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k largest logits and set all others to -inf: logits [V] -> [V].

    k is at least 1. Tokens with the same logit as the k-th largest stay too, so more than k may stay; the
    result never depends on how a sort orders equal logits. If k is V or more, all stay.

    MLX checks no index: `sorted_logits[-k]` with k above V reads outside the array, which gives an arbitrary
    number or ends Python with a segmentation fault.

    >>> keep_top_k(mx.array([1.0, 3.0, 2.0, 3.0]), 1).tolist()
    [-inf, 3.0, -inf, 3.0]
    """
    kth = mx.min(mx.topk(logits, min(k, logits.shape[-1])))
    return mx.where(logits >= kth, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p: logits [V] -> [V].

    All other logits become -inf. Probabilities are the softmax of the given logits, so a token that an
    earlier filter removed has a probability of 0. p is above 0 and at most 1.

    Go from the most likely token to the least likely: a token stays if the probabilities before it sum to
    less than p. So the likeliest token always stays. Tokens as likely as the last one that stays also stay. A
    token of probability 0 never stays, even at p = 1: its logit is -inf, or so low that the probability is 0
    in float32. At p = 1 all other tokens stay, except that in float32 the sum can reach 1 early: tokens with
    a probability of about 1e-7 or less may then be removed.

    >>> keep_top_p(mx.log(mx.array([0.5, 0.125, 0.25, 0.125])), 0.625).tolist()  # 0.5 < 0.625 <= 0.5 + 0.25
    [-0.6931471824645996, -inf, -1.3862943649291992, -inf]
    """
    probabilities = mx.softmax(logits)
    descending = -mx.sort(-probabilities)
    before = mx.cumsum(descending) - descending  # probability of all likelier tokens
    last = mx.min(mx.where((before < p) & (descending > 0), descending, mx.inf))
    return mx.where(probabilities >= last, logits, -mx.inf)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Keep the tokens that are at least min_p times as likely as the likeliest: logits [V] -> [V].

    All other logits become -inf. The kept logits are unchanged, not turned into probabilities. min_p is
    between 0, which keeps all, and 1, which keeps only the likeliest token and those equally likely.

    >>> keep_min_p(mx.array([0.0, -1.0, -3.0]), 0.25).tolist()  # relative to the likeliest: 1, 0.37, 0.05
    [0.0, -1.0, -inf]
    """
    probabilities = mx.softmax(logits)
    return mx.where(probabilities >= min_p * mx.max(probabilities), logits, -mx.inf)


def uniform(seed: int, index: int) -> float:
    """Return a random number in [0, 1) that depends only on the request's seed and the output index."""
    odd = 0x9E3779B97F4A7C15  # spreads neighbouring seeds over all numbers; invertible modulo 2**64
    return Random((seed * odd + index) % 2**64).random()


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    """Draw a token id with the probabilities softmax(logits): logits [V] -> an array without axes.

    Invert the cumulative distribution. Compute the cumulative sums of the probabilities in the order of the
    ids. The token is the first whose cumulative sum is at least (1 - u) * total, where
    u = uniform(seed, index) and total is the last cumulative sum. Multiply by total because in float32 it may
    be below 1: otherwise a 1 - u near 1 could be larger than every cumulative sum. Use 1 - u because u can be
    0 but not 1: 1 - u is never 0, so a token of probability 0 is never drawn, not even the first.

    The only randomness is u: the same seed and index give the same token, whatever is drawn in between.

    The example shows pairs of 1 - u and the token.

    >>> probabilities = mx.array([0.25, 0.5, 0.0, 0.25])  # cumulative: 0.25, 0.75, 0.75, 1
    >>> [(round(1 - uniform(7, i), 2), draw(mx.log(probabilities), 7, i).item()) for i in range(4)]
    [(0.15, 0), (0.21, 0), (0.83, 3), (0.67, 1)]
    """
    cumulative = mx.cumsum(mx.softmax(logits))
    threshold = (1 - uniform(seed, index)) * cumulative[-1]
    return mx.argmax(cumulative >= threshold)


def _compiled(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """Choose the same token as `sample_token`, in one operator; if a logit is NaN, return its index."""
    filters = (params.min_p, params.top_k, params.top_p)
    temperature, number = (0.0, 0.0) if params.greedy else (params.temperature, uniform(seed, index))
    tokens, _ = compiled_kernel("sample")(logits[None], [0], temperature, *filters, [number])
    return tokens.reshape(())  # type: ignore[no-any-return]


@accelerated(compiled=_compiled)
def sample_token(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """Choose the token of one row by its parameters: logits [V] in float32 -> an array without axes.

    If `params.greedy` (a temperature of 0, or below 1e-5), return the index of the largest logit, without
    dividing, filtering or drawing. Otherwise, in this order:

    - divide by `params.temperature`;
    - filter by `params.min_p`; 0 is off;
    - filter by `params.top_k`; 0 and -1 are off;
    - filter by `params.top_p`; 1 is off;
    - draw with the seed and the index.

    A filter that is off removes nothing, so do not call it: `keep_top_k` has no k of 0, and `keep_top_p` at 1
    could remove unlikely tokens. Only `keep_min_p` may be called with 0, and may come after top-k: neither
    changes the result. Each filter gets the logits that the previous one returned, so the probabilities of
    the remaining tokens sum to 1 again. The given array does not change. Return the mx.array: `int(...)` or
    `.item()` here would make MLX compute now, once for each row of the batch.

    >>> logits = mx.array([1.0, 4.0, 3.0])
    >>> sample_token(logits, SamplingParams(temperature=0), seed=1, index=0).item()
    1
    >>> [sample_token(logits, SamplingParams(top_k=2), seed=1, index=i).item() for i in range(8)]
    [1, 1, 1, 1, 1, 2, 1, 1]
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


def change_logits(logits: mx.array, token_ids: list[int], change: Callable[[mx.array], mx.array]) -> mx.array:
    """Return a copy of logits [V] with `change` applied to those of `token_ids`.

    token_ids: n different ids; with none, the given array is returned. change: takes the logits [n] of these
    ids, in their order, and returns the new ones [n].

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
    """Penalize tokens that already appeared in the prompt or the output: logits [V] -> [V].

    seen: the tokens that appeared; any iterable, which may be empty and may repeat tokens. penalty: above 1
    makes them less likely, below 1 likelier. For each token in `seen`, divide a positive logit by the
    penalty, and multiply a negative one by it (dividing would move it towards 0, and make it likelier). 0 and
    -inf stay. A token is penalized once, however often it appeared. The given array does not change:
    `change_logits` makes the copy. Source: Keskar et al., "CTRL" (2019).

    >>> penalize_repetition(mx.array([2.0, -2.0, 4.0]), [1, 0, 0], 2.0).tolist()
    [1.0, -4.0, 4.0]
    """
    return change_logits(
        logits, sorted(set(seen)), lambda chosen: mx.where(chosen > 0, chosen / penalty, chosen * penalty)
    )


def penalize_output(logits: mx.array, outputs: Iterable[int], frequency: float, presence: float) -> mx.array:
    """Penalize tokens of the output by how often they appeared: logits [V] -> [V].

    outputs: the output's tokens; any iterable, which may be empty. If a token appears n times in it, n above
    0, subtract n * frequency + presence from its logit; negative penalties make it likelier. The given array
    does not change: `change_logits` makes the copy. Count first: in MLX, a subtraction through an index array
    that has an id twice takes effect once.

    >>> penalize_output(mx.array([5.0, 5.0, 5.0]), [0, 2, 0], 0.5, 1.0).tolist()
    [3.0, 5.0, 3.5]
    """
    counts = Counter(outputs)
    times = mx.array(list(counts.values()), mx.float32)
    return change_logits(logits, list(counts), lambda chosen: chosen - frequency * times - presence)


def log_probabilities(logits: mx.array) -> mx.array:
    """Return log(softmax(logits)), [V] -> [V].

    A request with the parameter `logprobs` gets these values, computed from the logits before any change.

    Compute a difference, logit - max - log(sum of e^(logit - max)): for a logit that is 200 below the
    largest, the softmax itself would be 0, and its log -inf. A logit of -inf gives -inf.

    Sum the exponentials in two rounds: first in groups of `SUM_GROUP_SIZE` (256), such as neighbours, then
    these sums. Add zeros if V is not a multiple of 256. In one long float32 sum, each small number is rounded
    against a large total: with 49,152 tokens the result can be off by 0.001 (also with `mx.logsumexp`), but
    by less than 0.00005 with two rounds.

    >>> log_probabilities(mx.array([0.0, 0.0, -200.0, -mx.inf])).tolist()
    [-0.6931471824645996, -0.6931471824645996, -200.69314575195312, -inf]
    """
    shifted = logits - mx.max(logits)
    missing = -shifted.shape[-1] % SUM_GROUP_SIZE
    weights = mx.pad(mx.exp(shifted), (0, missing)).reshape(-1, SUM_GROUP_SIZE)
    return shifted - mx.log(mx.sum(mx.sum(weights, axis=-1)))


def forbid(logits: mx.array, token_ids: Iterable[int]) -> mx.array:
    """Set the logits of some tokens to -inf: logits [V] -> [V]."""
    return change_logits(logits, list(token_ids), lambda chosen: mx.full(chosen.shape, -mx.inf))


def keep_allowed(logits: mx.array, mask: mx.array) -> mx.array:
    """Keep the logits of the allowed tokens and set all others to -inf: logits [V] -> [V].

    mask: [ceil(V / 32)] int32; bit t % 32 of word t // 32 is 1 if token t is allowed. Bits after the last
    token have no meaning. A NaN stays only if its token is allowed, so check for NaN before.

    >>> keep_allowed(mx.array([1.0, 2.0, 3.0]), mx.array([0b101], mx.int32)).tolist()
    [1.0, -inf, 3.0]
    """
    bits = mask[:, None] >> mx.arange(MASK_BITS, dtype=mx.int32)
    is_allowed = (bits & 1).reshape(-1)[: logits.shape[-1]]
    return mx.where(is_allowed == 1, logits, -mx.inf)


def add_bias(logits: mx.array, bias: Mapping[int, float]) -> mx.array:
    """Add a bias to the logits of some tokens: logits [V] -> [V]. bias: by token id."""
    return change_logits(logits, list(bias), lambda chosen: chosen + mx.array(list(bias.values())))


def adjust_logits(
    logits: mx.array,
    params: SamplingParams,
    prompt: Seq[int],
    outputs: Seq[int],
    end_token_ids: Iterable[int],
) -> mx.array:
    """Apply `min_tokens`, bias and penalties to logits [V], in vLLM's order; return the changed logits [V].

    end_token_ids: tokens that would end the sequence. They are forbidden until the sequence has `min_tokens`
    outputs.
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
