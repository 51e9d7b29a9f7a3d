"""Splits a rendered prompt at its control tokens."""

from collections.abc import Iterator, Sequence


def split_pieces(text: str, control_tokens: Sequence[str]) -> list[str]:
    """Split into text, control token, text, control token and so on, ending with text; text may be empty.

    If several tokens start at the same position, the longest one wins, as in the `tokenizers` library.
    """
    pieces, end = [], 0
    for start, token in _tokens_in(text, control_tokens):
        if start >= end:
            pieces += [text[end:start], token]
            end = start + len(token)
    return [*pieces, text[end:]]


def _tokens_in(text: str, control_tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield each match as (start, token), in order. Fast, because it searches only for first characters."""
    by_first: dict[str, list[str]] = {}
    for token in sorted(control_tokens, key=len, reverse=True):
        by_first.setdefault(token[0], []).append(token)
    places = {first: text.find(first) for first in by_first}
    while places := {first: place for first, place in places.items() if place >= 0}:
        first, place = min(places.items(), key=lambda item: item[1])
        for token in by_first[first]:
            if text.startswith(token, place):
                yield place, token
                break
        places[first] = text.find(first, place + 1)
