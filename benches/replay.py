"""Does the simulator predict what real replicas do? One trace on both: hit rates and times.

A trace of `tiny_llm_routing.traces` is replayed on the embedded model in real time, and simulated. Both have
the same requests, arrivals and pools; only the answers differ, which are as long. With `--replicas 2` or more
the replicas run under Ray Serve (the group cluster) and share the kernels' threads. The time of a step is
fitted to `--fit` seconds of steps of this machine, recorded just before, with the threads of one replica.

Expected: equal hit rates, because the scheduler and the cache are the same code; only requests that arrive
while a prefix is computed can differ. Times within 20%: the fit's error, and the machine's noise.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any, NamedTuple, Self

from tiny_llm.delivery import AsyncListener, Gathering
from tiny_llm.kernels import compiled_available, compiled_kernel
from tiny_llm.loader import load_model
from tiny_llm.managers import make_manager

import harness
from step_times import record
from tiny_llm import LLM, EngineConfig, EngineCore, SamplingParams, kernel_info
from tiny_llm_routing.policies import POLICIES
from tiny_llm_routing.served import Served, summarize
from tiny_llm_routing.simulated_replica import ReplicaSizes
from tiny_llm_routing.simulator import FleetOptions, Simulator
from tiny_llm_routing.step_time import StepTime
from tiny_llm_routing.traces import TRACES, Sizes, Trace

SIZES = Sizes(num_systems=6, system=(128, 512), text=(16, 64), outputs=(8, 32), think_seconds=2.0)


class Piece(NamedTuple):
    """Some new tokens of an answer; num_cached_tokens, replica: with the last one."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    replica: str = ""


Ask = Callable[[list[int], int, str], AsyncIterator[Piece]]  # of a prompt, an output length and a salt


async def replay(trace: Trace, ask: Ask) -> list[Served]:
    """Send a trace's requests at their times, to whatever answers them; return what was measured.

    The next turn of a conversation contains the answers that came.
    """
    served: list[Served] = []
    start = perf_counter()

    async def converse(index: int) -> None:
        conversation = trace.conversations[index]
        tokens = [*conversation.system]
        await asyncio.sleep(start + conversation.arrival - perf_counter())
        for number, turn in enumerate(conversation.turns):
            await asyncio.sleep(turn.think_seconds)
            tokens += turn.text
            answer: list[int] = []
            arrival, first = perf_counter() - start, 0.0
            async for piece in ask(tokens, turn.num_outputs, conversation.salt):
                if piece.token_ids and not answer:
                    first = perf_counter() - start
                answer += piece.token_ids
            end = perf_counter() - start
            served.append(
                Served(
                    request_id=f"{index}.{number}",
                    replica=piece.replica,
                    arrival=arrival,
                    first_token=first,
                    end=end,
                    num_prompt_tokens=len(tokens),
                    num_cached_tokens=piece.num_cached_tokens,
                    num_outputs=len(answer),
                )
            )
            tokens += answer

    await asyncio.gather(*(converse(index) for index in range(len(trace.conversations))))
    return served


def ask_engine(llm: LLM) -> Ask:
    """Ask the engine in this process."""

    async def ask(prompt: list[int], num_outputs: int, salt: str) -> AsyncIterator[Piece]:
        params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True, cache_salt=salt)
        async for event in llm.engine.generate(prompt, params):
            cached = event.usage.num_cached_tokens if event.usage is not None else 0
            yield Piece(event.token_ids, cached, "replica-0")

    return ask


class NotedStream:
    """A replica's answers to a call; notes which replica has accepted it."""

    def __init__(self, stream: Any, call_id: str, replica_of: dict[str, str]) -> None:
        self._stream = stream
        self._call_id = call_id
        self._replica_of = replica_of

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        answer = await anext(self._stream)
        if self._call_id not in self._replica_of:
            self._replica_of[self._call_id] = answer.replica
        return answer

    def cancel(self) -> None:
        """Cancel the call."""
        self._stream.cancel()


class NotedReplicas:
    """Replicas of whose calls it is noted which replica has accepted them. replica_of: filled by call id."""

    def __init__(self, replicas: Any, replica_of: dict[str, str]) -> None:
        self._replicas = replicas
        self._replica_of = replica_of

    def send(self, call: Any) -> NotedStream:
        """Send a call to a replica that the router chooses."""
        return NotedStream(self._replicas.send(call), call.call_id, self._replica_of)

    def open_stream(self, request: Any) -> Any:
        """Open a shared stream of a replica."""
        return self._replicas.open_stream(request)


def ask_replicas(engine: Any, replica_of: dict[str, str]) -> Ask:
    """Ask replicas under Ray Serve. replica_of: has each request's replica once it is accepted."""

    async def ask(prompt: list[int], num_outputs: int, salt: str) -> AsyncIterator[Piece]:
        params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True, cache_salt=salt)
        request = engine.request(prompt, params)
        listener, gathering = AsyncListener(), Gathering([request])
        await asyncio.wrap_future(engine.submit([request], listener))
        while gathering.unfinished:
            for event in gathering.take(await listener.next_items()):
                cached = event.usage.num_cached_tokens if event.usage is not None else 0
                yield Piece(event.token_ids, cached, replica_of[request.request_id])
            gathering.check()

    return ask


def replay_on_replicas(trace: Trace, num_replicas: int, threads: int, policy: str) -> list[Served]:
    """Replay a trace on replicas of this machine."""
    from tiny_llm_cluster.application import start_ray_here, start_replicas, stop_here
    from tiny_llm_cluster.config import ClusterConfig
    from tiny_llm_cluster.remote_model import RemoteModel

    config = ClusterConfig(num_replicas=num_replicas, threads=threads, routing_policy=policy)
    replica_of: dict[str, str] = {}
    start_ray_here(config)
    try:
        replicas = start_replicas({}, config)
        engine = RemoteModel({}, NotedReplicas(replicas, replica_of), replicas.routing).engine
        return asyncio.run(replay(trace, ask_replicas(engine, replica_of)))
    finally:
        stop_here()


def fit(seconds: float, threads: int | None) -> StepTime:
    """Fit the time of a step to steps of this machine, with this many threads."""
    if threads is not None and compiled_available():
        compiled_kernel("set_num_threads")(threads)
    core = EngineCore(make_manager(EngineConfig(), load_model(None).model), ())
    numbers = random.Random(0)
    record(core, numbers, 2, 1.0)  # warms up
    return StepTime.fit(
        [step for running in (1, 2, 4, 8) for step in record(core, numbers, running, seconds)]
    )


def main() -> None:
    """Fit, replay, simulate, and print both."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--trace", choices=[*TRACES], default="chats")
    options.add_argument("--conversations", type=harness.positive, default=12)
    options.add_argument("--rate", type=float, default=0.3, help="conversations per second (default: 0.3)")
    options.add_argument("--fit", type=harness.positive, default=8, help="seconds for each of 4 loads")
    options.add_argument(
        "--replicas", type=harness.positive, default=1, help="real and simulated (default: 1)"
    )
    options.add_argument(
        "--policy", choices=[*POLICIES], default="prefix", help="of routing (default: prefix)"
    )
    args = options.parse_args()
    count = args.replicas
    threads = None if count == 1 else max(1, (kernel_info().num_threads or 1) // count)
    step_time = fit(args.fit, threads)
    trace = TRACES[args.trace](args.conversations, args.rate, 0, SIZES)
    config = EngineConfig()
    with LLM() as llm:
        num_blocks = llm.engine.stats.num_blocks
        if threads is None:
            real = asyncio.run(replay(trace, ask_engine(llm)))
    if threads is not None:
        real = replay_on_replicas(trace, count, threads, args.policy)
    sizes = ReplicaSizes(num_blocks, config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
    simulated = Simulator(
        trace, POLICIES[args.policy], FleetOptions(count, step_time, sizes, network_delay=0.0)
    ).run()
    rows: dict[str, dict[str, Any]] = {
        name: asdict(summarize(served, count)) for name, served in (("real", real), ("simulated", simulated))
    }
    cached = {one.request_id: one.num_cached_tokens for one in real}
    different = sum(cached[one.request_id] != one.num_cached_tokens for one in simulated)
    lines = [f"{'':11}{'requests':>9}{'hit rate':>10}{'TTFT p50':>10}{'p99':>8}{'latency':>9}{'tok/s':>8}"]
    for name, row in rows.items():
        lines.append(
            f"{name:11}{row['num_requests']:>9}{row['hit_rate']:>10.1%}{row['ttft_p50']:>10.3f}"
            f"{row['ttft_p99']:>8.3f}{row['latency_p50']:>9.3f}{row['throughput']:>8.1f}"
        )
    lines.append(f"requests with another number of cached tokens: {different}")
    result = {
        "benchmark": "replay",
        "trace": trace.name,
        "replicas": count,
        "policy": args.policy,
        "rows": rows,
        "different": different,
    }
    harness.show({**result, "step_time": step_time._asdict()}, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
