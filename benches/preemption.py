"""What does preemption cost by swap and by recompute, with blocks of 4, 8, 16, 32 and 64 tokens?

First a single preemption: a sequence is swapped to the host and back (bookkeeping and copies, both ways), or
releases its blocks and is computed again. Then a workload: the same requests, more than the pool can hold,
alternately in both modes; the figure is the ratio of the throughputs, run by run. The prefix cache is off,
because it would often still have the released blocks. Host memory is large enough for all sequences. The pool
holds the same number of tokens at every block size.

Expected before the first run: in the PagedAttention paper the two modes are comparable for blocks of 16 to
64, and swap is slower for small blocks, each of which is a separate transfer over PCIe. Here host and pool
are the same memory, all blocks of a step are copied by one gather and one scatter per layer, and a prompt
token costs about 2 ms. So a preemption should cost 10 to 20 ms by swap and, for 256 tokens, half a second by
recompute: swap is at least 20 times as fast at every block size, a little less at 4, where runs of 512 bytes
are copied one by one. The workload should gain the share of tokens that recompute computes twice: 10 to
30%.

Measured at first: 35 to 45 ms by swap, a tenth of recompute, the same at every block size, because MLX's
gather and scatter take about 3 ns for each number. Since blocks are copied as bytes: 2 to 5 ms. The workload
gains what was expected, most with small blocks, which cause more preemptions.
"""

import random
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
from tiny_llm.paged_attention import BlockTable
from tiny_llm.preemption import NewestFirst
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.sequence import PagedSequence
from tiny_llm.swap import SwapSpace

import harness
from tiny_llm import LLM, BlockAllocator, EngineCore, KVPool, PagedBatchManager, Policies, SamplingParams

BLOCK_SIZES = (4, 8, 16, 32, 64)
LENGTHS = (64, 256, 512)
LONGEST_PROMPT, LONGEST_ANSWER = 64, 128  # tokens of the workload's requests
BUDGET = 512  # tokens per step
Prompts = Sequence[list[int]]


class Load(NamedTuple):
    """Prompts, the length of each answer, and the pool's capacity, both in tokens."""

    prompts: Prompts
    answers: Sequence[int]
    capacity: int

    @classmethod
    def drawn(cls, requests: int, share: float, seed: int) -> "Load":
        """Draw short prompts and longer answers; the pool holds a share of the tokens that all need."""
        draw = random.Random(seed)
        prompts = [_tokens(draw, draw.randint(16, LONGEST_PROMPT)) for _ in range(requests)]
        answers = [draw.randint(64, LONGEST_ANSWER) for _ in range(requests)]
        needed = sum(map(len, prompts)) + sum(answers)
        return cls(prompts, answers, round(share * needed))


def _tokens(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000, 40_000) for _ in range(length)]


# ---- one preemption ----


def time_swap(llm: LLM, block_size: int, length: int, repetitions: int) -> list[float]:
    """Milliseconds to swap a sequence out and in, its blocks scattered in the pool."""
    config, num_blocks = llm.model_config, 2 * -(-1024 // block_size)
    pool, host = (KVPool.for_model(config, num_blocks, block_size, mx.float16) for _ in range(2))
    allocator, space, draw = BlockAllocator(num_blocks), SwapSpace(num_blocks, block_size), random.Random(0)
    taken = [allocator.allocate() for _ in range(num_blocks)]
    for block in draw.sample(taken, num_blocks):
        allocator.free(block)
    sequence = PagedSequence(
        seq_id="one",
        request_id="one",
        prompt=tuple(_tokens(draw, length)),
        params=SamplingParams(),
        seed=0,
        max_len=length + 1,
        tables=[BlockTable(allocator, block_size)],
        streams=[TokenBlocks(block_size)],
    )
    sequence.append_tokens(length)
    sequence.num_computed = length

    def swap_out_and_in() -> None:
        sequence.streams = [TokenBlocks(block_size)]
        host.fill_from(pool, space.swap_out(sequence) or [])
        sequence.release_pages()
        copies = space.swap_in(sequence)
        pool.fill_from(host, [(host_block, block) for block, host_block in copies])
        space.forget(sequence)

    swap_out_and_in()  # warms up
    return [1e3 * harness.timed(swap_out_and_in) for _ in range(repetitions)]


def time_recompute(llm: LLM, block_size: int, length: int, repetitions: int) -> list[float]:
    """Milliseconds to compute a sequence of `length` tokens that runs alone."""
    draw, milliseconds = random.Random(0), []
    for _ in range(repetitions + 1):
        manager = PagedBatchManager(
            1 + length // block_size + 1, block_size, 1, model=llm.model, max_batched_tokens=BUDGET
        )
        core = EngineCore(manager, ())
        core.add_request("one", _tokens(draw, length), SamplingParams(temperature=0, max_tokens=2))
        milliseconds.append(1e3 * harness.timed(core.step))
    return milliseconds[1:]  # the first run warms up


def event(llm: LLM, block_size: int, length: int, repetitions: int) -> dict[str, Any]:
    """Time one preemption in both modes; times: how many times as long recompute takes."""
    swapped = time_swap(llm, block_size, length, 4 * repetitions)
    computed = time_recompute(llm, block_size, length, repetitions)
    return {
        "block_size": block_size,
        "tokens": length,
        "swap_ms": harness.summary(swapped),
        "recompute_ms": harness.summary(computed),
        "times": median(computed) / median(swapped),
    }


# ---- a workload ----


class Ran(NamedTuple):
    """Output tokens per second, number of preemptions, and tokens computed."""

    speed: float
    preemptions: int
    computed: int


def serve(llm: LLM, load: Load, block_size: int, swaps: bool) -> Ran:
    """Run all requests at once to completion, with a pool that is too small for them."""
    longest = -(-(LONGEST_PROMPT + LONGEST_ANSWER) // block_size)
    blocks = max(load.capacity // block_size, longest + 1)
    manager = PagedBatchManager(
        blocks,
        block_size,
        len(load.prompts),
        model=llm.model,
        max_batched_tokens=BUDGET,
        policies=Policies(NewestFirst(), swap_blocks=longest * len(load.prompts) if swaps else 0),
    )
    core, computed = EngineCore(manager, ()), 0
    for number, (prompt, answer) in enumerate(zip(load.prompts, load.answers, strict=True)):
        core.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=answer))

    def run_all() -> None:
        nonlocal computed
        while core.has_work:
            core.step()
            computed += sum(chunk.stop - chunk.start for chunk in manager.last_plan.chunks)

    seconds = harness.timed(run_all)
    return Ran(sum(load.answers) / seconds, manager.num_preemptions, computed)


def workload(llm: LLM, load: Load, block_size: int, repetitions: int) -> dict[str, Any]:
    """Run both modes in alternation; return the ratio of each pair of runs."""
    pairs: list[dict[bool, Ran]] = []
    for repetition in range(repetitions):
        order = (True, False) if repetition % 2 else (False, True)
        pairs.append({swaps: serve(llm, load, block_size, swaps) for swaps in order})
    needed = sum(len(p) + answer - 1 for p, answer in zip(load.prompts, load.answers, strict=True))
    return {
        "block_size": block_size,
        "preemptions": {"swap": pairs[0][True].preemptions, "recompute": pairs[0][False].preemptions},
        "computed_again": pairs[0][False].computed / needed - 1,
        "swap": harness.summary([pair[True].speed for pair in pairs]),
        "recompute": harness.summary([pair[False].speed for pair in pairs]),
        "ratio": harness.summary([pair[True].speed / pair[False].speed for pair in pairs]),
    }


def main() -> None:
    """Print both tables."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--requests", type=int, default=12, help="requests in the workload (default: 12)")
    options.add_argument(
        "--share", type=float, default=0.25, help="pool size, as a share of the tokens needed (default: 0.25)"
    )
    options.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: 0)")
    options.set_defaults(repetitions=3)
    args = options.parse_args()
    llm, load = LLM(num_blocks=64), Load.drawn(args.requests, args.share, args.seed)
    events = [event(llm, size, length, args.repetitions) for length in LENGTHS for size in BLOCK_SIZES]
    runs = [workload(llm, load, size, args.repetitions) for size in BLOCK_SIZES]
    lines = [f"{'preempted':>10}{'block':>7}{'swap, ms':>10}{'(range)':>14}{'recompute, ms':>15}{'times':>7}"]
    for row in events:
        swap = row["swap_ms"]
        between = f"({swap['min']:.1f}-{swap['max']:.1f})"
        lines.append(
            f"{row['tokens']:>6} tok{row['block_size']:>7}{swap['median']:>10.1f}{between:>14}"
            f"{row['recompute_ms']['median']:>15.0f}{row['times']:>7.0f}"
        )
    lines += [
        "",
        "workload; preemptions by recompute / swap, tokens computed twice, output tokens per second",
        f"{'block':>10}{'preempted':>12}{'twice':>7}{'recompute':>11}{'swap':>8}{'ratio':>7}  (min-max)",
    ]
    for row in runs:
        ratio = row["ratio"]
        preempted = f"{row['preemptions']['recompute']} / {row['preemptions']['swap']}"
        lines.append(
            f"{row['block_size']:>10}{preempted:>12}{row['computed_again']:>7.0%}"
            f"{row['recompute']['median']:>11.1f}{row['swap']['median']:>8.1f}{ratio['median']:>7.2f}"
            f"  ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    run = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"benchmark": "preemption", "run": run, "events": events, "workload": runs}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
