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
    return prompt_len + sum(prompt_len + s for s in range(1, gen_len + 1))


class CachedContext:
    def begin_pass(self, num_new_tokens: int) -> None:
        start = self.num_tokens
        self.num_tokens = start + num_new_tokens
        self.positions = mx.arange(start, self.num_tokens, dtype=mx.int32)
        self.logit_rows = mx.array([num_new_tokens - 1], mx.int32)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
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
    if not tokens:
        raise ValueError("the prompt is empty")
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
