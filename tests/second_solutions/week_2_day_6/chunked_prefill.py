"""A step's budget: decodes are sorted to the front."""

from collections.abc import Sequence as Seq
from typing import TypeVar

from .batch_manager import wanted
from .sequence import Sequence
from .step import Plan, Scheduled

S = TypeVar("S", bound=Sequence)


def share_budget(wants: Seq[int], budget: int) -> list[int]:
    """In the order of serving, then put back into the order given."""
    if min([budget, *wants]) < 0:
        raise ValueError(f"negative: {budget}, {wants}")
    granted: dict[int, int] = {}
    for place in sorted(range(len(wants)), key=lambda place: wants[place] != 1):
        granted[place] = min(wants[place], budget - sum(granted.values()))
    return [granted[place] for place in range(len(wants))]


def first_token_steps(prompt_lens: Seq[int], budget: int) -> list[int]:
    """Counts what is done."""
    if any(length < 1 for length in prompt_lens) or len(prompt_lens) > budget:
        raise ValueError(f"{prompt_lens} never end with {budget} tokens a step")
    done = [0] * len(prompt_lens)
    complete_in: dict[int, int] = {}
    step = 0
    while len(complete_in) < len(done):
        step += 1
        lengths = list(enumerate(prompt_lens))
        granted = share_budget([1 if i in complete_in else length - done[i] for i, length in lengths], budget)
        done = [before + count for before, count in zip(done, granted, strict=True)]
        for i, length in lengths:
            if done[i] >= length:
                complete_in.setdefault(i, step)
    return [complete_in[i] for i in range(len(done))]


def plan_chunks(running: Seq[S], budget: int) -> Plan[S]:
    """The chunks as one list."""
    counts = share_budget([wanted(sequence) for sequence in running], budget)
    starts = [sequence.num_computed for sequence in running]
    spans = zip(running, starts, counts, strict=True)
    return Plan([Scheduled(sequence, start, start + count) for sequence, start, count in spans if count > 0])
