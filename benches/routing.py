"""What does routing by cached prefixes gain, with 2 to 500 replicas? Simulated.

Four traces on simulated fleets, with each routing policy. The scheduler, the prefix cache and the router are
the real ones; a step's time comes from `pdm run bench step_times`. Each replica has the default pool of the
embedded model, 1,456 blocks of 16 tokens. There are 4 system prompts of 512 to 1,024 tokens for each replica.

    shared     single requests; each begins with a system prompt, some of which are used much more (Zipf)
    chats      2 to 6 turns, each after 4 seconds of thinking, with a system prompt
    bursts     as shared, but all requests arrive in 2 of each 8 seconds
    unrelated  single requests of the same length that have nothing in common

Requests arrive at `--load` times the rate at which the fleet could compute them without any hit. A row is the
median over `--repetitions` seeds.

Expected: with 2 replicas little, because both have all system prompts after a short time. With 32 replicas
the prefix policy finds nearly all system prompts and round robin few, so that the time to the first token is
half or less. On unrelated prompts the same as least-loaded, and fewer slow requests than round robin.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import harness
from tiny_llm_routing.fleet import Fleet
from tiny_llm_routing.policies import POLICIES, SEQUENCE_COST, PrefixAware, RoutingPolicy
from tiny_llm_routing.prompt_blocks import PromptBlocks
from tiny_llm_routing.served import summarize
from tiny_llm_routing.simulator import FleetOptions, Simulator
from tiny_llm_routing.step_time import StepTime, StepWork
from tiny_llm_routing.traces import TRACES, Sizes, Trace

STEP_TIME = StepTime(base=0.0039, prefill_row=0.0013, decode_row=0.0016, attended=1.7e-6)
SYSTEMS_PER_REPLICA = 4
TURNS = 4  # mean turns of a chat, whose requests are fewer conversations
Figures = dict[str, float]


class Timed:
    """A policy, and how long its decisions take."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self.seconds: list[float] = []

    def rank(self, blocks: PromptBlocks, fleet: Fleet, now: float) -> list[str]:
        """Return the policy's ranking."""
        start = perf_counter()
        ranked = self._policy.rank(blocks, fleet, now)
        self.seconds.append(perf_counter() - start)
        return ranked


def make_trace(name: str, replicas: int, requests: int, load: float, seed: int) -> Trace:
    """Return a trace of about `requests` requests for each replica."""
    sizes = Sizes(num_systems=SYSTEMS_PER_REPLICA * replicas)
    count = replicas * requests // (TURNS if name == "chats" else 1)
    seconds = seconds_without_hits(TRACES[name](200, 1.0, seed, sizes))
    return TRACES[name](count, load * replicas / seconds, seed, sizes)


def seconds_without_hits(trace: Trace) -> float:
    """The time that one replica computes for a conversation if nothing is cached, with 8 at a time."""
    seconds = 0.0
    for conversation in trace.conversations:
        prompt = len(conversation.system)
        for turn in conversation.turns:
            prompt += len(turn.text)
            decodes = StepWork(0, turn.num_outputs, turn.num_outputs * prompt)
            seconds += turn.num_outputs * STEP_TIME.base / 8
            seconds += STEP_TIME.seconds(StepWork.of([(0, prompt)])) + STEP_TIME.seconds(decodes)
            prompt += turn.num_outputs
    return seconds / len(trace.conversations)


def simulate(trace: Trace, make_policy: Callable[[], RoutingPolicy], replicas: int, routers: int) -> Figures:
    """The figures of one run."""
    policies: list[Timed] = []

    def make_timed() -> Timed:
        policies.append(Timed(make_policy()))
        return policies[-1]

    served = Simulator(trace, make_timed, FleetOptions(replicas, STEP_TIME, num_routers=routers)).run()
    seconds = [one for policy in policies for one in policy.seconds]
    return {**asdict(summarize(served, replicas)), "us_per_decision": 1e6 * median(seconds)}


def compare(
    policies: dict[str, Callable[[], RoutingPolicy]], options: Any, names: list[str]
) -> list[dict[str, Any]]:
    """One row for each trace, number of replicas and policy: the medians over the seeds."""
    rows = []
    for name in names:
        for replicas in options.replicas:
            harness.print_progress(f"{name}, {replicas} replicas")
            runs: dict[str, list[Figures]] = {policy: [] for policy in policies}
            for seed in range(options.repetitions):
                trace = make_trace(name, replicas, options.requests, options.load, seed)
                for policy, make_policy in policies.items():
                    runs[policy].append(simulate(trace, make_policy, replicas, options.routers))
            for policy, figures in runs.items():
                medians = {key: median(one[key] for one in figures) for key in figures[0]}
                rows.append({"trace": name, "replicas": replicas, "policy": policy, **medians})
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """One line for each row."""
    lines = [
        f"{'trace':11}{'replicas':>8}  {'policy':14}{'hit rate':>8}{'TTFT p50':>10}{'p99, s':>8}"
        f"{'tok/s':>9}{'max/mean':>10}{'us':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row['trace']:11}{row['replicas']:>8}  {row['policy']:14}{row['hit_rate']:>8.1%}"
            f"{row['ttft_p50']:>10.2f}{row['ttft_p99']:>8.2f}{row['throughput']:>9.0f}"
            f"{row['imbalance']:>10.2f}{row['us_per_decision']:>7.0f}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw a column of panels for each trace: hit rate, TTFT and throughput by the number of replicas."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tiny-llm", "svg.fonttype": "none"})
    from matplotlib import pyplot

    panels = {
        "hit_rate": "hit rate",
        "ttft_p50": "TTFT, median, s",
        "ttft_p99": "TTFT, 99%, s",
        "throughput": "tokens/s per replica",
    }
    colors = {"prefix": "#3b6ea8", "least-loaded": "#d08a2e", "round-robin": "#909090"}
    names = [*dict.fromkeys(row["trace"] for row in rows)]
    figure, axes = pyplot.subplots(
        len(panels), len(names), figsize=(2.7 * len(names), 7.6), layout="constrained", squeeze=False
    )
    for column, name in enumerate(names):
        for line, (key, label) in enumerate(panels.items()):
            axis = axes[line][column]
            for policy in POLICIES:
                chosen = [row for row in rows if row["trace"] == name and row["policy"] == policy]
                values = [row[key] / (row["replicas"] if key == "throughput" else 1) for row in chosen]
                replicas = [row["replicas"] for row in chosen]
                axis.plot(replicas, values, marker="o", markersize=3, color=colors[policy], label=policy)
            axis.set_xscale("log")
            axis.set_xticks(replicas, [str(number) for number in replicas])
            axis.minorticks_off()
            axis.set_ylim(0, 1 if key == "hit_rate" else None)
            axis.tick_params(labelsize=8)
            if line == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(label, fontsize=9)
        axes[-1][column].set_xlabel("replicas", fontsize=9)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Simulate every trace, number of replicas and policy, or a recorded trace."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=1)
    options.add_argument("--replicas", type=harness.positive, nargs="+", default=[2, 8, 32])
    options.add_argument(
        "--requests", type=harness.positive, default=40, help="for each replica (default: %(default)s)"
    )
    options.add_argument(
        "--load", type=float, default=0.9, help="share of the capacity without hits (default: %(default)s)"
    )
    options.add_argument(
        "--routers",
        type=harness.positive,
        default=1,
        help="routers that know only their own requests (default: %(default)s)",
    )
    options.add_argument("--traces", nargs="+", choices=[*TRACES], default=[*TRACES])
    options.add_argument(
        "--sequence-costs",
        type=int,
        nargs="+",
        help=f"compare costs of an unfinished sequence, in tokens (the policy's: {SEQUENCE_COST})",
    )
    options.add_argument("--plot", type=Path, help="also draw a plot: .svg or .png file")
    args = options.parse_args()
    if args.plot and (args.plot.suffix not in (".svg", ".png") or not args.plot.absolute().parent.is_dir()):
        options.error(f"--plot {args.plot}: give a .svg or .png file in an existing folder")
    if args.load <= 0:
        options.error(f"--load {args.load}: must be more than 0")
    policies: dict[str, Callable[[], RoutingPolicy]] = POLICIES
    if args.sequence_costs:
        policies = {f"prefix, {cost}": partial(PrefixAware, cost) for cost in args.sequence_costs}
    rows = compare(policies, args, args.traces)
    if args.plot:
        draw(rows, args.plot)
    show = {
        "benchmark": "routing",
        "step_time": STEP_TIME._asdict(),
        "load": args.load,
        "routers": args.routers,
    }
    harness.show({**show, "rows": rows}, as_json=args.json, text=as_text(rows))


if __name__ == "__main__":
    main()
