"""Does a step take longer with a larger KV pool? It should not: writing a token writes only its bytes.

One sequence decodes on the embedded model, with pools of a thousand to a hundred thousand blocks of one
token. If a step copied the pool, the largest pool would move gigabytes in each step.
"""

from functools import partial

import harness
from tiny_llm import LLM, SamplingParams


def step_times(num_blocks: int, steps: int) -> tuple[list[float], int]:
    """Seconds of each decode step with `num_blocks` blocks of one token, and the pool's size in bytes."""
    llm = LLM(block_size=1, num_blocks=num_blocks, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=steps + 8, ignore_eos=True)
    step = partial(llm.engine.call, llm.core.step)
    llm.engine.call(partial(llm.core.add_request, "bench", [1] + [504] * 31, params))
    for _ in range(4):
        step()
    times = [harness.timed(step) for _ in range(steps)]
    return times, llm.core.manager.capacity.nbytes


def main() -> None:
    """Print the median and the fastest step for each pool size."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=64, help="decode steps for each pool (default: 64)")
    options.add_argument(
        "--num-blocks",
        type=int,
        nargs="+",
        default=[1_000, 3_000, 10_000, 30_000, 100_000],
        help="pool sizes in blocks",
    )
    args = options.parse_args()
    rows = []
    for num_blocks in args.num_blocks:
        times, nbytes = step_times(num_blocks, args.steps)
        rows.append({"num_blocks": num_blocks, "pool_bytes": nbytes, "step_s": harness.summary(times)})
    text = "\n".join(
        f"{row['num_blocks']:>8} blocks  {row['pool_bytes'] / 2**20:8.0f} MiB  "
        f"step {row['step_s']['median'] * 1e3:6.2f} ms (min {row['step_s']['min'] * 1e3:.2f})"
        for row in rows
    )
    harness.show({"benchmark": "pool_size", "steps": args.steps, "rows": rows}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
