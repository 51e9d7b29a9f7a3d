# A second solution of day 1.3, written from the docstrings alone.
"""The attention layer: projections, rotation, and query heads in groups that share keys and values.

The layer does not know where keys and values are stored: it hands them to the context of the forward pass.
`NoCacheContext` is the simplest context; caches and pages are others. Source: Ainslie et al., "GQA" (2023).
"""

import mlx.core as mx

from .attention import scaled_dot_product_attention
from .kv_context import KVContext
from .rope import rope


def grouped_query_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Compute attention in which H / Hkv neighbouring query heads share one key and value head.

    q [B, H, L, D], k and v [B, Hkv, S, D], mask broadcastable to [L, S] or None -> [B, H, L, D]. Query head h
    reads key and value head h // (H / Hkv): of 4 query heads on 2 key heads, 0 and 1 read the first, 2 and 3
    the second. Copying keys for every query head is not needed: with the group as an axis of its own,
    q [B, Hkv, H / Hkv, L, D] and k [B, Hkv, 1, S, D] broadcast in a matrix product.
    Raises ValueError if H is not a multiple of Hkv.

    >>> q, k, v = mx.zeros((1, 4, 1, 1)), mx.zeros((1, 2, 1, 1)), mx.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    >>> grouped_query_attention(q, k, v, 1.0).flatten().tolist()
    [10.0, 10.0, 20.0, 20.0]
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads != 0:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key and value heads evenly")
    groups = q.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    out = scaled_dot_product_attention(groups, mx.expand_dims(k, 2), mx.expand_dims(v, 2), scale, mask)
    return out.reshape(batch, heads, length, dim)


class Attention:
    def project(self, x: mx.array, positions: mx.array) -> Heads:
        """Make the queries, keys and values of tokens x [B, L, E] at positions [L].

        Call `qkv_proj` once: it gives H + 2 Hkv heads of D numbers for each token, queries first, then keys,
        then values. Bring them into the shape [B, heads, L, D]; a reshape of [B, L, heads * D] that does not
        exchange axes mixes tokens and heads. Queries and keys are normalised by `_normed`, which takes both
        in one array [B, H + Hkv, L, D], and then rotated; values are neither. H * D need not be E.

        >>> from tiny_llm.linear import Linear
        >>> same, no_turn = Linear(mx.eye(6)), mx.zeros(1)  # a projection and a rotation that change nothing
        >>> layer = Attention(0, 1, 1, 2, no_turn, same, same, None, None, 1e-5)
        >>> heads = layer.project(mx.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]), mx.array([0]))
        >>> heads.q.tolist(), heads.v.tolist()
        ([[[[1.0, 2.0]]]], [[[[5.0, 6.0]]]])
        """
        batch, length, _ = x.shape
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(x).reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)
        qk, v = mx.split(qkv, [self.num_heads + self.num_kv_heads], axis=1)
        qk = rope(self._normed(qk), positions, self.inv_freq)
        q, k = mx.split(qk, [self.num_heads], axis=1)
        return Heads(q, k, v)

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """Let tokens x [B, L, E] read each other through the context -> [B, L, E].

        `project` them at the context's positions, hand layer number, queries, keys and values to the
        context's `attend`, which gives [B, H, L, D], and lay the heads of each token side by side, [B, L, H *
        D], for `o_proj`. Only the context knows which tokens are read and where their keys are stored, so the
        layer works with any cache.

        >>> from tiny_llm.linear import Linear
        >>> to_qkv = Linear(mx.array([[1.0], [1.0], [5.0], [5.0], [1.0], [2.0]]))  # of x: q, k, v = (x, 2x)
        >>> o_proj = Linear(mx.array([[10.0, 1.0]]))
        >>> layer = Attention(0, 1, 1, 2, mx.zeros(1), to_qkv, o_proj, None, None, 1e-5)
        >>> layer(mx.array([[[3.0]]]), NoCacheContext(1, 1.0)).tolist()  # one token reads its value, (3, 6)
        [[[36.0]]]
        """
        batch, length, _ = x.shape
        heads = self.project(x, context.positions)
        out = context.attend(self.layer, heads.q, heads.k, heads.v)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, self.num_heads * self.head_dim))
