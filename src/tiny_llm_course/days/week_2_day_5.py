"""Day 2.5: what `pdm run try` shows and `pdm run compare` times."""

import time

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """Print the memory for scores, all at once and in tiles, and how little the two outputs differ."""
    from tiny_llm.attention import causal_mask
    from tiny_llm.flash_attention import flash_attention
    from tiny_llm.grouped_attention import grouped_query_attention

    H, Hkv, D = 9, 3, 64
    yield "without the model: random queries, keys and values, with as many heads as the real model has"
    for length in (256, 768):
        q, k, v = (
            mx.random.normal((1, heads, length, D), key=mx.random.key(seed))
            for seed, heads in enumerate((H, Hkv, Hkv))
        )
        found = []
        for tile in (length, 64):
            start = time.perf_counter()
            if tile == length:
                found.append(grouped_query_attention(q, k, v, D**-0.5, causal_mask(length, length)))
            else:
                found.append(flash_attention(q, k, v, D**-0.5, causal=True, tile=tile))
            mx.eval(found[-1])
            seconds = time.perf_counter() - start
            how = "all at once" if tile == length else f"in tiles of {tile}"
            scores = H * length * tile * 4 / 2**20
            yield f"{length:4} tokens {how:14}: scores take {scores:5.1f} MiB; {1000 * seconds:6.1f} ms"
        yield f"     largest difference {float(mx.max(mx.abs(found[0] - found[1]))):.1e}"


def work() -> Work:
    """Attention of 64 queries of 9 heads over 512 keys, in tiles of 64."""
    from tiny_llm.flash_attention import flash_attention

    q, k, v = random_array(1, 9, 64, 64), random_array(1, 3, 512, 64), random_array(1, 3, 513, 64)[:, :, 1:]
    return lambda: flash_attention(q, k, v, 0.125, True, 64)
