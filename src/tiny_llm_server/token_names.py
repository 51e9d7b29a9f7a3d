"""What one token is called in log-probabilities, also where it is a part of a character, and where it is.

text: the token's, as the engine gives it, in which such a part is U+FFFD: only then is the tokenizer asked.
"""

from collections.abc import Iterable

from tiny_llm_checkpoints.tokenizer import Tokenizer

PART = "\ufffd"


def bytes_of(token: int, text: str, tokenizer: Tokenizer) -> bytes:
    """Its bytes: those of all tokens of a text, put together, are the text's."""
    return tokenizer.token_bytes(token) if PART in text else text.encode()


def name_of(token: int, text: str, tokenizer: Tokenizer) -> str:
    """Its text, or its bytes as OpenAI writes them, so that two parts have two names."""
    if (raw := bytes_of(token, text, tokenizer)) == text.encode():
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def offsets_in(text: str, tokens: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Where each token of a prompt begins in its text, in characters; control tokens may be no part of it."""
    stream, offsets, at = tokenizer.stream(), [], 0
    for token in tokens:
        offsets.append(min(at, len(text)))
        at += len(stream.push(token))
        if tokenizer.is_control(token):
            name = tokenizer.token_text(token)
            at += len(name) if text.startswith(name, at) else 0
    return offsets
