"""Day 1.7: what `pdm run try` shows."""

import mlx.core as mx

from .shared import Lines


def show() -> Lines:
    """Print continuations of a prompt, and how many next tokens are likely at each temperature."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampler import keep_top_p
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(num_blocks=256)
    text = "My favourite thing about the rain is"
    row = llm.logits(llm.tokenizer.encode(text))[-1]
    for temperature in (0.0, 0.7, 1.3):
        possible = int(mx.sum(keep_top_p(row / temperature, 0.9) > -mx.inf)) if temperature else 1
        yield f"temperature {temperature}: 90% of the probability is on {possible:,} of {row.size:,} tokens"
        for seed in (1, 2):
            params = SamplingParams(temperature=temperature, top_p=0.9, seed=seed, max_tokens=14)
            [output] = llm.generate(text, params, use_tqdm=False)
            yield f"  seed {seed}: {text}{output.outputs[0].text.splitlines()[0]}"
