"""Divides a step's budget of tokens among the sequences: decodes first, then prompts.

A step is one forward pass over tokens of several sequences; its budget is the number of tokens that it may
compute. A decode is a sequence that generates: its prompt is computed, and it computes its newest token to
get the next. A long prompt is computed in chunks (chunked prefill), so that it does not delay the decodes.
This module only counts tokens, and knows nothing of arrays or memory. Source: Agrawal et al., "Sarathi-Serve"
(OSDI 2024).
"""

from collections.abc import Sequence as Seq
from typing import TypeVar

from .batch_manager import tokens_wanted
from .sequence import Sequence
from .step import Plan, Scheduled

S = TypeVar("S", bound=Sequence)


def share_budget(wants: Seq[int], budget: int) -> list[int]:
    """Return how many tokens each sequence may compute in this step, in the order of `wants`.

    `wants[i]` is the number of tokens that sequence i could compute now: 1 for a decode, more for a prompt, 0
    for nothing. Serve decodes first, then prompts; among decodes, and among prompts, the lower index first.
    Each gets what it wants, or the rest of the budget if that is less: the first prompt that does not fit
    gets a chunk, and prompts after it get 0. A want of 1 is served as a decode, even if it is the last token
    of a chunked prompt.

    `wants` is not changed. Raises ValueError for a negative want or budget.

    >>> share_budget([5, 1, 9, 1], 10)  # both decodes, the prompt of 5, and a chunk of 3
    [5, 1, 3, 1]
    """
    if budget < 0 or any(want < 0 for want in wants):
        raise ValueError(f"budget and wants must not be negative: budget {budget}, wants {list(wants)}")
    granted = [0] * len(wants)
    decodes = [i for i, want in enumerate(wants) if want == 1]
    prompts = [i for i, want in enumerate(wants) if want > 1]
    for i in decodes + prompts:
        granted[i] = min(wants[i], budget)
        budget -= granted[i]
    return granted


def first_token_steps(prompt_lens: Seq[int], budget: int) -> list[int]:
    """Simulate steps: return in which step, counted from 1, each prompt is complete.

    In that step its first token is sampled. All prompts arrive before the first step and run together. In
    each step a sequence wants the tokens of its prompt that are not computed yet; in all steps after its
    prompt is complete it wants 1, a decode, and never stops. `share_budget` divides the `budget` tokens of
    each step. With a small budget steps are short, so decodes wait less, but new requests wait longer.

    Raises ValueError for a prompt of 0 tokens, and for a budget that is smaller than the number of prompts:
    decodes could then use up every step, and the last prompt would wait forever. The engine requires the same
    (`max_num_batched_tokens` >= `max_num_seqs`). Without prompts the result is an empty list.

    >>> first_token_steps([10, 3], budget=4)  # granted: [4, 0], [4, 0], [2, 2], [1, 1]
    [3, 4]
    """
    if min(prompt_lens, default=1) < 1 or budget < len(prompt_lens):
        raise ValueError(
            "prompts need at least 1 token, and the budget at least 1 per prompt: prompts of "
            f"{list(prompt_lens)} tokens, budget {budget}"
        )
    left, first, step = list(prompt_lens), [0] * len(prompt_lens), 0
    while not all(first):
        step += 1
        for i, count in enumerate(share_budget([max(tokens, 1) for tokens in left], budget)):
            left[i] -= count
            if left[i] <= 0 and not first[i]:
                first[i] = step
    return first


def plan_chunks(running: Seq[S], budget: int) -> Plan[S]:
    """Plan the next step of the running sequences: a `Plan` with a chunk for each that may compute tokens.

    `tokens_wanted(sequence)` returns how many tokens a sequence could compute now, and `share_budget` returns
    how many tokens each sequence may compute. If it may compute n > 0 tokens, its chunk is
    `Scheduled(sequence, start, start + n)`, where start is its `num_computed`. The chunks are in the order of
    `running`. Changes no sequence: the chunks are computed later.

    >>> from tiny_llm.sampling_params import SamplingParams
    >>> from tiny_llm.sequence import Sequence
    >>> given = {"request_id": "r", "params": SamplingParams(), "seed": 0, "max_len": 99}
    >>> long, short = (Sequence(seq_id=name, prompt=tuple(name), **given) for name in ("abcdefghi", "x"))
    >>> [(chunk.start, chunk.stop) for chunk in plan_chunks([long, short], budget=4).chunks]
    [(0, 3), (0, 1)]
    """
    plan: Plan[S] = Plan()
    granted = share_budget([tokens_wanted(sequence) for sequence in running], budget)
    for sequence, count in zip(running, granted, strict=True):
        if count:
            start = sequence.num_computed
            plan.chunks.append(Scheduled(sequence, start, start + count))
    return plan
