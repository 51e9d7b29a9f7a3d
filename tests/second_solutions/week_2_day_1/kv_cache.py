"""The cache of one sequence: a past that begins as arrays of no tokens."""

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .model import Model


def attention_without_cache(prompt_len: int, gen_len: int) -> int:
    """All passes have the prompt; the generated tokens are a triangle."""
    return (gen_len + 1) * prompt_len + gen_len * (gen_len + 1) // 2


def attention_with_cache(prompt_len: int, gen_len: int) -> int:
    """Each token once."""
    return prompt_len + gen_len


class CachedContext:
    """Keys and values of all passes so far."""

    def __init__(self, scale: float) -> None:
        self.positions = mx.array([], mx.int32)
        self.logit_rows: mx.array | None = None
        self.num_tokens = 0
        self._scale = scale
        self._past: dict[int, tuple[mx.array, mx.array]] = {}

    def begin_pass(self, num_new_tokens: int) -> None:
        """Positions as a list."""
        stop = self.num_tokens + num_new_tokens
        self.positions = mx.array(list(range(self.num_tokens, stop)), mx.int32)
        self.logit_rows = mx.array([num_new_tokens - 1], mx.int32)
        self.num_tokens = stop

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """A layer without a past has one of no tokens."""
        nothing = (k[:, :, :0], v[:, :, :0])
        past = self._past.get(layer, nothing)
        joined = [mx.concatenate(parts, axis=-2) for parts in zip(past, (k, v), strict=True)]
        self._past[layer] = (joined[0], joined[1])
        mask = causal_mask(q.shape[-2], joined[0].shape[-2])
        return grouped_query_attention(q, joined[0], joined[1], self._scale, mask)


def generate_with_cache(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """Counts down."""
    if len(tokens) == 0:
        raise ValueError("an empty prompt: there is nothing to continue")
    context, feed = CachedContext(model.config.attention_scale), [*tokens]
    while max_tokens > 0:
        context.begin_pass(len(feed))
        token = int(mx.argmax(model(mx.array([feed]), context)[0, -1]).item())
        yield token
        if token in eos_token_ids:
            break
        feed, max_tokens = [token], max_tokens - 1
