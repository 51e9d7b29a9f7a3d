"""Text from a model, in the simplest way: compute the whole sequence again for every token, take the
likeliest.

The cost grows with the square of the length, because each token pays for all tokens before it. The cache of
keys and values (`kv_cache`) gives the same tokens without that.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .grouped_attention import NoCacheContext
from .model import Model


def next_token(model: Model, tokens: Sequence[int]) -> int:
    """Return the likeliest token after `tokens` (one or more), computed from nothing.

    Run the model once, on all tokens as one sequence [1, L] in int32, in a `NoCacheContext` of their number
    and of `model.config.attention_scale`. Only the last token's logits are needed: set the context's
    `logit_rows` (an mx.array of indices, here of one), because a row of logits is a whole vocabulary. The
    model then answers [1, 1, vocab_size]. Of tokens with the same logit, return the one with the lowest id.
    The result is a Python int, not an mx.array.

    >>> from tiny_llm.loader import load_model
    >>> loaded = load_model(None)  # the embedded model
    >>> token = next_token(loaded.model, loaded.tokenizer.encode("The capital of France is"))
    >>> loaded.tokenizer.decode([token])
    ' Paris'
    """
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    context.logit_rows = mx.array([len(tokens) - 1])
    logits = model(mx.array([list(tokens)], mx.int32), context)  # [1, 1, V]
    return int(mx.argmax(logits[0, 0]))


def generate(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """Continue `tokens` with the likeliest token each time, and yield each as soon as it is known.

    Yields at most `max_tokens` new tokens, none for 0. An end token, one of `eos_token_ids`, is yielded too,
    and is the last; one in the prompt ends nothing. The model is called once for each token that is yielded,
    and not before that token is asked for, so a caller that stops early pays for nothing more. The caller's
    `tokens` stay as they are. Raises ValueError for an empty prompt, at a `max_tokens` of 0 too, when the
    first token is asked for.

    >>> from tiny_llm.loader import load_model
    >>> loaded = load_model(None)  # the embedded model
    >>> prompt = loaded.tokenizer.encode("One, two, three,")
    >>> loaded.tokenizer.decode(list(generate(loaded.model, prompt, 4, ())))
    ' four, five,'
    """
    if not tokens:
        raise ValueError("an empty prompt: there is nothing to continue")
    known = list(tokens)
    for _ in range(max_tokens):
        known.append(next_token(model, known))
        yield known[-1]
        if known[-1] in eos_token_ids:
            return


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of token ids that arrive one by one, in pieces that are final; no piece is empty.

    A token is a few bytes, and a character may need several tokens. The detokenizer of `tokenizer.stream()`
    holds the bytes of unfinished characters back: its `push(token)` returns the text that is final now, which
    may be "", and after the last token its `flush()` returns what it still holds, which may be "" too. Yield
    a piece as soon as the token that completes it has arrived, before you take the next token. Joined, the
    pieces are the text of all tokens. Each call has a detokenizer of its own.

    >>> from tiny_llm.loader import load_model
    >>> tokenizer = load_model(None).tokenizer
    >>> tokens = tokenizer.encode("in 東京")
    >>> len(tokens), list(stream_text(tokens, tokenizer))
    (6, ['in', ' ', '東', '京'])
    """
    detokenizer = tokenizer.stream()
    for token in tokens:
        if piece := detokenizer.push(token):
            yield piece
    if rest := detokenizer.flush():
        yield rest
