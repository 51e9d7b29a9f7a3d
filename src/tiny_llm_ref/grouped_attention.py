"""The attention layer: projections, rotation, and heads in groups that share keys and values.

Source: Ainslie et al., "GQA" (2023). The layer does not know where keys and values live: it hands
them to the context of the forward pass.
"""

from dataclasses import dataclass

import mlx.core as mx

from .attention import causal_mask, scaled_dot_product_attention
from .kv_context import KVContext
from .linear import LinearLike
from .norm import rms_norm
from .rope import rope


def grouped_query_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Attention in which H / Hkv query heads share one key and value head.

    q [B, H, L, D], k and v [B, Hkv, S, D], mask broadcastable to [L, S] -> [B, H, L, D]. Query head
    h reads key and value head h // (H / Hkv). Nothing need be repeated in memory: the group can be an
    axis over which k and v broadcast. Raises ValueError where H is no multiple of Hkv.
    """
    B, H, L, D = q.shape
    kv_heads = k.shape[1]
    if H % kv_heads:
        raise ValueError(f"{H} query heads cannot share {kv_heads} key and value heads evenly")
    grouped = q.reshape(B, kv_heads, H // kv_heads, L, D)  # [B, Hkv, group, L, D]
    out = scaled_dot_product_attention(grouped, k[:, :, None], v[:, :, None], scale, mask)
    return out.reshape(B, H, L, D)


class NoCacheContext:
    """A forward pass over whole sequences that remembers nothing: keys and values are this call's."""

    def __init__(self, length: int, scale: float) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows: mx.array | None = None
        self._scale = scale
        self._mask = causal_mask(length, length)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D], causal."""
        return grouped_query_attention(q, k, v, self._scale, self._mask)


@dataclass(frozen=True)
class Attention:
    """One layer's attention; qkv_proj is the checkpoint's q_proj, k_proj and v_proj, stacked.

    q_norm and k_norm [D] are there where the architecture normalises queries and keys head by head.
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

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """x [B, L, E] -> [B, L, E]: project, split into heads, rotate q and k, attend, project back.

        Heads come out of the projection as queries, keys, values; queries and keys together are normalised
        (`_normed`) and then rotated.
        """
        B, L, _ = x.shape
        heads = self.qkv_proj(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)  # [B, H + 2 Hkv, L, D]
        qk, v = mx.split(heads, [self.num_heads + self.num_kv_heads], axis=1)
        qk = rope(self._normed(qk), context.positions, self.inv_freq)
        q, k = mx.split(qk, [self.num_heads], axis=1)
        out = context.attend(self.layer, q, k, v)  # [B, H, L, D]
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))

    def _normed(self, qk: mx.array) -> mx.array:
        """qk [B, H + Hkv, L, D] -> the same, each head normalised where the architecture does it."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        queries, keys = mx.split(qk, [self.num_heads], axis=1)
        return mx.concatenate(
            [rms_norm(queries, self.q_norm, self.eps), rms_norm(keys, self.k_norm, self.eps)], axis=1
        )
