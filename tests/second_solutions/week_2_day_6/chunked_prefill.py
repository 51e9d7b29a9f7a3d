"""Divides a step's budget of tokens among the sequences: decodes first, then prompts.

A step is one forward pass over tokens of several sequences; its budget is the number of tokens that it may
compute. A decode is a sequence that generates: its prompt is computed, and it computes its newest token to
get the next. A long prompt is computed in chunks (chunked prefill), so that it does not delay the decodes.
This module only counts tokens, and knows nothing of arrays or memory. Source: Agrawal et al., "Sarathi-Serve"
(OSDI 2024).
"""

from collections.abc import Sequence as Seq

from .batch_manager import tokens_wanted
from .step import Plan, Scheduled


def share_budget(wants: Seq[int], budget: int) -> list[int]:
    if budget < 0 or any(want < 0 for want in wants):
        raise ValueError("wants and budget must not be negative")
    shares = [0] * len(wants)
    decodes = [i for i, want in enumerate(wants) if want == 1]
    prompts = [i for i, want in enumerate(wants) if want > 1]
    for i in decodes + prompts:
        shares[i] = min(wants[i], budget)
        budget -= shares[i]
    return shares


def first_token_steps(prompt_lens: Seq[int], budget: int) -> list[int]:
    if any(length < 1 for length in prompt_lens):
        raise ValueError("every prompt must have at least one token")
    if budget < len(prompt_lens):
        raise ValueError(f"a budget of {budget} tokens is too small for {len(prompt_lens)} prompts")
    left = list(prompt_lens)  # tokens of each prompt that are not computed yet
    first_steps = [0] * len(left)
    step = 0
    while any(left):
        step += 1
        shares = share_budget([rest or 1 for rest in left], budget)
        for i, share in enumerate(shares):
            if left[i] == 0:
                continue
            left[i] -= share
            if left[i] == 0:
                first_steps[i] = step
    return first_steps


def plan_chunks(running: Seq[S], budget: int) -> Plan[S]:
    shares = share_budget([tokens_wanted(sequence) for sequence in running], budget)
    return Plan(
        chunks=[
            Scheduled(sequence, sequence.num_computed, sequence.num_computed + share)
            for sequence, share in zip(running, shares, strict=True)
            if share > 0
        ]
    )
