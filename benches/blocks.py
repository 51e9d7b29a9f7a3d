"""Does block bookkeeping cost more in a larger pool? It should not: every operation is O(1).

Nanoseconds per block for the operations of `BlockAllocator` and `BlockTable`, in pools of a thousand to a
million blocks. Each round takes a thousand blocks, different ones each time. In a new pool their ids are
consecutive; in a used pool the free blocks are in random order. Expected: constant in new pools; in used
pools constant apart from cache misses, because the records of a million blocks do not fit into the
processor's cache. The pools are measured in interleaved rounds, so that other work on the machine slows all
of them alike.

allocate, add_ref and free are one call per block (free drops the last reference, which returns the block).
append_tokens, fork and release are one call for a table of a thousand blocks.
"""

import random
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import harness
from tiny_llm import BlockAllocator, BlockTable

BLOCKS = 1_000  # allocated and freed in each round
BLOCK_SIZE = 16
OPERATIONS = ("allocate", "add_ref", "free", "append_tokens", "fork", "release")


def pool(num_blocks: int, *, used: bool) -> BlockAllocator:
    """A new pool, or a used one: all its blocks were allocated and then freed in random order."""
    allocator = BlockAllocator(num_blocks)
    if used:
        blocks = [allocator.allocate() for _ in range(num_blocks)]
        random.Random(num_blocks).shuffle(blocks)
        _each(allocator.free, blocks)
    return allocator


def time_round(allocator: BlockAllocator) -> dict[str, float]:
    """Seconds that each operation takes for `BLOCKS` blocks; all blocks are free again afterwards."""
    blocks: list[int] = []
    found = {"allocate": harness.timed(lambda: blocks.extend(allocator.allocate() for _ in range(BLOCKS)))}
    found["add_ref"] = harness.timed(lambda: _each(allocator.add_ref, blocks))
    _each(allocator.free, blocks)
    found["free"] = harness.timed(lambda: _each(allocator.free, blocks))
    table, children = BlockTable(allocator, BLOCK_SIZE), []
    found["append_tokens"] = harness.timed(lambda: table.append_tokens(BLOCKS * BLOCK_SIZE))
    found["fork"] = harness.timed(lambda: children.append(table.fork()))
    children[0].release()
    found["release"] = harness.timed(table.release)
    return found


def measure(sizes: Iterable[int], repetitions: int, rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds per block of every operation: for each pool, `repetitions` means over `rounds` rounds."""
    rows: list[dict[str, Any]] = []
    pools = [(size, used, pool(size, used=used)) for used in (False, True) for size in sizes]
    times: list[list[dict[str, float]]] = [[] for _ in pools]
    for _ in range(repetitions):
        for (_, _, allocator), pool_times in zip(pools, times, strict=True):
            found = [time_round(allocator) for _ in range(rounds)]
            pool_times.append({name: 1e9 * fmean(one[name] for one in found) / BLOCKS for name in OPERATIONS})
    for (size, used, _), pool_times in zip(pools, times, strict=True):
        figures = {name: harness.summary([one[name] for one in pool_times]) for name in OPERATIONS}
        rows.append({"num_blocks": size, "used": used, "ns_per_block": figures})
    return rows


def main() -> None:
    """Print the median of each operation for each pool."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=50, help="rounds in a repetition (default: 50)")
    options.add_argument(
        "--num-blocks",
        type=int,
        nargs="+",
        default=[1_000, 10_000, 100_000, 1_000_000],
        help=f"pool sizes, each at least {BLOCKS}",
    )
    args = options.parse_args()
    if min(args.num_blocks) < BLOCKS:
        options.error(f"--num-blocks {min(args.num_blocks)}: a round needs at least {BLOCKS} blocks")
    rows = measure(args.num_blocks, args.repetitions, args.rounds)
    lines = [f"{'ns/block, pool size':>21}" + "".join(f"{name:>15}" for name in OPERATIONS)]
    for row in rows:
        medians = [row["ns_per_block"][name]["median"] for name in OPERATIONS]
        kind = "used" if row["used"] else "new"
        lines.append(f"{row['num_blocks']:>16,} {kind:4}" + "".join(f"{median:>15.0f}" for median in medians))
    result = {"benchmark": "blocks", "blocks_a_round": BLOCKS, "rounds": args.rounds, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


def _each(operation: Callable[[int], None], blocks: Iterable[int]) -> None:
    for block in blocks:
        operation(block)


if __name__ == "__main__":
    main()
