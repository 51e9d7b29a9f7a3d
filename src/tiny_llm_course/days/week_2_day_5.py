"""Day 2.5: what `pdm run try` shows and `pdm run compare` times."""

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..cpp import libraries
from ..repo import Repo
from .shared import Lines, Work, random_array

H, KV_HEADS, D, TILE = 9, 3, 64, 64  # of the embedded model, and the keys of a tile
CAPITALS = (  # 75 tokens
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. "
    "The capital of Greece is Athens. The capital of Portugal is Lisbon. The capital of Austria is Vienna. "
    "The capital of Hungary is Budapest. The capital of Poland is Warsaw. The capital of Norway is Oslo. "
    "The capital of Egypt is Cairo. The capital of Germany is"
)
ANSWER = 16  # tokens that the model writes

Attend = Callable[[mx.array, mx.array, mx.array, float], mx.array]
"""Causal attention: q [B, H, L, D], k and v [B, Hkv, S, D], and the scale -> [B, H, L, D]."""


class Cost(NamedTuple):
    """The result of a computation, the most memory that MLX held for it, in bytes, and its seconds."""

    out: mx.array
    peak: int
    seconds: float


class GrowingContext:
    """The context of forward passes over one sequence: it joins all keys and values, as on day 2.1."""

    def __init__(self, scale: float, attend: Attend) -> None:
        self._scale, self._attend = scale, attend
        self._past: dict[int, tuple[mx.array, mx.array]] = {}
        self._length = 0

    def begin(self, count: int) -> None:
        """Prepare a pass over the next `count` tokens, of which only the last needs logits."""
        self.positions = mx.arange(self._length, self._length + count, dtype=mx.int32)
        self.logit_rows: mx.array | None = mx.array([count - 1], mx.int32)
        self._length += count

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store a layer's new keys and values, then attend to all of them."""
        if layer in self._past:
            keys, values = self._past[layer]
            k, v = mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
        self._past[layer] = k, v
        return self._attend(q, k, v, self._scale)


def show() -> Lines:
    """Print memory and time of attention all at once and in tiles, then a text continued with each."""
    yield "random queries, keys and values, with as many heads as the real model has:"
    for length in (256, 768):
        yield from _costs(length)
    yield f"what the real model writes after 75 tokens, {CAPITALS[-25:]!r}:"
    for how, attend in (("all at once", _at_once), (f"in tiles of {TILE}", _in_tiles)):
        yield f"  {how:15}: {_continued(attend)}"


def _at_once(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    from tiny_llm.attention import causal_mask
    from tiny_llm.grouped_attention import grouped_query_attention

    out: mx.array = grouped_query_attention(q, k, v, scale, causal_mask(q.shape[2], k.shape[2]))
    return out


def _in_tiles(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    from tiny_llm.flash_attention import flash_attention

    out: mx.array = flash_attention(q, k, v, scale, causal=True, tile=TILE)
    return out


def _costs(length: int) -> Lines:
    """What attention over random arrays costs: all at once, in tiles, and in the compiled kernel."""
    from tiny_llm.kernels import compiled_kernel, twins, use_compiled

    repo = Repo.here()
    is_own = bool(libraries(repo)) and (repo.overlay / "flash_attention.cpp").exists()
    name = "your kernel" if is_own else "compiled kernel"
    q, k = random_array(1, H, length, D), random_array(1, KV_HEADS, length, D)
    v = random_array(1, KV_HEADS, length + 1, D)[:, :, 1:]  # another shape: other numbers than the keys'
    mx.eval(q, k, v)
    with twins():  # the readable function, also of the reference
        whole = _cost(lambda: _at_once(q, k, v, D**-0.5))
        tiled = _cost(lambda: _in_tiles(q, k, v, D**-0.5))
    yield _cost_line(length, "all at once", length, whole)
    yield _cost_line(length, f"in tiles of {TILE}", TILE, tiled)
    if use_compiled():
        kernel = _cost(lambda: compiled_kernel("flash_attention")(q, k, v, D**-0.5, True))
        yield _cost_line(length, name, None, kernel)
    differences = f"in tiles {_difference(tiled, whole):.1e}"
    if use_compiled():
        differences += f", {name} {_difference(kernel, whole):.1e}"
    yield f"     largest difference from all at once: {differences}"


def _difference(one: Cost, other: Cost) -> float:
    """The largest difference of two results."""
    return float(mx.max(mx.abs(one.out - other.out)))


def _cost(run: Callable[[], mx.array]) -> Cost:
    """Run something once, and measure the most memory above what was held before, and the time."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    out = run()
    mx.eval(out)
    return Cost(out, mx.get_peak_memory() - before, time.perf_counter() - start)


def _cost_line(length: int, how: str, keys: int | None, cost: Cost) -> str:
    """One line about a cost; keys: of the largest array of scores, None if there is no such array."""
    scores = "" if keys is None else f"scores {H * length * keys * 4 / 2**20:4.1f} MiB"
    measured = f"peak {cost.peak / 2**20:4.1f} MiB  {1000 * cost.seconds:6.1f} ms"
    return f"{length:4} tokens {how:15}: {scores:15}  {measured}"


def _continued(attend: Attend) -> str:
    """What the real model writes after `CAPITALS` with this attention: the likeliest tokens."""
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    context = GrowingContext(loaded.model.config.attention_scale, attend)
    new = loaded.tokenizer.encode(CAPITALS)
    answer: list[int] = []
    while len(answer) < ANSWER:
        context.begin(len(new))
        new = [int(mx.argmax(loaded.model(mx.array([new], mx.int32), context)[0, -1]))]
        answer += new
    return "".join(map(loaded.tokenizer.token_text, answer)).strip()


def work() -> Work:
    """Attention of 64 queries of 9 heads over 512 keys, in tiles of 64."""
    from tiny_llm.flash_attention import flash_attention

    q, k, v = random_array(1, 9, 64, 64), random_array(1, 3, 512, 64), random_array(1, 3, 513, 64)[:, :, 1:]
    return lambda: flash_attention(q, k, v, 0.125, True, 64)


def kernel_work() -> Work:
    """The compiled kernel: attention of 64 queries of 9 heads over 512 keys."""
    from tiny_llm.kernels import compiled_kernel

    q, k, v = random_array(1, 9, 64, 64), random_array(1, 3, 512, 64), random_array(1, 3, 513, 64)[:, :, 1:]
    mx.eval(q, k, v)
    return lambda: compiled_kernel("flash_attention")(q, k, v, 0.125, True)
