"""Day 3.4: what `pdm run try` shows and `pdm run compare` times."""

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Three questions behind one long system prompt: what is computed, how soon an answer begins."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    subjects = ("sea", "moon", "weather", "rocks", "birds", "ships", "lamp", "stories", "harbour", "tides")
    rules = (f"Rule {i}: when somebody asks about the {it}, be brief." for i, it in enumerate(subjects, 1))
    system = {"role": "system", "content": f"You keep a lighthouse. {' '.join(rules)}"}
    questions = ("Who are you?", "What is the moon?", "Why are there tides?")
    chats = [[system, {"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    yield f"the real model: the same system prompt of {len(system['content']):,} characters, three questions"
    answers = []
    for name, enabled in (("without prefix caching", False), ("with prefix caching", True)):
        llm = LLM(num_blocks=256, max_num_seqs=4, enable_prefix_caching=enabled)
        llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
        outputs = [llm.chat(chat, params, use_tqdm=False)[0] for chat in chats]
        answers.append([output.outputs[0].text for output in outputs])
        yield f"{name}, one after the other:"
        for question, output in zip(questions, outputs, strict=True):
            total, ttft = len(output.prompt_token_ids), output.metrics.ttft
            count = total - output.num_cached_tokens
            yield f"  {question:20} {count:3} of {total} tokens computed; first token: {1000 * ttft:4.0f} ms"
        llm.core.manager.prefix.evict(256)
        together = llm.chat(chats, params, use_tqdm=False)
        answers.append([output.outputs[0].text for output in together])
        count = sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in together)
        yield f"  all three at once, from an empty cache: {count} tokens computed"
    yield f"the same answers every time: {all(answer == answers[0] for answer in answers)}; {answers[0][0]!r}"


def work() -> Work:
    """400 prompts of 96 tokens that begin in eight ways, in a pool that fills up: the bookkeeping alone."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable
    from tiny_llm.prefix_cache import PrefixCache, TokenBlocks

    prompts = [[*range(i % 8, i % 8 + 64), *range(1000 + i % 150, 1032 + i % 150)] for i in range(400)]

    def work() -> mx.array:
        allocator = BlockAllocator(256)
        cache = PrefixCache(allocator, 16)
        found = []
        for prompt in prompts:
            stream, table = TokenBlocks(16), BlockTable(allocator, 16)
            stream.extend(prompt)
            for block in cache.match(stream, 0, 5):
                cache.share(table, block, 16)
            found.append(table.num_tokens)
            missing = 6 - len(table.blocks)
            cache.evict(missing - allocator.num_free)
            table.append_tokens(96 - table.num_tokens)
            cache.keep(table, stream, 6 - missing, 6)
            blocks = list(table.blocks)
            table.release()
            cache.released(blocks)
        return mx.array([*found, len(cache), cache.num_idle, allocator.num_free])

    return work
