"""Day 2.7: what `pdm run try` shows and `pdm run compare` times."""

import time

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Compare eight requests one after the other with eight in one batch, on contiguous caches."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(batching="dense", max_model_len=256, max_num_seqs=8)
    capacity = llm.core.manager.capacity
    size = capacity.nbytes / 2**20
    yield f"{capacity.num_blocks} slots of {capacity.block_size} tokens take {size:,.0f} MiB"
    animals = ("cat", "dog", "fox", "owl", "bear", "wolf", "mouse", "frog")
    prompts = [f"{STORY}, there was a {animal}" for animal in animals]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    answers = []
    for name, batches in (("one after the other", [[p] for p in prompts]), ("together", [prompts])):
        start = time.perf_counter()
        answers.append([o.outputs[0].text for b in batches for o in llm.generate(b, params, use_tqdm=False)])
        speed = 24 * len(prompts) / (time.perf_counter() - start)
        yield f"8 requests {name:19}: {speed:5.0f} tokens/s"
    yield f"both gave the same texts: {answers[0] == answers[1]}; the first: {prompts[0] + answers[1][0]!r}"


def work() -> Work:
    """Four prompts together, eight tokens each, through your batch manager on the real model."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(batching="dense", max_model_len=128, max_num_seqs=4)
    prompts = [f"The best thing about {what} is" for what in ("rain", "snow", "wind", "sun")]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return lambda: mx.array(
        [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    )
