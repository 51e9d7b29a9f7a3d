"""How much memory does block sharing save? Parallel sampling and beam search on the embedded model.

Compares the entries in the block tables of one request's sequences with the distinct blocks among them, at
every step of a run. "average" sums both over the steps, "peak" takes the maximum of each. The prefix cache is
off, so only forks share blocks. There are two fixed lengths, one short and one like a chat; end-of-sequence
tokens are ignored.

Expected, by counting blocks: completions of one prompt share exactly the blocks that the prompt fills
("expected"). Beams share at least those, and more if they diverged late. The PagedAttention paper reports,
for its own models and requests and 2 to 6 sequences, 6-10% (short) and 16-31% (chat) for parallel sampling,
38-55% and 44-66% for beam search. A prompt that is shorter than a block has nothing to share.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tiny_llm.model import Model
from tiny_llm.step import StepLogits

import harness
from tiny_llm import LLM, BeamSearchParams, EngineCore, PagedBatchManager, SamplingParams

COMPLETIONS, BEAMS = (2, 4, 8), (2, 4, 6)
SAMPLING, SEARCH = "sampling", "beam search"


class Step(NamedTuple):
    """Blocks of a step: entries in the block tables (logical), and distinct blocks (physical)."""

    logical: int
    physical: int


class RecordingManager(PagedBatchManager):
    """A batch manager that records the block tables of every step."""

    def __init__(self, num_blocks: int, block_size: int, max_seqs: int, model: Model) -> None:
        super().__init__(num_blocks, block_size, max_seqs, model=model)
        self.steps: list[Step] = []

    def process_batch(self) -> StepLogits:
        """Run the step and record its tables."""
        logits = super().process_batch()
        tables = [sequence.table.blocks for sequence in self.running]
        self.steps.append(Step(sum(map(len, tables)), len({block for blocks in tables for block in blocks})))
        return logits


class Task(NamedTuple):
    """A prompt, the length of each answer in tokens, and the number of answers (width)."""

    kind: str
    prompt: Sequence[int]
    output_len: int
    width: int
    block_size: int

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def expect(self) -> list[Step]:
        """Predict the steps: the sequences share exactly the blocks that the prompt fills.

        During prefill a search has only one beam, and completions share all blocks of the prompt.
        """
        prompt, full = self.blocks(len(self.prompt)), len(self.prompt) // self.block_size
        steps = [Step(prompt * (self.width if self.kind == SAMPLING else 1), prompt)]
        for tokens in range(len(self.prompt) + 1, len(self.prompt) + self.output_len):
            each = self.blocks(tokens)
            steps.append(Step(self.width * each, full + self.width * (each - full)))
        return steps

    def run(self, llm: LLM) -> list[Step]:
        """Run the request and return the recorded steps."""
        num_blocks = self.width * self.blocks(len(self.prompt) + self.output_len)
        manager = RecordingManager(num_blocks, self.block_size, self.width, llm.model)
        core = EngineCore(manager, llm.model_config.eos_token_ids)
        if self.kind == SEARCH:
            beams = BeamSearchParams(beam_width=self.width, max_tokens=self.output_len, ignore_eos=True)
            core.add_beam_search("request", list(self.prompt), beams)
        else:
            params = SamplingParams(n=self.width, seed=0, max_tokens=self.output_len, ignore_eos=True)
            core.add_request("request", list(self.prompt), params)
        while core.has_work:
            core.step()
        return manager.steps


def saved(steps: Sequence[Step]) -> dict[str, float]:
    """The share of blocks that sharing saves, summed over the steps and at the peak."""
    logical, physical = zip(*steps, strict=True)
    return {"average": 1 - sum(physical) / sum(logical), "peak": 1 - max(physical) / max(logical)}


def prompt_of(llm: LLM, tokens: int) -> list[int]:
    """A text that the model wrote, so that its continuations are ordinary text."""
    params = SamplingParams(seed=0, temperature=0.8, max_tokens=tokens, ignore_eos=True)
    [output] = llm.generate(["Once upon a time"], params, use_tqdm=False)
    return [*output.prompt_token_ids, *output.outputs[0].token_ids][:tokens]


def main() -> None:
    """Print the memory that each kind of request saved."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    options.add_argument(
        "--short", type=int, nargs=2, default=(19, 58), help="tokens in and out (default: 19 58)"
    )
    options.add_argument(
        "--chat", type=int, nargs=2, default=(161, 338), help="tokens in and out (default: 161 338)"
    )
    args = options.parse_args()
    llm, rows = LLM(enable_prefix_caching=False), []
    for kind, widths in ((SAMPLING, COMPLETIONS), (SEARCH, BEAMS)):
        for name, (prompt_len, output_len) in (("short", args.short), ("chat", args.chat)):
            prompt = prompt_of(llm, prompt_len)
            for width in widths:
                task = Task(kind, prompt, output_len, width, args.block_size)
                rows.append(row_of(task, name, task.run(llm)))
    lines = [
        "memory saved, as a share of the blocks needed without sharing",
        f"{'':12}{'in':>11}{'out':>5}{'n':>4}{'average':>9}{'expected':>10}{'peak':>8}{'expected':>10}",
    ]
    lines += [line_of(row) for row in rows]
    result = {"benchmark": "sharing", "block_size": args.block_size, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


def row_of(task: Task, name: str, steps: Sequence[Step]) -> dict[str, Any]:
    """The figures of one task."""
    return {
        "kind": task.kind,
        "length": name,
        "prompt_tokens": len(task.prompt),
        "output_tokens": task.output_len,
        "sequences": task.width,
        "saved": saved(steps),
        "expected": saved(task.expect()),
        "max_blocks": max(step.physical for step in steps),
    }


def line_of(row: dict[str, Any]) -> str:
    """The figures as text, with `>=` for beams, because they save at least the expected share."""
    least = "" if row["kind"] == SAMPLING else ">="
    figures = "".join(
        f"{row['saved'][name]:>{width}.1%}{least:>4}{row['expected'][name]:>6.1%}"
        for name, width in (("average", 9), ("peak", 8))
    )
    lengths = f"{row['length']:>6}{row['prompt_tokens']:>5}{row['output_tokens']:>5}"
    return f"{row['kind']:12}{lengths}{row['sequences']:>4}{figures}"


if __name__ == "__main__":
    main()
