"""From logits to a token: biases, penalties, temperature, filters, and a draw of the request's own.

Every function here sees one row. A row's token is a pure function of its logits, its parameters, its
tokens so far, its seed and its output index: never of the other rows of the batch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from random import Random

import mlx.core as mx

from .kernels import accelerated, compiled_kernel
from .sampling_params import SamplingParams

SUMMED_AT_ONCE = 256  # numbers that are added one by one; their sums are added again


def forbid(logits: mx.array, token_ids: Iterable[int]) -> mx.array:
    """The logits [V] of these tokens become -inf."""
    return _changed(logits, list(token_ids), lambda chosen: mx.full(chosen.shape, -mx.inf))


def add_bias(logits: mx.array, bias: Mapping[int, float]) -> mx.array:
    """Add to the logits [V] of some tokens, by token id."""
    return _changed(logits, list(bias), lambda chosen: chosen + mx.array(list(bias.values())))


def penalize_repetition(logits: mx.array, seen: Iterable[int], penalty: float) -> mx.array:
    """Make tokens of prompt and output less likely (penalty > 1) or more: logits [V].

    A positive logit is divided by the penalty, a negative one multiplied, however often the token was
    there. The array that was given stays as it is. Source: Keskar et al., "CTRL" (2019).
    """
    return _changed(
        logits, sorted(set(seen)), lambda chosen: mx.where(chosen > 0, chosen / penalty, chosen * penalty)
    )


def penalize_output(logits: mx.array, outputs: Iterable[int], frequency: float, presence: float) -> mx.array:
    """Lower the logits [V] of tokens of the output: by `presence`, and `frequency` for each time.

    The array that was given stays as it is.
    """
    counts = Counter(outputs)
    times = mx.array(list(counts.values()), mx.float32)
    return _changed(logits, list(counts), lambda chosen: chosen - frequency * times - presence)


def adjust_logits(
    logits: mx.array,
    params: SamplingParams,
    prompt: Seq[int],
    outputs: Seq[int],
    end_token_ids: Iterable[int],
) -> mx.array:
    """The logits [V] that a token is chosen from: limits, bias and penalties, in vLLM's order.

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


def _changed(logits: mx.array, token_ids: list[int], change: Callable[[mx.array], mx.array]) -> mx.array:
    """A copy of logits [V] in which the chosen ones are `change` of what they were."""
    if not token_ids:
        return logits
    chosen = mx.array(token_ids)
    copy = mx.array(logits)
    copy[chosen] = change(logits[chosen])
    return copy


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """All but the k largest of logits [V] become -inf (ties with the k-th stay; k above V keeps all)."""
    kth = mx.min(mx.topk(logits, min(k, logits.shape[-1])))
    return mx.where(logits >= kth, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """All but the smallest set of likeliest tokens with total probability >= p become -inf.

    logits [V]; probabilities are those of the logits given, so a filter before this one renormalises
    them. The likeliest token always stays, and so do ties with the last one that stays; a token of
    probability zero never does.
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


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the request's seed and the output index alone."""
    odd = 0x9E3779B97F4A7C15  # spreads neighbouring seeds over all numbers; invertible modulo 2**64
    return Random((seed * odd + index) % 2**64).random()


def draw(logits: mx.array, seed: int, index: int) -> mx.array:
    """Draw a token id from softmax(logits [V]) by inverting the cumulative distribution.

    The threshold lies in (0, total], so a token of probability zero is never drawn.
    """
    cumulative = mx.cumsum(mx.softmax(logits))
    threshold = (1 - uniform(seed, index)) * cumulative[-1]
    return mx.argmax(cumulative >= threshold)


def _compiled(logits: mx.array, params: SamplingParams, seed: int, index: int) -> mx.array:
    """The same token in one operator; the index of a NaN where there is one."""
    temperature = 0.0 if params.greedy else params.temperature
    filters = (params.min_p, params.top_k, params.top_p)
    return compiled_kernel("sample")(  # type: ignore[no-any-return]
        logits, temperature, *filters, uniform(seed, index)
    )


@accelerated(compiled=_compiled)
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
    """log softmax of logits [V], before everything that changes them.

    Added up in two rounds: one long sum in float32 would be off by 1e-4 at a vocabulary of 49,152.
    """
    shifted = logits - mx.max(logits)
    missing = -shifted.shape[-1] % SUMMED_AT_ONCE
    weights = mx.pad(mx.exp(shifted), (0, missing)).reshape(-1, SUMMED_AT_ONCE)
    return shifted - mx.log(mx.sum(mx.sum(weights, axis=-1)))
