"""Protocol between the benchmark and an engine's worker: one line of JSON for each job and each answer.

Uses only the standard library, because it runs in the environments of other engines.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # stdout now goes to stderr, so that an engine's or library's prints are not read as answers


class Job(NamedTuple):
    """Prompts as token ids, and the output tokens of each: greedy, EOS ignored, 16 requests at a time."""

    prompts: list[list[int]]
    output_tokens: int


def serve(version: str, run: Callable[[Job], int]) -> None:
    """Report that the engine is ready, then run the jobs from stdin; `run` returns the output tokens."""
    print(json.dumps({"version": version}), file=_answers, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        start = time.perf_counter()
        num_tokens = run(job)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": num_tokens}), file=_answers, flush=True)
