"""Stop strings that contain control tokens, such as "<|im_end|>", matched when the tokens are generated.

The caller's text leaves control tokens out, so such a string cannot be found in it. This module searches the
control tokens themselves and the text between them, in the order in which they are generated.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .stop_string import Item, StopString


class ControlStop:
    """One stop string that contains control tokens.

    pattern: its characters, and the ids of its control tokens in their places.
    """

    def __init__(self, text: str, pattern: Sequence[Item]) -> None:
        self.text = text
        self._string = StopString(pattern)
        self._lead = next(place for place, item in enumerate(pattern) if isinstance(item, int))
        # The number of control tokens in each prefix of the pattern, by the prefix's length.
        self._num_controls = [0, *accumulate(int(isinstance(item, int)) for item in pattern)]
        # The length of the caller's text at each of the last control tokens.
        self._shown: deque[int] = deque(maxlen=self._num_controls[-1])

    def push(self, piece: str) -> bool:
        """Add text; True if it completes the string."""
        return self._string.push(piece) is not None

    def push_control(self, token_id: int, shown: int) -> bool:
        """Add a control token after `shown` characters of the text; True if it completes the string."""
        self._shown.append(shown)
        return self._string.push([token_id]) is not None

    @property
    def begin(self) -> int:
        """The position in the caller's text at which the string that was just found starts."""
        return max(0, self._shown[0] - self._lead)

    def limit(self, shown: int) -> int:
        """How many of the `shown` characters may be streamed; the rest may belong to the stop string."""
        num_controls = self._num_controls[self._string.matched]
        begin = self._shown[-num_controls] - self._lead if num_controls else shown - self._string.matched
        return max(0, begin)


class ControlStops:
    """All stop strings of one completion that contain control tokens.

    patterns: the pattern of each stop string, by its text. detokenizer: one that has read the prompt.
    """

    def __init__(
        self, patterns: dict[str, Sequence[Item]], tokenizer: Tokenizer, detokenizer: Detokenizer
    ) -> None:
        self._stops = [ControlStop(text, pattern) for text, pattern in patterns.items()]
        self._tokenizer = tokenizer
        self._between = detokenizer  # decodes the text since the last control token

    def push(self, token_id: int, text: str, detokenizer: Detokenizer) -> list[tuple[int, str]]:
        """Add the next token. Returns each stop string that it completes, with its start in the text.

        Each result is (start, stop string).

        text: the caller's text before this token; detokenizer: the one that makes it, which may hold back
        some characters.
        """
        if not self._stops:
            return []
        if not self._tokenizer.is_control(token_id):
            piece = self._between.push(token_id)
            found = [stop for stop in self._stops if stop.push(piece)]
            return [(stop.begin, stop.text) for stop in found]
        rest, self._between = self._between.flush(), self._tokenizer.stream_mid_text()
        shown = len(text) + len(detokenizer.fork().flush())
        found = [stop for stop in self._stops if stop.push(rest)]
        found += [stop for stop in self._stops if stop.push_control(token_id, shown) and stop not in found]
        return [(stop.begin, stop.text) for stop in found]

    def limit(self, shown: int) -> int:
        """How many of the `shown` characters may be streamed; the rest may belong to a stop string."""
        return min((stop.limit(shown) for stop in self._stops), default=shown)


def control_patterns(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Sequence[Item]]:
    """Map each text that has control tokens to its pattern, in which the tokens' ids replace them."""
    patterns = {text: tokenizer.split_control_tokens(text) for text in texts}
    return {
        text: pattern for text, pattern in patterns.items() if any(isinstance(item, int) for item in pattern)
    }
