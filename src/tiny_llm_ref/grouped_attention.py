"""The attention layer: projections, rotation, and query heads in groups that share keys and values.

The layer does not know where keys and values are stored: it hands them to the context of the forward pass.
`NoCacheContext` is the simplest context; later ones store keys and values in a cache or in pages. Source:
Ainslie et al., "GQA" (2023).
"""

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
    """Compute attention in which H / Hkv neighbouring query heads share one key and value head.

    q [B, H, L, D], k and v [B, Hkv, S, D], mask broadcastable to [L, S] or None -> [B, H, L, D]. Query head h
    reads key and value head h // (H / Hkv): of 4 query heads on 2 key heads, 0 and 1 read the first, 2 and 3
    the second. Do not copy keys and values for every query head: with a separate axis for the group,
    q [B, Hkv, H / Hkv, L, D] and k [B, Hkv, 1, S, D] broadcast in a matrix product.
    Do not convert the result: without a mask, q, k and v in float16 give float16; a float32 mask makes it
    float32.
    Raises ValueError if H is not a multiple of Hkv.

    >>> q, k, v = mx.zeros((1, 4, 1, 1)), mx.zeros((1, 2, 1, 1)), mx.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    >>> grouped_query_attention(q, k, v, 1.0).flatten().tolist()
    [10.0, 10.0, 20.0, 20.0]
    """
    B, H, L, D = q.shape
    kv_heads = k.shape[1]
    if H % kv_heads:
        raise ValueError(f"{H} query heads cannot share {kv_heads} key and value heads evenly")
    grouped = q.reshape(B, kv_heads, H // kv_heads, L, D)  # [B, Hkv, group, L, D]
    out = scaled_dot_product_attention(grouped, k[:, :, None], v[:, :, None], scale, mask)
    return out.reshape(B, H, L, D)


class NoCacheContext:
    """The context of a forward pass over whole sequences: attends to this pass's keys, and stores none.

    length: tokens in each sequence, at positions 0 to length - 1. scale: the factor of the attention scores.
    logit_rows: the tokens that need logits, [R] int32; None, the initial value, means all. A token's logits
    are the model's scores for the token after it (day 1.5).
    """

    def __init__(self, length: int, scale: float) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows: mx.array | None = None
        self._scale = scale
        self._mask = causal_mask(length, length)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend causally: q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D]; `layer` is ignored."""
        return grouped_query_attention(q, k, v, self._scale, self._mask)


class Heads(NamedTuple):
    """The queries [B, H, L, D], keys and values [B, Hkv, L, D] of some tokens."""

    q: mx.array
    k: mx.array
    v: mx.array


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    layer: the layer's number. A context finds this layer's stored keys and values by it.
    num_heads, num_kv_heads, head_dim: H, Hkv and D.
    inv_freq: [D/2], the rotary frequencies of the layer.
    qkv_proj: the checkpoint's q_proj, k_proj and v_proj in one matrix. Its output for a token is the queries
        (H * D numbers), then the keys (Hkv * D), then the values (Hkv * D).
    o_proj: the matrix after attention, [..., H * D] -> [..., E].
    q_norm, k_norm: [D], the weights with which RMSNorm (day 1.4) normalizes each query and each key, with
        `eps`; None in an architecture that does not normalize them.
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
        """Compute the queries, keys and values of tokens x [B, L, E] at positions [L].

        Call `qkv_proj` once: it gives H + 2 Hkv heads of D numbers for each token, queries first, then keys,
        then values. Bring them into the shape [B, heads, L, D]: reshape [B, L, heads * D] to
        [B, L, heads, D], then exchange two axes; a reshape without the exchange mixes tokens and heads. The
        given `_normed` takes queries and keys in one array [B, H + Hkv, L, D] and normalizes both; then
        rotate both with `rope`. Values are neither normalized nor rotated. H * D may differ from E. Queries,
        keys and values keep the type of `qkv_proj`'s output.

        >>> from tiny_llm.linear import Linear
        >>> same, no_angle = Linear(mx.eye(6)), mx.zeros(1)  # a projection and a rotation that change nothing
        >>> layer = Attention(0, 1, 1, 2, no_angle, same, same, None, None, 1e-5)
        >>> heads = layer.project(mx.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]), mx.array([0]))
        >>> heads.q.tolist(), heads.v.tolist()
        ([[[[1.0, 2.0]]]], [[[[5.0, 6.0]]]])
        """
        B, L, _ = x.shape
        heads = self.qkv_proj(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)  # [B, H + 2 Hkv, L, D]
        qk, v = mx.split(heads, [self.num_heads + self.num_kv_heads], axis=1)
        qk = rope(self._normed(qk), positions, self.inv_freq)
        q, k = mx.split(qk, [self.num_heads], axis=1)
        return Heads(q, k, v)

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """Run the layer on tokens x [B, L, E] -> [B, L, E].

        1. `project` the tokens at `context.positions`.
        2. `context.attend(layer, q, k, v)`, with the number of this layer, gives [B, H, L, D].
        3. Put the heads of each token next to each other, [B, L, H * D], and apply `o_proj`.

        Only the context knows which tokens are read and where their keys are stored, so the layer works with
        any cache.

        >>> from tiny_llm.linear import Linear
        >>> to_qkv = Linear(mx.array([[1.0], [1.0], [5.0], [5.0], [1.0], [2.0]]))  # q = (x, x), v = (x, 2x)
        >>> o_proj = Linear(mx.array([[10.0, 1.0]]))
        >>> layer = Attention(0, 1, 1, 2, mx.zeros(1), to_qkv, o_proj, None, None, 1e-5)
        >>> layer(mx.array([[[3.0]]]), NoCacheContext(1, 1.0)).tolist()  # one token reads its value, (3, 6)
        [[[36.0]]]
        """
        B, L, _ = x.shape
        q, k, v = self.project(x, context.positions)
        out = context.attend(self.layer, q, k, v)  # [B, H, L, D]
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))

    def _normed(self, qk: mx.array) -> mx.array:
        """Normalize each head of qk [B, H + Hkv, L, D], if the architecture does that; keep the shape."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        queries, keys = mx.split(qk, [self.num_heads], axis=1)
        return mx.concatenate(
            [rms_norm(queries, self.q_norm, self.eps), rms_norm(keys, self.k_norm, self.eps)], axis=1
        )
