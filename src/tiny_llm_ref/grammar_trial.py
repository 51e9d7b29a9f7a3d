"""A program that tries grammars: it compiles each and takes a few steps, within limits of its own process.

The library llguidance can take minutes, gigabytes or the whole stack for a small schema. Here that ends only
this process, which `GrammarTrials` starts anew. It reads one JSON object a line, with the library's `source`
of a grammar and the `limits` of its parser, and writes one line: the reason for which the library refuses it,
or "". It is run as a file, and so imports nothing of the package.
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
STACK = 4 << 20  # bytes; half of what threads usually have, in which the grammar is compiled again
STEPS = 32
END = 256  # the token after the bytes


class _Bytes:
    """A vocabulary with a token for each byte."""

    bos_token_id = None
    eos_token_id = END
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text."""
        return list(text.encode() if isinstance(text, str) else text)


def reason_to_refuse(vocabulary: LLTokenizer, source: str, limits: dict[str, Any]) -> str:
    """The library's reason for refusing a grammar, at once or after a few bytes; "" if there is none."""
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(**limits))
    for step in range(STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = [byte for byte in range(END) if mask[byte // 8] >> byte % 8 & 1]
        if not allowed or not matcher.consume_token(allowed[97 * step % len(allowed)]):
            break
    return matcher.get_error()


def serve() -> None:
    """Answer each line of standard input."""
    vocabulary = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=[END])
    _limit_memory()
    for line in sys.stdin:
        given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
        reason = reason_to_refuse(vocabulary, given["source"], given["limits"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reason) + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    """Allow the process `MEMORY` bytes more than it has now, where the system can tell how many these are."""
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
