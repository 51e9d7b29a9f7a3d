"""Day 1.6: what `pdm run try` shows and `pdm run compare` times."""

import time
from collections.abc import Iterator

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .shared import STORY, Lines, Work

TEXTS = ("The capital of France is", "Zürich, naïve, x² ≤ 10", "Привет, мир", "東京は日本の首都です", "🦙🦙")


def show() -> Lines:
    """Print a generated text and the time per token, then how texts are divided into tokens and pieces."""
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
    yield ""
    yield from _pieces(loaded.tokenizer)


def _pieces(tokenizer: Tokenizer) -> Lines:
    """How many tokens of the vocabulary are not text, and how texts are streamed."""
    from tiny_llm.generate import stream_text

    ids = [token for token in range(tokenizer.vocab_size) if not tokenizer.is_control(token)]
    partial = sum(not _is_text(tokenizer.token_bytes(token)) for token in ids)
    yield f"{partial:,} of {len(ids):,} tokens are not UTF-8 text: they have parts of characters"
    yield "characters  bytes  tokens  pieces  streamed as"
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        pieces = list(stream_text(tokens, tokenizer))
        yield (f"{len(text):10} {len(text.encode()):6} {len(tokens):7} {len(pieces):7}  {'|'.join(pieces)}")


def _is_text(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def work() -> Work:
    """Eight tokens of the real model, the whole sequence computed again for each."""
    from tiny_llm.generate import generate
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate(loaded.model, tokens, 8, ())))
