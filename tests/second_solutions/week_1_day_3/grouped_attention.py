"""The attention layer: one group of heads at a time, projections cut before they are reshaped."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from .attention import causal_mask, scaled_dot_product_attention
from .kv_context import KVContext
from .linear import LinearLike
from .norm import rms_norm
from .rope import rope


def grouped_query_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """One key head after the other."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group, rest = divmod(heads, kv_heads)
    if rest or not group:
        raise ValueError(f"{heads} heads on {kv_heads}")
    return mx.concatenate(
        [
            scaled_dot_product_attention(
                q[:, h * group : (h + 1) * group], k[:, h : h + 1], v[:, h : h + 1], scale, mask
            )
            for h in range(kv_heads)
        ],
        axis=1,
    )


class NoCacheContext:
    """The context of a forward pass over whole sequences: keys and values are this pass's, nothing is stored.

    length: tokens in each sequence; they stand at positions 0 to length - 1. scale: what attention scores are
    multiplied by. logit_rows: which of the tokens need logits, [R] int32; None, as at first, for all.
    """

    def __init__(self, length: int, scale: float) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows: mx.array | None = None
        self._scale = scale
        self._mask = causal_mask(length, length)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D], causal; the same in every layer."""
        return grouped_query_attention(q, k, v, self._scale, self._mask)


class Heads(NamedTuple):
    """The queries of some tokens [B, H, L, D], and their keys and values [B, Hkv, L, D]."""

    q: mx.array
    k: mx.array
    v: mx.array


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    layer: the layer's number, by which a context finds the keys that the layer stored before.
    num_heads, num_kv_heads, head_dim: H, Hkv and D.
    inv_freq: [D/2], the rotary frequencies of the layer.
    qkv_proj: one matrix that gives each token its queries, keys and values: H * D numbers, then Hkv * D, then
        Hkv * D. It is the checkpoint's q_proj, k_proj and v_proj in one.
    o_proj: the matrix after attention, [..., H * D] -> [..., E].
    q_norm, k_norm: [D], weights of the norms of each query and each key, with `eps`; None in an architecture
        without these norms.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: mx.array
    qkv_proj: LinearLike
    o_proj: LinearLike
    q_norm: mx.array | None
    k_norm: mx.array | None
    eps: float

    def project(self, x: mx.array, positions: mx.array) -> Heads:
        """Cut the numbers of a token first, then make heads of each part."""
        numbers, D = self.qkv_proj(x), self.head_dim
        parts, start = [], 0
        for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads):
            part = numbers[:, :, start : start + heads * D]
            parts.append(part.reshape(*x.shape[:2], heads, D).transpose(0, 2, 1, 3))
            start += heads * D
        normed = self._normed(mx.concatenate(parts[:2], axis=1))
        q, k = normed[:, : self.num_heads], normed[:, self.num_heads :]
        return Heads(rope(q, positions, self.inv_freq), rope(k, positions, self.inv_freq), parts[2])

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """The heads are moved back with a transposition, and flattened."""
        heads = self.project(x, context.positions)
        out = context.attend(self.layer, heads.q, heads.k, heads.v)
        return self.o_proj(mx.flatten(mx.transpose(out, (0, 2, 1, 3)), start_axis=2))

    def _normed(self, qk: mx.array) -> mx.array:
        """qk [B, H + Hkv, L, D] -> the same, each head normalised if the architecture does that."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        queries, keys = mx.split(qk, [self.num_heads], axis=1)
        return mx.concatenate(
            [rms_norm(queries, self.q_norm, self.eps), rms_norm(keys, self.k_norm, self.eps)], axis=1
        )
