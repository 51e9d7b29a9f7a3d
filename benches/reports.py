"""What does it cost an engine to report its cached prefixes to a router, and to have its pool watched?

Bookkeeping only, without a model. The cache keeps 2,000 or 100,000 blocks of 16 tokens, and 8 sequences run.
A report lists the hashes of the cached blocks; a router needs about one a second. A watcher of the pool
compares all blocks before and after each step instead; the figure is for a step in which each sequence
decodes one token. Both run in the engine's thread, between two steps. Expected: both grow with the number of
blocks. A report costs less than 1% of a second; comparing 100,000 blocks in each step takes a large part of
it.
"""

from functools import partial
from typing import Any

from tiny_llm.block_events import BlockWatch
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.prefix_sharing import PrefixSharing

import harness
from tiny_llm import SamplingParams
from tiny_llm_routing.reports import MAX_HASHES, read_report

BLOCK, RUNNING = 16, 8
PROMPT = 50  # blocks in a prompt
STEPS_PER_SECOND = 20  # of a busy engine on a small machine


class Pool:
    """A batch manager whose cache keeps `num_blocks` blocks, while a few sequences decode."""

    def __init__(self, num_blocks: int) -> None:
        self.manager = PagedBatchManager(
            num_blocks + RUNNING * (PROMPT + 2),
            BLOCK,
            RUNNING,
            max_batched_tokens=RUNNING * PROMPT * BLOCK,
            policies=Policies(prefix=PrefixSharing),
        )
        self._num_requests = 0
        while self.num_kept < num_blocks:
            self._add(1 if self.num_kept < num_blocks - RUNNING * PROMPT else BLOCK)
            self.step()

    @property
    def num_kept(self) -> int:
        """The number of blocks that the cache keeps."""
        return len(self.manager.prefix.blocks)

    def step(self) -> None:
        """Run a step; every sequence gets a token, and ends if that is its last."""
        ready = list(self.manager.process_batch())
        self.manager.commit(dict.fromkeys(ready, 1))
        for seq_id in ready:
            sequence = self.manager.sequence(seq_id)
            if sequence.num_tokens >= sequence.max_len:
                self.manager.finish(seq_id)

    def _add(self, max_tokens: int) -> None:
        """Queue a request with a prompt that no other one shares."""
        number = self._num_requests
        self._num_requests += 1
        prompt = [number * PROMPT * BLOCK + place for place in range(PROMPT * BLOCK)]
        self.manager.add_request(prompt, str(number), SamplingParams(max_tokens=max_tokens))


def measure(num_blocks: int, repetitions: int) -> dict[str, Any]:
    """Seconds of a report and of a watcher's comparison, with that many kept blocks."""
    pool = Pool(num_blocks)
    watch = BlockWatch(pool.manager)
    everything = partial(read_report, pool.manager, 0.0, max_hashes=num_blocks)
    reports = [harness.timed(everything) for _ in range(repetitions)]
    limited = [harness.timed(partial(read_report, pool.manager, 0.0)) for _ in range(repetitions)]
    steps, polls = [], []
    for _ in range(min(repetitions, BLOCK - 4)):  # as long as all sequences decode
        steps.append(harness.timed(pool.step))
        polls.append(harness.timed(watch.poll))
    return {
        "blocks": pool.num_kept,
        "running": len(pool.manager.running),
        "report": harness.summary(reports),
        "limited": harness.summary(limited),
        "poll": harness.summary(polls),
        "bookkeeping_step": harness.summary(steps),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table: medians, and shares of a second."""
    report, limited, poll, step = (
        row[name]["median"] for name in ("report", "limited", "poll", "bookkeeping_step")
    )
    return (
        f"{row['blocks']:>7,} blocks: a report {1e3 * report:.2f} ms ({report:.2%} of a second at one a "
        f"second), with at most {MAX_HASHES:,} hashes {1e3 * limited:.2f} ms; a comparison "
        f"{1e3 * poll:.2f} ms "
        f"({poll * STEPS_PER_SECOND:.1%} of a second at {STEPS_PER_SECOND} steps a second); "
        f"the bookkeeping of the step itself {1e3 * step:.2f} ms"
    )


def main() -> None:
    """Measure each number of blocks and print a line for each."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=10)
    options.add_argument(
        "--blocks",
        type=harness.positive,
        nargs="+",
        default=[2000, 100_000],
        help="numbers of kept blocks (default: 2000 100000)",
    )
    args = options.parse_args()
    rows = [measure(num_blocks, args.repetitions) for num_blocks in args.blocks]
    harness.show({"benchmark": "reports", "rows": rows}, as_json=args.json, text="\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
