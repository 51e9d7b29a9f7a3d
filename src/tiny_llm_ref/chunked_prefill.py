"""What each sequence computes in the next step: one budget of tokens, shared between decodes and prompts.

A long prompt is computed in chunks, so that it does not hold up the sequences that generate beside it. Plain
counts; knows nothing of arrays or memory. Source: Agrawal et al., "Sarathi-Serve" (OSDI 2024).
"""

from collections.abc import Sequence as Seq
from typing import TypeVar

from .batch_manager import wanted
from .sequence import Sequence
from .step import Plan, Scheduled

S = TypeVar("S", bound=Sequence)


def share_budget(wants: Seq[int], budget: int) -> list[int]:
    """Share `budget` tokens: how many each sequence may compute in this step, in the order of `wants`.

    `wants[i]` is how many tokens sequence i could compute now: 1 for a decode, more for a prompt, 0 for none.
    Decodes are served first, then prompts; among decodes, and among prompts, the lower index first. A prompt
    that does not fit into what is left gets a chunk, the rest of the budget; prompts behind it get 0. A want
    of 1 is served like a decode, also if it is the last token of a chunked prompt.

    No sequence gets more than it wants, all together at most `budget`; what is wanted and fits is granted.
    `wants` is not changed. Raises ValueError for a negative want or budget.

    >>> share_budget([5, 1, 9, 1], 10)
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
    """Simulate steps: in which step, counted from 1, is each prompt complete and its first token sampled?

    All prompts are there from the start and run together. In each step a sequence wants the tokens of its
    prompt that are not computed yet; from the step after its prompt is complete it wants 1, a decode, and
    never ends. `share_budget` decides. A small budget lets decodes go on often, and makes new requests wait.

    Raises ValueError for a prompt of no tokens, and for a budget of fewer tokens than there are prompts: all
    decodes together could then use up every step, and a later prompt would wait for ever. The engine demands
    the same (`max_num_batched_tokens` >= `max_num_seqs`). No prompts: the list is empty.

    >>> first_token_steps([10, 3], budget=4)  # granted: [4, 0], [4, 0], [2, 2], [1, 1]
    [3, 4]
    """
    if min(prompt_lens, default=1) < 1 or budget < len(prompt_lens):
        raise ValueError(f"{len(prompt_lens)} prompts of {list(prompt_lens)} tokens, {budget} tokens a step")
    left, first, step = list(prompt_lens), [0] * len(prompt_lens), 0
    while not all(first):
        step += 1
        for i, count in enumerate(share_budget([max(tokens, 1) for tokens in left], budget)):
            left[i] -= count
            if left[i] <= 0 and not first[i]:
                first[i] = step
    return first


def plan_chunks(running: Seq[S], budget: int) -> Plan[S]:
    """Plan the next step of the running sequences: a `Plan` with a chunk for each that gets a share.

    `wanted` says how many tokens a sequence could compute, `share_budget` how many it may. One that may
    compute n > 0 tokens gets `Scheduled(sequence, start, start + n)`, where start is its `num_computed`: the
    tokens before are computed. The chunks are in the order of `running`; the others get none. Changes no
    sequence: the chunks are not computed yet.

    >>> from tiny_llm.sampling_params import SamplingParams
    >>> from tiny_llm.sequence import Sequence
    >>> given = {"request_id": "r", "params": SamplingParams(), "seed": 0, "max_len": 99}
    >>> long, short = (Sequence(seq_id=name, prompt=tuple(name), **given) for name in ("abcdefghi", "x"))
    >>> [(chunk.start, chunk.stop) for chunk in plan_chunks([long, short], budget=4).chunks]
    [(0, 3), (0, 1)]
    """
    plan: Plan[S] = Plan()
    granted = share_budget([wanted(sequence) for sequence in running], budget)
    for sequence, count in zip(running, granted, strict=True):
        if count:
            start = sequence.num_computed
            plan.chunks.append(Scheduled(sequence, start, start + count))
    return plan
