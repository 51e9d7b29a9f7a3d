"""Scaled dot-product attention in plain MLX operators: slow and simple. Faster kernels are tested against it.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
"""

import mlx.core as mx


def softmax(x: mx.array) -> mx.array:
    """Turn each row of scores into weights that sum to 1: e^x divided by the row's sum of e^x.

    x [..., S] -> [..., S], along the last axis; rows do not influence each other. e^1000 is inf in float32,
    but scores of 1000 must not overflow; another row of the same array may have scores near 0. A score of
    -inf gets a weight of exactly 0, so a row with one finite score and -inf elsewhere gives exactly 1 there
    and exactly 0 elsewhere. A row of only -inf need not be handled.

    The weights have x's type, but compute the sum in float32: the largest float16 is 65504, so in float16 a
    row of 100,000 equal scores has a sum of inf, and weights of 0 instead of 0.00001. MLX sums in the type of
    its input, and float16 divided by float32 is float32: convert with `astype`.

    >>> softmax(mx.array([[1000.0, 1000.0], [5.0, -mx.inf]])).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    shifted = x - mx.max(x, axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    return (weights / mx.sum(weights.astype(mx.float32), axis=-1, keepdims=True)).astype(x.dtype)


def causal_mask(length: int, total: int) -> mx.array:
    """Return the mask that stops the last `length` of `total` tokens from attending to later tokens.

    The mask is [length, total] in float32. Row i belongs to the token at position `total - length + i`;
    columns are positions. A row is 0 at positions up to its token's own, and -inf (`-mx.inf`) at later ones.
    The mask is added to the scores: a score of -inf gets a weight of 0 from softmax, whereas a score
    *multiplied* by 0 would still weigh e^0 = 1. A length of 0 gives an empty mask, [0, total]. Raises
    ValueError for a length below 0 or above total.

    >>> causal_mask(2, 4).tolist()
    [[0.0, 0.0, 0.0, -inf], [0.0, 0.0, 0.0, 0.0]]
    """
    if not 0 <= length <= total:
        raise ValueError(f"length must be between 0 and total ({total}), not {length}")
    positions = mx.arange(total - length, total)[:, None]
    return mx.where(mx.arange(total)[None, :] <= positions, 0.0, -mx.inf)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Compute softmax(q k^T * scale + mask) v: for each query, a weighted mean of the values.

    q [..., L, D], k and v [..., S, D] -> [..., L, D]. Each token has a query (what it looks for), a key (what
    it can be found by) and a value (what it passes on). A query scores every key by their dot product,
    softmax turns one query's scores into weights, and the weights mix the values.

    Use the given scale. It is usually 1 / sqrt(D), which keeps the size of the scores independent of D. The
    mask broadcasts to [..., L, S] and is added after scaling; None hides nothing. Leading axes broadcast, as
    in any matrix product. In MLX `.T` reverses all axes; `x.swapaxes(-1, -2)` exchanges the last two.

    Do not convert the result: it has the type that MLX's operators give. Without a mask, q, k and v in
    float16 give float16. A float32 mask makes the scores float32, and with them the weights and the result.

    >>> q, k = mx.array([[1.0, 1.0]]), mx.zeros((2, 2))  # both keys score 0, so both weigh 1/2
    >>> scaled_dot_product_attention(q, k, mx.array([[2.0, 0.0], [4.0, 6.0]]), 0.5).tolist()
    [[3.0, 3.0]]
    """
    scores = (q @ k.swapaxes(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    return softmax(scores) @ v
