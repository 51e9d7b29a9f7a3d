"""Stop strings that spell out control tokens, such as "<|im_end|>", found where these tokens are produced.

The text that a caller sees leaves control tokens out, so the string cannot be found in it. Here the text
between two control tokens and the tokens themselves are searched in the order in which they were produced.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .stop_string import Item, StopString


class ControlStop:
    """One such string. pattern: its characters, and the ids of its control tokens in their places."""

    def __init__(self, text: str, pattern: Sequence[Item]) -> None:
        self.text = text
        self._string = StopString(pattern)
        self._lead = next(place for place, item in enumerate(pattern) if isinstance(item, int))
        # Of each beginning of the pattern, by its length.
        self._num_controls = [0, *accumulate(int(isinstance(item, int)) for item in pattern)]
        self._shown: deque[int] = deque(maxlen=self._num_controls[-1])  # at the last control tokens

    def push(self, piece: str) -> bool:
        """Take text; True where the string ends in it."""
        return self._string.push(piece) is not None

    def push_control(self, token_id: int, shown: int) -> bool:
        """Take a control token that comes after `shown` characters of the text; True where it ends here."""
        self._shown.append(shown)
        return self._string.push([token_id]) is not None

    @property
    def begin(self) -> int:
        """Where the string that has just been found begins in the text."""
        return max(0, self._shown[0] - self._lead)

    def limit(self, shown: int) -> int:
        """How many of the `shown` characters of the text can be no part of the string any more."""
        num_controls = self._num_controls[self._string.matched]
        begin = self._shown[-num_controls] - self._lead if num_controls else shown - self._string.matched
        return max(0, begin)


class ControlStops:
    """All such strings of one completion. detokenizer: behind the prompt; patterns: by their texts."""

    def __init__(
        self, patterns: dict[str, Sequence[Item]], tokenizer: Tokenizer, detokenizer: Detokenizer
    ) -> None:
        self._stops = [ControlStop(text, pattern) for text, pattern in patterns.items()]
        self._tokenizer = tokenizer
        self._between = detokenizer  # of the text since the last control token

    def push(self, token_id: int, text: str, detokenizer: Detokenizer) -> list[tuple[int, str]]:
        """Take the next token: where the strings that end with it begin in the text, and their texts.

        text: what the caller sees before this token; detokenizer: what it comes from, and holds some of it.
        """
        if not self._stops:
            return []
        if not self._tokenizer.is_control(token_id):
            piece = self._between.push(token_id)
            found = [stop for stop in self._stops if stop.push(piece)]
            return [(stop.begin, stop.text) for stop in found]
        rest, self._between = self._between.flush(), self._tokenizer.stream_within()
        shown = len(text) + len(detokenizer.fork().flush())
        found = [stop for stop in self._stops if stop.push(rest)]
        found += [stop for stop in self._stops if stop.push_control(token_id, shown) and stop not in found]
        return [(stop.begin, stop.text) for stop in found]

    def limit(self, shown: int) -> int:
        """How many of the `shown` characters of the text can be no part of any of the strings."""
        return min((stop.limit(shown) for stop in self._stops), default=shown)


def control_patterns(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Sequence[Item]]:
    """Those of the texts that spell out control tokens, with the ids of these in their places."""
    patterns = {text: tokenizer.spelled(text) for text in texts}
    return {
        text: pattern for text, pattern in patterns.items() if any(isinstance(item, int) for item in pattern)
    }
