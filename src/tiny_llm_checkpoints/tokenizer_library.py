"""The boundary to the `tokenizers` library: every call to it goes through this module.

The library is written in Rust and may panic. A panic is a BaseException, which would end a thread; here it
becomes a `TokenizerError`. Most of the library's calls hold the GIL; calls that may take long use a form that
releases it, so that other threads keep running.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tokenizers

from .errors import TinyLLMError

# One text is one task, and the model's threads need the cores. The library's threads also do not survive a
# fork, and it prints a warning about that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TokenizerError(TinyLLMError, ValueError):
    """The `tokenizers` library failed on a file, a text or token ids; the message quotes its reason."""


@contextmanager
def guarded(problem: str) -> Iterator[None]:
    """Turn the library's errors in this block into a `TokenizerError` of the form "problem: reason".

    A ValueError stays as it is.
    """
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # its class cannot be imported
        if not is_panic and not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{problem}: {reason}") from error


def load(source: str) -> tokenizers.Tokenizer:
    """Build the tokenizer from the text of a tokenizer.json. Raises `TokenizerError` if it is not valid."""
    with guarded("not a tokenizer"):
        return tokenizers.Tokenizer.from_str(source)


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text. Raises `TokenizerError`."""
    with guarded("the tokenizer failed on this text"):
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in found]


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of `ids`. Raises `TokenizerError`."""
    with guarded("the tokenizer failed on these token ids"):
        return tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
