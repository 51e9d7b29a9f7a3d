"""Requests for a batch manager of `toy_models`, and a loop that serves them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tiny_llm.engine_core import EngineCore
from tiny_llm.sampling_params import SamplingParams

Requests = Mapping[str, tuple[list[int], SamplingParams]]


def limits(max_tokens: int | None = 4, n: int = 1) -> SamplingParams:
    """Parameters of a greedy request: the limit of its tokens and the number of its completions."""
    return SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0)


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids of a vocabulary of 50."""
    return np.random.default_rng(seed).integers(0, 50, size=length).tolist()


def ids(sequences: Sequence[Any]) -> list[str]:
    """The ids of sequences, in order."""
    return [sequence.seq_id for sequence in sequences]


REQUESTS: Requests = {
    f"r{i}": (prompt(length, seed=40 + i), limits(max_tokens))
    for i, (length, max_tokens) in enumerate([(5, 9), (17, 4), (1, 12), (30, 6), (8, 1)])
}


def answers(
    manager: Any, requests: Requests, every: int = 0, after_step: Callable[[], object] = lambda: None
) -> dict[str, list[int]]:
    """The output tokens of each sequence. A request joins every `every` steps; 0 adds all before the first.

    after_step: called after each step, for checks of the manager's state.
    """
    core, pending, step = EngineCore(manager, eos_token_ids=()), list(requests.items()), 0
    found: dict[str, list[int]] = {}
    while pending or core.has_work:
        assert step < 500, "the requests do not finish"
        while pending and (every == 0 or step % every == 0):
            name, (tokens, params) = pending.pop(0)
            core.add_request(name, tokens, params)
            if every:
                break
        for output in core.step():
            found.setdefault(output.seq_id, []).append(output.token)
        after_step()
        step += 1
    return found
