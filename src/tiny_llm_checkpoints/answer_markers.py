"""Finds the start of a marker, such as "<tool_call>", at the end of a text that is still growing."""

MAX_SPACE = 64  # characters of white space before a marker that belong to it instead of to the content


def num_begun(text: str, marker: str) -> int:
    """Return how many characters at the end of `text` are a start of `marker`: the most, but not all of it.

    >>> num_begun("Hello <tool", "<tool_call>"), num_begun("Hello", "<tool_call>"), num_begun("aab", "abab")
    (5, 0, 2)
    """
    most = min(len(text), len(marker) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(marker[:length])), 0)


def num_spaces(text: str) -> int:
    """Return how many characters of white space at the end of `text` belong to a marker after it.

    >>> num_spaces("Hello \\n"), num_spaces(100 * " ")
    (2, 64)
    """
    tail = text[-MAX_SPACE:]
    return len(tail) - len(tail.rstrip())
