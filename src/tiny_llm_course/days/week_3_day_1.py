"""Day 3.1: what `pdm run try` shows."""

from collections import Counter
from typing import Any

from .shared import Lines


def show() -> Lines:
    """Print which blocks three completions of a prompt hold and share, and which were copied."""
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    size, n = 8, 3
    llm = LLM(block_size=size, num_blocks=64, max_num_seqs=n)
    manager, copies = llm.core.manager, []
    copy_blocks = manager.pool.copy_blocks

    def watched(made: list[Any]) -> None:
        copies.extend(made)
        copy_blocks(made)

    manager.pool.copy_blocks = watched
    end = "On the third night"
    text = f"In the far hills a dragon feared the dark, so every evening it asked the old moon to stay. {end}"
    tokens = llm.tokenizer.encode(text)
    full, rest = divmod(len(tokens), size)
    yield (
        f"the real model, a prompt of {len(tokens)} tokens: {full} full blocks of {size} tokens, and "
        f"a last block with {rest}"
    )
    params = SamplingParams(n=n, temperature=0.8, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True)
    llm.core.add_request("one", tokens, params)
    for what, steps in (("prompt computed and forked", 1), ("one token later", 1), ("17 tokens later", 17)):
        for _ in range(steps):
            llm.core.step()
        yield from _who_holds_what(what, [sequence.table for sequence in manager.running])
    lengths = ", ".join(str(copy.length) for copy in copies) or "none"
    yield f"* shared with another sequence; blocks copied on write: {len(copies)}; tokens copied: {lengths}"
    for sequence in manager.running:
        yield f"  {end}{llm.tokenizer.decode(sequence.outputs).splitlines()[0]}"


def _who_holds_what(what: str, tables: list[Any]) -> Lines:
    """The blocks of each table, with a star if another table holds the block too."""
    held = Counter(block for table in tables for block in table.physical_indices())
    yield f"{what}: {len(held)} blocks in use; without sharing, {held.total()}"
    for table in tables:
        blocks = (f"{block:2}{'*' if held[block] > 1 else ' '}" for block in table.physical_indices())
        yield f"  {table.num_tokens} tokens in blocks {' '.join(blocks)}"
