"""Scaled dot-product attention in plain MLX operators: slow and simple, the oracle of every faster kernel.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
"""

import mlx.core as mx


def softmax(x: mx.array) -> mx.array:
    """Turn each row of scores into weights that sum to 1: e^x divided by the row's sum of e^x.

    x [..., S] -> [..., S], along the last axis; rows do not influence each other. Scores of 1000 must not
    overflow, although e^1000 is inf in float32, and rows may lie far apart: one at 0, one at 1000. A score of
    -inf gets a weight of exactly 0, so a row with one finite score and -inf elsewhere gives exactly 1 there
    and exactly 0 elsewhere. No caller passes a row of -inf only.

    The weights have x's type, but sum in float32: float16 ends at 65504, so in float16 a row of 100,000 equal
    scores has a sum of inf, and weights of 0 instead of 0.00001. MLX sums in the type of what it sums, and
    float16 divided by float32 is float32: convert with `astype`.

    >>> softmax(mx.array([[1000.0, 1000.0], [5.0, -mx.inf]])).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    scores = x.astype(mx.float32)
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(x.dtype)


def causal_mask(length: int, total: int) -> mx.array:
    """Return the mask [length, total] in float32 that hides later tokens from the last `length` of `total`.

    Row i belongs to the token at position `total - length + i`; columns are positions. It is 0 where the
    token may look, at positions up to its own, and -inf (`-mx.inf`) at later positions. The mask is added to
    the scores: -inf gives a weight of 0 after softmax, whereas a score *multiplied* by 0 would still weigh
    e^0 = 1. A length of 0 gives an empty mask, [0, total]. Raises ValueError for a length below 0 or above
    total.

    >>> causal_mask(2, 4).tolist()
    [[0.0, 0.0, 0.0, -inf], [0.0, 0.0, 0.0, 0.0]]
    """
    if not 0 <= length <= total:
        raise ValueError(f"length must be in 0 .. {total}, not {length}")
    positions = mx.arange(total)
    own = mx.arange(total - length, total)[:, None]
    return mx.where(positions <= own, 0.0, -mx.inf)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Compute softmax(q k^T * scale + mask) v: for each query a weighted mean of the values.

    q [..., L, D], k and v [..., S, D] -> [..., L, D]. A query scores every key by their dot product, the
    scores of one query become weights, and the weights mix the values. Use the scale that is given, often 1 /
    sqrt(D): it keeps scores at the same size whatever D is. The mask broadcasts to [..., L, S] and is added
    after scaling; None hides nothing. Leading axes broadcast, as in any matrix product. In MLX `.T` reverses
    all axes, while `x.swapaxes(-1, -2)` exchanges the last two.

    The result has the type that MLX's operators give, and is not converted: float16 for q, k and v in float16
    without a mask. float16 scores plus a float32 mask are float32, and so are then the weights and the
    result.

    >>> q, k = mx.array([[1.0, 1.0]]), mx.zeros((2, 2))  # both keys score 0, so both weigh 1/2
    >>> scaled_dot_product_attention(q, k, mx.array([[2.0, 0.0], [4.0, 6.0]]), 0.5).tolist()
    [[3.0, 3.0]]
    """
    scores = q @ k.swapaxes(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return softmax(scores) @ v
