"""Names, bytes and offsets of single tokens, for log-probabilities.

A token may be part of a character. Then the engine's text for the token contains U+FFFD, and its bytes must
come from the tokenizer. The parameter `text` is the engine's text for the token.
"""

from collections.abc import Iterable

from tiny_llm_checkpoints.tokenizer import Tokenizer

PART = "\ufffd"


def bytes_of(token: int, text: str, tokenizer: Tokenizer) -> bytes:
    """Return the token's bytes. The bytes of all tokens of a text, joined, are the text in UTF-8."""
    return tokenizer.token_bytes(token) if PART in text else text.encode()


def name_of(token: int, text: str, tokenizer: Tokenizer) -> str:
    """Return the token's text, or `bytes:\\xf0\\x9f` as OpenAI does for a part of a character."""
    if (raw := bytes_of(token, text, tokenizer)) == text.encode():
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def offsets_in(text: str, tokens: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Return the offset of each token in the prompt's text, in characters.

    A control token that the text does not spell out takes no characters.
    """
    stream, offsets, at = tokenizer.stream(), [], 0
    for token in tokens:
        offsets.append(min(at, len(text)))
        at += len(stream.push(token))
        if tokenizer.is_control(token):
            name = tokenizer.token_text(token)
            at += len(name) if text.startswith(name, at) else 0
    return offsets
