"""Day 3.4: what `pdm run try` shows."""

from .shared import STORY, Lines


def show() -> Lines:
    """Ask three questions with one system prompt; print the computed tokens and the time to first token."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    subjects = ("sea", "moon", "weather", "rocks", "birds", "ships", "lamp", "stories", "harbour", "tides")
    rules = (f"Rule {i}: when a visitor asks about the {it}, be brief." for i, it in enumerate(subjects, 1))
    system = {"role": "system", "content": f"You keep a lighthouse. {' '.join(rules)}"}
    questions = ("Who are you?", "What is the moon?", "Why are there tides?")
    chats = [[system, {"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    length = len(system["content"])
    yield f"the real model: three questions with the same system prompt of {length:,} characters"
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
    same = all(answer == answers[0] for answer in answers)
    yield f"all runs gave the same answers: {same}; the first: {answers[0][0]!r}"
