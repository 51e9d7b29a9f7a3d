"""How one step's token budget is shared among the sequences that want to run.

A pure function of counts, used by every batch manager. Source: Agrawal et al., "Sarathi-Serve"
(OSDI 2024): decodes are never held up by a long prompt, which is computed in chunks beside them.
"""

from collections.abc import Sequence


def share_budget(wants: Sequence[int], budget: int) -> list[int]:
    """Tokens granted to each sequence, in the order given.

    `wants[i]` is how many tokens sequence i could compute now: 1 for a decode, more for a prompt,
    0 for nothing. Decodes are served first, then prompts, both first come first served, the last
    prompt that fits getting a chunk. Never grants more than is wanted, nor more than `budget` in
    total. Raises ValueError for a negative want or budget.
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
