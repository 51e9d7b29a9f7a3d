"""The border to the `tokenizers` library: every call into it goes through here.

The library is written in Rust. It panics where others raise, and a panic is a BaseException that would end
any thread; here it becomes a `TokenizerError`. It also holds the GIL in most calls; those that may be long
are made in a form that releases it, so that other threads go on.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tokenizers

from .errors import TinyLLMError

# A text is one task, and other threads are busy with the model. Besides, the library's threads do not survive
# a fork, and it prints a warning about that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TokenizerError(TinyLLMError, ValueError):
    """The `tokenizers` library fails on a file, a text or token ids; the message has its reason."""


@contextmanager
def guarded(problem: str) -> Iterator[None]:
    """Turn what the library raises in this block into a `TokenizerError`: the problem, and its reason.

    A ValueError stays as it is.
    """
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a module that cannot be imported
        if not is_panic and not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{problem}: {reason}") from error


def load(source: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises `TokenizerError`."""
    with guarded("not a tokenizer"):
        return tokenizers.Tokenizer.from_str(source)


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text. Raises `TokenizerError`."""
    with guarded("the tokenizer fails on this text"):
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in found]


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids. Raises `TokenizerError`."""
    with guarded("the tokenizer fails on these token ids"):
        return tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
