"""Keys and values, kept: what one sequence has computed once is never computed again.

Each pass brings only the new tokens; their keys and values are put behind those of the passes before.
Source: Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 2.1.
"""

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .model import Model


def attention_without_cache(prompt_len: int, gen_len: int) -> int:
    """Keys (or values) computed per head and layer when every generated token starts from nothing.

    The prompt alone first, and then, for the s-th generated token, prompt_len + s tokens again.
    """
    return prompt_len + sum(prompt_len + step for step in range(1, gen_len + 1))


def attention_with_cache(prompt_len: int, gen_len: int) -> int:
    """The same count when each token's key and value are computed once and kept."""
    return prompt_len + gen_len


class CachedContext:
    """Forward passes over one sequence, one behind the other; each sees the keys and values of all before.

    Say with `expect` how many tokens the next pass brings, then run the model with this context.
    """

    def __init__(self, scale: float) -> None:
        self.positions = mx.array([], mx.int32)
        self.logit_rows: mx.array | None = None
        self.num_tokens = 0
        self._scale = scale
        self._past: dict[int, tuple[mx.array, mx.array]] = {}  # by layer; each [B, Hkv, S, D]

    def expect(self, num_new_tokens: int) -> None:
        """The next pass brings so many tokens: they stand behind all that came before.

        Sets `positions`, and `logit_rows` to the last of them; `num_tokens` counts them from now on.
        """
        self.positions = mx.arange(self.num_tokens, self.num_tokens + num_new_tokens, dtype=mx.int32)
        self.logit_rows = mx.array([num_new_tokens - 1])
        self.num_tokens += num_new_tokens

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Put k and v [B, Hkv, L, D] behind the layer's past, attend with q [B, H, L, D] -> [B, H, L, D].

        A query sees the whole past, and of the new tokens those up to its own.
        """
        if layer in self._past:
            past_k, past_v = self._past[layer]
            k, v = mx.concatenate([past_k, k], axis=2), mx.concatenate([past_v, v], axis=2)
        self._past[layer] = (k, v)
        return grouped_query_attention(q, k, v, self._scale, causal_mask(q.shape[2], k.shape[2]))


def generate_with_cache(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """The same tokens as `generate`, the prompt computed once and each token after it alone.

    Raises ValueError for an empty prompt, when the first token is asked for.
    """
    if not tokens:
        raise ValueError("an empty prompt: there is nothing to continue")
    context = CachedContext(model.config.attention_scale)
    new = list(tokens)
    for _ in range(max_tokens):
        context.expect(len(new))
        logits = model(mx.array([new], mx.int32), context)  # [1, 1, V]
        new = [int(mx.argmax(logits[0, 0]))]
        yield new[0]
        if new[0] in eos_token_ids:
            return
