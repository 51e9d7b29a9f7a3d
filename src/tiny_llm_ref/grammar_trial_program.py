"""A program that tries grammars: it compiles each one and generates up to 32 tokens, within limits.

The library llguidance can take minutes, gigabytes or the whole stack for a small schema. Here that ends only
this process, and `GrammarTrials` starts it again. Each line of input is a JSON object. The first has the
arguments of `_Vocabulary`. Every other one has the arguments of `_Trial.reason_to_refuse`, and its result is
one line of output, as JSON. The program is run as a file, so it imports nothing of the package.
"""

import json
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

SECONDS = 0.5  # of processor time for a grammar
MEMORY = 48 << 20  # bytes for a grammar
STACK = 4 << 20  # bytes; half of what the thread usually has that compiles the grammar afterwards
STEPS = 32  # tokens that are generated


class _Vocabulary:
    """A model's control tokens under their ids, and a token for each byte.

    num_tokens: the size of the model's vocabulary. control: its control tokens: id to name. ends: its
    end-of-sequence tokens. If it has too few tokens, or no end-of-sequence token, more are added after them.
    """

    bos_token_id = None

    def __init__(self, num_tokens: int, control: dict[int, str], ends: list[int]) -> None:
        others = (token for token in range(num_tokens + 256) if token not in control)
        self.bytes = [next(others) for _ in range(256)]
        self.tokens = [b""] * max(num_tokens, self.bytes[-1] + 1)
        for byte, token in enumerate(self.bytes):
            self.tokens[token] = bytes([byte])
        for token, name in control.items():
            self.tokens[token] = name.encode()
        self.ends = ends or [len(self.tokens)]
        if not ends:
            self.tokens.append(b"<end>")
        self.eos_token_id = self.ends[0]
        self.special_token_ids = sorted({*control, *self.ends})
        self.visible = [*self.bytes, *(token for token in control if token not in self.ends)]

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text."""
        return [self.bytes[byte] for byte in (text.encode() if isinstance(text, str) else text)]


class _Trial:
    """Tries grammars with one vocabulary."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._visible = vocabulary.visible
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.ends)

    def reason_to_refuse(self, source: str, limits: dict[str, Any]) -> str:
        """The library's reason to refuse a grammar, at once or after some tokens; "" if there is none.

        source: the grammar as the library takes it. limits: the arguments of `LLParserLimits`. The tokens are
        chosen among the allowed ones by a fixed rule.
        """
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(**limits))
        for step in range(STEPS):
            mask = matcher.compute_bitmask()
            if matcher.is_error() or matcher.is_stopped():
                break
            allowed = [token for token in self._visible if mask[token // 8] >> token % 8 & 1]
            if not allowed or not matcher.consume_token(allowed[97 * step % len(allowed)]):
                break
        return matcher.get_error()


def serve() -> None:
    """Read the vocabulary from the first line of standard input, and answer each other line."""
    given = json.loads(sys.stdin.readline())
    control = {int(token): name for token, name in given["control"].items()}
    trial = _Trial(_Vocabulary(given["num_tokens"], control, given["ends"]))
    _limit_memory()
    for line in sys.stdin:
        given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
        reason = trial.reason_to_refuse(given["source"], given["limits"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reason) + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    """Allow the process `MEMORY` bytes more than it has now, if /proc tells how many it has."""
    if (sizes := Path("/proc/self/statm")).exists():
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        allowed = used + MEMORY if most == resource.RLIM_INFINITY else min(used + MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, most))


if __name__ == "__main__":
    threading.stack_size(STACK)
    server = threading.Thread(target=serve, daemon=True)
    server.start()
    server.join()
