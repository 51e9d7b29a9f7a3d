# A second solution of day 1.3, written only from the docstrings.
"""The attention layer: projections, rotation, and query heads in groups that share keys and values.

The layer does not know where keys and values are stored: it hands them to the context of the forward pass.
`NoCacheContext` is the simplest context; later ones store keys and values in a cache or in pages. Source:
Ainslie et al., "GQA" (2023).
"""

import mlx.core as mx

from .attention import scaled_dot_product_attention
from .kv_context import KVContext
from .rope import rope


def grouped_query_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads != 0:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key and value heads evenly")
    groups = q.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    out = scaled_dot_product_attention(groups, mx.expand_dims(k, 2), mx.expand_dims(v, 2), scale, mask)
    return out.reshape(batch, heads, length, dim)


class Attention:
    def project(self, x: mx.array, positions: mx.array) -> Heads:
        batch, length, _ = x.shape
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(x).reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)
        qk, v = mx.split(qkv, [self.num_heads + self.num_kv_heads], axis=1)
        qk = rope(self._normed(qk), positions, self.inv_freq)
        q, k = mx.split(qk, [self.num_heads], axis=1)
        return Heads(q, k, v)

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        batch, length, _ = x.shape
        heads = self.project(x, context.positions)
        out = context.attend(self.layer, heads.q, heads.k, heads.v)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, self.num_heads * self.head_dim))
