"""A cache of keys and values: a sequence never computes them twice for the same token.

Each forward pass brings only the new tokens; their keys and values are appended to those of earlier passes.
Source: Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 2.1.
"""

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .model import Model


def attention_without_cache(prompt_len: int, gen_len: int) -> int:
    """Count the keys computed per head and layer if every pass recomputes all of them.

    As many values are computed. The formula counts one pass over the prompt, and for each generated token
    s = 1 .. gen_len one pass over prompt_len + s tokens, which computes all their keys again. With
    gen_len = 0, only the prompt's pass remains.

    The formula counts one pass more than the loop of day 1.6 runs. To generate 2 tokens after 3, the loop
    runs passes over 3 and 4 tokens; the formula also counts the pass over 5, which would choose a third
    token. Count it too.

    >>> attention_without_cache(3, 2)  # 3 + 4 + 5
    12
    """
    return prompt_len + sum(prompt_len + step for step in range(1, gen_len + 1))


def attention_with_cache(prompt_len: int, gen_len: int) -> int:
    """Count the keys computed per head and layer if each token's key is computed once and kept.

    Like `attention_without_cache`, it counts every token, including the last one, whose key
    `generate_with_cache` never computes.

    >>> attention_with_cache(3, 2)
    5
    """
    return prompt_len + gen_len


class CachedContext:
    """The context of consecutive forward passes over one sequence; each pass sees all earlier passes' tokens.

    Before each pass, call `begin_pass`; then run the model with this context. The model calls `attend` once
    for each layer. scale: the factor of the attention scores (`ModelConfig.attention_scale`).

    positions, logit_rows: those of the current pass, as in `KVContext`. num_tokens: the tokens of all passes
    so far, including the current one.
    """

    def __init__(self, scale: float) -> None:
        self.positions = mx.array([], mx.int32)
        self.logit_rows: mx.array | None = None
        self.num_tokens = 0
        self._scale = scale
        self._past: dict[int, tuple[mx.array, mx.array]] = {}  # by layer; each [B, Hkv, S, D]

    def begin_pass(self, num_new_tokens: int) -> None:
        """Prepare a pass over the next `num_new_tokens` tokens (1 or more) of the sequence.

        Sets `positions` [num_new_tokens], int32: the new tokens' positions in the whole sequence, from 0.
        Sets `logit_rows` [1]: the row of the last new token, counted from the start of this pass, because
        only its logits choose the next token. Adds the new tokens to `num_tokens`.

        >>> context = CachedContext(scale=1.0)
        >>> context.begin_pass(5)
        >>> context.begin_pass(2)
        >>> context.positions.tolist(), context.logit_rows.tolist(), context.num_tokens
        ([5, 6], [1], 7)
        """
        self.positions = mx.arange(self.num_tokens, self.num_tokens + num_new_tokens, dtype=mx.int32)
        self.logit_rows = mx.array([num_new_tokens - 1])
        self.num_tokens += num_new_tokens

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v [B, Hkv, L, D] to the layer's past, then attend with q [B, H, L, D] -> [B, H, L, D].

        `_past[layer]` holds the layer's keys and values of all passes, [B, Hkv, S, D] each; a layer without
        an entry has no past yet. A query sees all earlier passes' tokens, and the new tokens up to its own
        (`causal_mask`). The scale is `_scale`. `mx.concatenate` joins along axis 0 unless you name another.

        >>> context, token = CachedContext(scale=1.0), mx.ones((1, 1, 1, 1))
        >>> context.attend(0, token, token, 2 * token).item()
        2.0
        >>> context.attend(0, token, token, 4 * token).item()  # equal keys: the mean of the values 2 and 4
        3.0
        """
        if layer in self._past:
            past_k, past_v = self._past[layer]
            k, v = mx.concatenate([past_k, k], axis=2), mx.concatenate([past_v, v], axis=2)
        self._past[layer] = (k, v)
        return grouped_query_attention(q, k, v, self._scale, causal_mask(q.shape[2], k.shape[2]))


def generate_with_cache(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """Continue `tokens` greedily; yield the same tokens as `generate` (day 1.6), but compute each key once.

    Makes one `CachedContext` with `model.config.attention_scale`. The model takes token ids [1, L] and the
    context, and returns logits [1, R, vocab_size], a row for each of the context's R `logit_rows`. The first
    pass computes the whole prompt, each later pass only the token chosen last. Of tokens with equal logits,
    takes the lowest id, as `mx.argmax` does.

    Yields each token as soon as it is chosen, at most `max_tokens` of them (0: none). Stops after the first
    generated token that is in `eos_token_ids`; that token is yielded too. Such a token in the prompt has no
    effect.

    Raises ValueError for an empty prompt when the first token is requested, before it runs the model.

    >>> next(generate_with_cache(None, [], 5, ()))
    Traceback (most recent call last):
    ValueError: an empty prompt: there is nothing to continue
    """
    if not tokens:
        raise ValueError("an empty prompt: there is nothing to continue")
    context = CachedContext(model.config.attention_scale)
    new = list(tokens)
    for _ in range(max_tokens):
        context.begin_pass(len(new))
        logits = model(mx.array([new], mx.int32), context)  # [1, 1, V]
        new = [int(mx.argmax(logits[0, 0]))]
        yield new[0]
        if new[0] in eos_token_ids:
            return
