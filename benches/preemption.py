"""What does swap cost against recompute, over block sizes 4, 8, 16, 32, 64?

An event alone: a sequence of so many tokens goes to the host and comes back (bookkeeping and copies, both
ways), or gives its pages up and is computed again. And a whole workload: the same requests, more than the
pool can take, in both modes, which take turns; the ratio of their throughputs, run by run. Prefixes are not
cached, or what was given up would often be found again. The host has room for all; the pool has the same
tokens at every block size.

Expected, before the first run: in the PagedAttention paper the two are comparable at blocks of 16 to 64, and
swap loses at small ones, where each block is a transfer of its own over PCIe. Here the host is the same
memory and all blocks of a step go in one gather and one scatter a layer, while a prompt's token costs about
2 ms. So an event should cost 10 to 20 ms by swap and, at 256 tokens, half a second by recompute: swap wins 20
times and more at every block size, a little less at 4, where runs of 512 bytes are copied one by one. A
workload gains as far as tokens were computed twice: 10 to 30%. Found at first: 35 to 45 ms and a tenth of
recompute, the same at every block size, because MLX's gather and scatter spend some 3 ns on each number that
they move; since blocks are copied as bytes, 2 to 5 ms. The workload gains what was expected, most at small
blocks, where more give way.
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
LONGEST_PROMPT, LONGEST_ANSWER = 64, 128  # tokens, of the workload
BUDGET = 512  # tokens of a step
Prompts = Sequence[list[int]]


class Load(NamedTuple):
    """Requests, the tokens of each answer, and those that the pool has room for."""

    prompts: Prompts
    answers: Sequence[int]
    room: int

    @classmethod
    def drawn(cls, requests: int, share: float, seed: int) -> "Load":
        """Short prompts and longer answers; room for a share of what all need at once."""
        draw = random.Random(seed)
        prompts = [_tokens(draw, draw.randint(16, LONGEST_PROMPT)) for _ in range(requests)]
        answers = [draw.randint(64, LONGEST_ANSWER) for _ in range(requests)]
        needed = sum(map(len, prompts)) + sum(answers)
        return cls(prompts, answers, round(share * needed))


def _tokens(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000, 40_000) for _ in range(length)]


# ---- an event ----


def swapping(llm: LLM, block_size: int, length: int, repetitions: int) -> list[float]:
    """Milliseconds for a sequence's way to the host and back, its blocks scattered in the pool."""
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

    def there_and_back() -> None:
        sequence.streams = [TokenBlocks(block_size)]
        host.fill_from(pool, space.swap_out(sequence) or [])
        sequence.give_up_pages()
        copies = space.swap_in(sequence)
        pool.fill_from(host, [(host_block, block) for block, host_block in copies])
        space.forget(sequence)

    there_and_back()  # warms up
    return [1e3 * harness.timed(there_and_back) for _ in range(repetitions)]


def recomputing(llm: LLM, block_size: int, length: int, repetitions: int) -> list[float]:
    """Milliseconds until a sequence of so many tokens is computed, alone."""
    draw, milliseconds = random.Random(0), []
    for _ in range(repetitions + 1):
        manager = PagedBatchManager(
            1 + length // block_size + 1, block_size, 1, model=llm.model, max_batched_tokens=BUDGET
        )
        core = EngineCore(manager, ())
        core.add_request("one", _tokens(draw, length), SamplingParams(temperature=0, max_tokens=2))
        milliseconds.append(1e3 * harness.timed(core.step))
    return milliseconds[1:]  # the first one warms up


def event(llm: LLM, block_size: int, length: int, repetitions: int) -> dict[str, Any]:
    """Both ways of giving way, and how many times as long recomputing takes."""
    swapped = swapping(llm, block_size, length, 4 * repetitions)
    computed = recomputing(llm, block_size, length, repetitions)
    return {
        "block_size": block_size,
        "tokens": length,
        "swap_ms": harness.summary(swapped),
        "recompute_ms": harness.summary(computed),
        "times": median(computed) / median(swapped),
    }


# ---- a workload ----


class Ran(NamedTuple):
    """Output tokens a second, how often somebody gave way, and the tokens that were computed."""

    speed: float
    preemptions: int
    computed: int


def serve(llm: LLM, load: Load, block_size: int, swaps: bool) -> Ran:
    """All requests at once, to their ends, from a pool that is too small for them."""
    longest = -(-(LONGEST_PROMPT + LONGEST_ANSWER) // block_size)
    blocks = max(load.room // block_size, longest + 1)
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

    def to_the_end() -> None:
        nonlocal computed
        while core.has_work:
            core.step()
            computed += sum(chunk.stop - chunk.start for chunk in manager.last_plan.chunks)

    seconds = harness.timed(to_the_end)
    return Ran(sum(load.answers) / seconds, manager.num_preemptions, computed)


def workload(llm: LLM, load: Load, block_size: int, repetitions: int) -> dict[str, Any]:
    """Both modes in turns; the ratio of each pair of runs."""
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
    options.add_argument("--requests", type=int, default=12, help="requests of the workload (default: 12)")
    options.add_argument("--share", type=float, default=0.25, help="of what all need (default: 0.25)")
    options.add_argument("--seed", type=int, default=0, help="source of prompts (default: 0)")
    options.set_defaults(repetitions=3)
    args = options.parse_args()
    llm, load = LLM(num_blocks=64), Load.drawn(args.requests, args.share, args.seed)
    events = [event(llm, size, length, args.repetitions) for length in LENGTHS for size in BLOCK_SIZES]
    runs = [workload(llm, load, size, args.repetitions) for size in BLOCK_SIZES]
    lines = [f"{'an event':>10}{'block':>7}{'swap, ms':>10}{'(range)':>14}{'again, ms':>11}{'times':>7}"]
    for row in events:
        swap = row["swap_ms"]
        between = f"({swap['min']:.1f}-{swap['max']:.1f})"
        lines.append(
            f"{row['tokens']:>6} tok{row['block_size']:>7}{swap['median']:>10.1f}{between:>14}"
            f"{row['recompute_ms']['median']:>11.0f}{row['times']:>7.0f}"
        )
    lines.append(
        f"{'workload':>10}{'gave way':>10}{'again':>7}{'recompute':>11}{'swap, tok/s':>13}{'ratio':>7}"
    )
    for row in runs:
        ways, ratio = row["preemptions"], row["ratio"]
        lines.append(
            f"{row['block_size']:>10}{ways['recompute']:>6} / {ways['swap']}{row['computed_again']:>6.0%}"
            f"{row['recompute']['median']:>11.1f}{row['swap']['median']:>13.1f}{ratio['median']:>7.2f}"
            f"  ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    run = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"benchmark": "preemption", "run": run, "events": events, "workload": runs}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
