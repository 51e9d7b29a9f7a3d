"""Day 3.6: what `pdm run try` shows and `pdm run compare` times."""

import time

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Run six stories with memory for two; print which wait, what is computed again, and what is copied."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    animals, length = ("cat", "dog", "fox", "owl", "bear", "wolf"), 64
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    yield f"the real model: {len(animals)} stories of {length} tokens, each of which fills 5 blocks of 16"
    answers = []
    for blocks, mode in ((30, "recompute"), (10, "none"), (10, "recompute"), (10, "swap")):
        llm = LLM(num_blocks=blocks, max_num_seqs=6, preemption_mode=mode, enable_prefix_caching=False)
        llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
        core, manager = llm.core, llm.core.manager
        for animal in animals:
            core.add_request(animal, llm.tokenizer.encode(f"{STORY}, there was a {animal}"), params)
        start, again, copied = time.perf_counter(), 0, 0
        said: dict[str, list[int]] = {animal: [] for animal in animals}
        shown = dict.fromkeys(animals, "")
        while core.has_work:
            had = {one.seq_id: one.num_computed for one in manager.running}
            for output in core.step():
                said[output.seq_id].append(output.token)
            marks = dict.fromkeys(animals, " ") | {one.seq_id: "#" for one in manager.running}
            for one in manager.waiting:
                marks[one.seq_id] = "." if one.swapped is None else "o"
                again += 0 if one.swapped else had.get(one.seq_id, 0)
                copied += len(one.swapped.tables[0].host_blocks) if one.swapped and one.seq_id in had else 0
            shown = {animal: line + marks[animal] for animal, line in shown.items()}
        steps, seconds = len(shown[animals[0]]), time.perf_counter() - start
        answers.append(said)
        yield (
            f"{blocks} blocks, preemption_mode {mode!r}: {steps} steps, {seconds:.1f} s; "
            f"{manager.num_preemptions} preemptions; computed again: {again} tokens; "
            f"copied to the host: {copied} blocks"
        )
        every = -(-steps // 80)
        yield from (f"  {animal:4} {line[::every].rstrip()}" for animal, line in shown.items())
    yield "  #: runs. .: waits. o: waits, with its keys and values on the host"
    yield f"  one character is {every} steps"
    yield "recompute and swap take about the same number of steps: sequences wait for the same blocks in both"
    yield "modes, and a short story is computed again in one step. Swapping saves work for large models"
    yield f"all runs gave the same answers: {all(said == answers[0] for said in answers)}"


def work() -> Work:
    """Bookkeeping only: 32 prompts with four completions each, swapped out and in three times."""
    from tiny_llm.paged_attention import BlockAllocator, BlockTable
    from tiny_llm.prefix_cache import TokenBlocks
    from tiny_llm.sampling_params import SamplingParams
    from tiny_llm.sequence import PagedSequence
    from tiny_llm.swap import SwapSpace

    def work() -> mx.array:
        allocator, space = BlockAllocator(1600), SwapSpace(1200, 16)
        pool, host, figures = [0] * 1600, [0] * 1200, []
        for i in range(32):
            leader = PagedSequence(
                seq_id=str(i),
                request_id=str(i),
                prompt=tuple(range(i, i + 100)),
                params=SamplingParams(),
                seed=0,
                max_len=300,
                tables=[BlockTable(allocator, 16)],
                streams=[TokenBlocks(16)],
            )
            leader.append_tokens(100)
            leader.num_computed = 100
            family = [leader, *(leader.fork(f"{i}/{fork}", fork) for fork in range(1, 4))]
            for turn in range(3):
                for fork, one in enumerate(family):
                    one.outputs += [1000 + fork] * 20
                    one.append_tokens(20)
                    one.num_computed += 20
                    for place, block in enumerate(one.table.blocks):
                        pool[block] = 1000 * i + 100 * turn + 10 * fork * (place > 5) + place
                for one in family:
                    copies = space.swap_out(one) or []
                    for block, host_block in copies:
                        host[host_block] = pool[block]
                    one.release_pages()
                    figures += [len(copies), space.allocator.num_free]
                at_hand: dict[bytes, int] = {}
                for one in family:
                    figures.append(space.blocks_to_swap_in(one))
                    for block, host_block in space.swap_in(one, at_hand):
                        pool[block] = host[host_block]
                    at_hand |= zip(one.stream.hashes, one.table.blocks, strict=False)
                    figures += [pool[block] for block in one.table.blocks]
                    figures.append(allocator.num_free)
                for one in family:
                    space.forget(one)
                figures.append(space.allocator.num_free)
        return mx.array(figures)

    return work
