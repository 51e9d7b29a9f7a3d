"""A rendered prompt, cut where control tokens stand in it."""

from collections.abc import Iterator, Sequence


def split_pieces(text: str, control_tokens: Sequence[str]) -> list[str]:
    """Text, control token, text, control token and so on, ending with a text; any text may be empty.

    Where several tokens begin at one place the longest counts, as in the `tokenizers` library.
    """
    pieces, end = [], 0
    for start, token in _tokens_in(text, control_tokens):
        if start >= end:
            pieces += [text[end:start], token]
            end = start + len(token)
    return [*pieces, text[end:]]


def _tokens_in(text: str, control_tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Where a control token begins, in order; by searching for first characters only."""
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
