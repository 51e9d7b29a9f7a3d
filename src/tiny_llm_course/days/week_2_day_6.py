"""Day 2.6: what `pdm run try` shows and `pdm run compare` times."""

import time

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Print when prompts get their first tokens, and how long a long prompt delays another request."""
    from tiny_llm.chunked_prefill import first_token_steps
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    prompt_lens = (1600, 30, 300)
    lengths = ", ".join(f"{length:,}" for length in prompt_lens)
    yield f"a simulation: the steps in which prompts of {lengths} tokens get their first tokens"
    for budget in (2048, 512, 128):
        yield f"  {budget:5,} tokens a step: {first_token_steps(prompt_lens, budget)}"
    yield "the real model: another request decodes while a prompt of 1,600 tokens is computed"
    for budget in (2048, 128):
        llm = LLM(max_num_batched_tokens=budget, max_num_seqs=8, num_blocks=256)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        llm.core.add_request("short", llm.tokenizer.encode(STORY), params)
        for _ in range(8):
            llm.core.step()
        llm.core.add_request("long", llm.tokenizer.encode(STORY * 400)[:1600], params)
        gaps: list[float] = []
        last = time.perf_counter()
        while len(gaps) < 20:
            if any(output.request_id == "short" for output in llm.core.step()):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
        yield f"  {budget:5,} tokens a step: it waits up to {1000 * max(gaps):5,.0f} ms for its next token"


def work() -> Work:
    """64 budgets, each shared among 256 sequences that want tokens."""
    from tiny_llm.chunked_prefill import share_budget

    wants = [1 if i % 3 else 200 + i for i in range(256)]
    return lambda: mx.array([share_budget(wants, budget) for budget in range(0, 4096, 64)])
