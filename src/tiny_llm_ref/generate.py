"""Greedy generation in its simplest form: recompute the whole sequence for every new token.

"Greedy" means that the most likely token is always chosen. The cost grows with the square of the length,
because each new token recomputes all tokens before it. The KV cache (`kv_cache`) gives the same tokens
without that cost.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .grouped_attention import NoCacheContext
from .model import Model


def next_token(model: Model, tokens: Sequence[int]) -> int:
    """Return the most likely token after `tokens` (one or more), without a cache.

    Run the model once, on all tokens as one sequence [1, L] of int32, with the context
    `NoCacheContext(L, model.config.attention_scale)`. Only the last token's logits are needed, and one row of
    logits has the size of the vocabulary, so set the context's `logit_rows` to an mx.array with one index,
    L - 1. The model then returns [1, 1, vocab_size]. If several tokens have the highest logit, return the one
    with the lowest id. The result is a Python int, not an mx.array.

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
    """Continue `tokens` greedily, and yield each new token as soon as it is computed.

    Yields at most `max_tokens` new tokens, none for 0. A token of `eos_token_ids` ends the generation and is
    yielded as the last token; one in the prompt has no effect. The model is called once for each token that
    is yielded, when that token is requested, so a caller that stops early does not pay for more. The caller's
    `tokens` are not changed. Raises ValueError for an empty prompt when the first token is requested, even if
    `max_tokens` is 0.

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
    """Decode token ids that arrive one by one, and yield the text in final pieces; no piece is empty.

    A token is a few bytes, and a character may need several tokens. `tokenizer.stream()` returns a
    detokenizer that holds back the bytes of unfinished characters: `push(token)` returns the text that is
    final now, which may be "", and after the last token `flush()` returns the rest, which may be "" too.
    Yield each piece before you take the next token. The pieces together are the text of all tokens. Make a
    new detokenizer in each call.

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
