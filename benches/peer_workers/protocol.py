"""What a measured engine and the benchmark say to each other: one line of JSON for each job and each answer.

Standard library only, because it runs in the environments of engines that do not know this project.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what an engine prints, from its libraries too, is no answer


class Job(NamedTuple):
    """Prompts in token ids, and how many tokens each gets: greedy, whatever they are. 16 run at a time."""

    prompts: list[list[int]]
    output_tokens: int


def serve(version: str, run: Callable[[Job], int]) -> None:
    """Say that the engine is ready, then run the jobs that arrive; `run` returns how many tokens came out."""
    print(json.dumps({"version": version}), file=_answers, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        start = time.perf_counter()
        num_tokens = run(job)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": num_tokens}), file=_answers, flush=True)
