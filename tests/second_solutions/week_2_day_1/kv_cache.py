"""A cache of keys and values: what one sequence has computed once is never computed again.

Each forward pass brings only the new tokens; their keys and values are appended to those of earlier passes.
Source: Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 2.1.
"""

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .model import Model


def attention_without_cache(prompt_len: int, gen_len: int) -> int:
    """Count the keys computed per head and layer (values: as many) when every pass starts from nothing.

    The course text's formula: one pass over the prompt, then for each generated token s = 1 .. gen_len a pass
    over prompt_len + s tokens, which computes all their keys again. gen_len = 0 leaves the prompt's pass.

    The last of these passes is not needed: it would choose the token after the last one. The loop of day 1.6
    stops before it: to generate 2 tokens after 3 it runs passes over 3 and 4 tokens, and the formula adds 5.

    >>> attention_without_cache(3, 2)  # 3 + 4 + 5
    12
    """
    return prompt_len + sum(prompt_len + s for s in range(1, gen_len + 1))


class CachedContext:
    def begin_pass(self, num_new_tokens: int) -> None:
        """Prepare a pass over `num_new_tokens` tokens (1 or more) that follow all tokens before.

        Sets `positions` [num_new_tokens], int32: the tokens' places in the whole sequence, from 0. Sets
        `logit_rows` [1]: the row of the last new token, counted from the start of this pass, because only its
        logits choose the next token. Adds the new tokens to `num_tokens`.

        >>> context = CachedContext(scale=1.0)
        >>> context.begin_pass(5)
        >>> context.begin_pass(2)
        >>> context.positions.tolist(), context.logit_rows.tolist(), context.num_tokens
        ([5, 6], [1], 7)
        """
        start = self.num_tokens
        self.num_tokens = start + num_new_tokens
        self.positions = mx.arange(start, self.num_tokens, dtype=mx.int32)
        self.logit_rows = mx.array([num_new_tokens - 1], mx.int32)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v [B, Hkv, L, D] to the layer's past, then attend with q [B, H, L, D] -> [B, H, L, D].

        `_past[layer]` holds the layer's keys and values of all passes, [B, Hkv, S, D] each; a layer that is
        not in it has no past yet. A query sees the whole past, and of the new tokens those up to its own
        (`causal_mask`). The scale is `_scale`. `mx.concatenate` joins along axis 0 unless told otherwise.

        >>> context, token = CachedContext(scale=1.0), mx.ones((1, 1, 1, 1))
        >>> context.attend(0, token, token, 2 * token).item()
        2.0
        >>> context.attend(0, token, token, 4 * token).item()  # equal keys: the mean of the values 2 and 4
        3.0
        """
        if layer in self._past:
            past_k, past_v = self._past[layer]
            k = mx.concatenate([past_k, k], axis=2)
            v = mx.concatenate([past_v, v], axis=2)
        self._past[layer] = (k, v)
        mask = causal_mask(q.shape[2], k.shape[2])
        return grouped_query_attention(q, k, v, self._scale, mask)


def generate_with_cache(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """Continue `tokens` greedily: the tokens of `generate` (day 1.6), each computed once.

    Makes one `CachedContext` with `model.config.attention_scale`. The first pass brings the whole prompt,
    each later pass only the token chosen last. Yields each token when it is chosen, at most `max_tokens` of
    them (0: none). A token of `eos_token_ids` is yielded too and is the last; in the prompt it ends nothing.
    Of tokens with equal logits, takes the lowest id (`mx.argmax` does).

    Raises ValueError for an empty prompt when the first token is asked for, before it runs the model.

    >>> next(generate_with_cache(None, [], 5, ()))
    Traceback (most recent call last):
    ValueError: an empty prompt: there is nothing to continue
    """
    if not tokens:
        raise ValueError("an empty prompt: there is nothing to continue")
    context = CachedContext(model.config.attention_scale)
    new_tokens = list(tokens)
    for _ in range(max_tokens):
        context.begin_pass(len(new_tokens))
        logits = model(mx.array([new_tokens], mx.int32), context)  # [1, 1, vocab_size]
        token = int(mx.argmax(logits[0, -1]).item())
        yield token
        if token in eos_token_ids:
            return
        new_tokens = [token]
