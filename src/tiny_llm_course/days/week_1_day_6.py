"""Day 1.6: what `pdm run try` shows and `pdm run compare` times."""

import time
from collections.abc import Iterator

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Print a generated text and the time per token."""
    from tiny_llm.generate import generate, stream_text
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY)
    times: list[float] = []

    def timed() -> Iterator[int]:
        start = time.perf_counter()
        for token in generate(loaded.model, tokens, 48, loaded.model.config.eos_token_ids):
            times.append(time.perf_counter() - start)
            yield token
            start = time.perf_counter()

    yield STORY + "".join(stream_text(timed(), loaded.tokenizer))
    first, last = (sum(part) / len(part) * 1000 for part in (times[:8], times[-8:]))
    yield (
        f"{len(times)} tokens; the first eight took {first:.1f} ms each, the last eight {last:.1f} ms: for "
        "each token, all earlier tokens are computed again (until day 2.1)"
    )


def work() -> Work:
    """Eight tokens of the real model, the whole sequence computed again for each."""
    from tiny_llm.generate import generate
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate(loaded.model, tokens, 8, ())))
