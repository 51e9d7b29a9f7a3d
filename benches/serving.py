"""What does HTTP cost, and how do servers compare, at 1, 16 and 64 clients?

The same jobs (random prompts of 48 to 144 tokens, 32 to 96 out), in turns:

    engine      this engine in this process, each client a coroutine that reads `Engine.generate`
    tiny-llm    `tiny-llm serve` in a process of its own, asked as `tiny-llm bench serve` asks
    others      vLLM and llama.cpp's servers, the same model in processes of their own, asked the same way

Client and server share the processor, as they do wherever one machine has both. What HTTP costs is 1 less the
ratio of the second to the first, round by round.
"""

import asyncio
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import harness
import tiny_llm_kernels
from servers import ServerError, ours, peers, running, some_load
from tiny_llm import LLM, SamplingParams
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server
from tiny_llm_cli.serve_load import Answer, Ask, ServeRun, put_load

REQUESTS = {1: 8, 16: 48, 64: 96}  # by clients
SLOTS = 64
Figures = dict[str, Any]
SHOWN = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms")


def of_engine(llm: LLM) -> Ask:
    """Asks the engine itself."""

    async def ask(job: dict[str, Any]) -> Answer:
        params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
        answer = Answer()
        async for event in llm.engine.generate(job["prompt"], params):
            answer.moments.append(perf_counter())
            if event.usage is not None:
                answer.prompt_tokens = event.usage.prompt_tokens
                answer.output_tokens = event.usage.completion_tokens
        return answer

    return ask


def one_round(engines: dict[str, Callable[[ServeRun], Figures]], seed: int) -> dict[int, dict[str, Figures]]:
    """The figures of every engine at each number of clients; in each all engines in turns."""
    numbers = random.Random(seed)
    return {
        clients: {
            name: engines[name](some_load("", clients, REQUESTS[clients], seed))
            for name in numbers.sample([*engines], len(engines))
        }
        for clients in REQUESTS
    }


def compare(engines: dict[str, Callable[[ServeRun], Figures]], repetitions: int) -> dict[str, Any]:
    """Medians of all rounds but the first, and our server's throughput over everybody else's."""
    rounds = []
    for seed in range(repetitions + 1):
        progress(f"round {seed} of {repetitions}" if seed else "a round that does not count")
        rounds.append(one_round(engines, seed))
    rounds = rounds[1:]
    rows: dict[str, Any] = {}
    for clients in REQUESTS:
        of_clients = [one[clients] for one in rounds]
        rows[str(clients)] = {
            name: {
                **{figure: harness.summary([one[name][figure] for one in of_clients]) for figure in SHOWN},
                "failed": sum(one[name]["failed"] for one in of_clients),
                "ours_over_it": harness.summary(
                    [one["tiny-llm"][SHOWN[0]] / one[name][SHOWN[0]] for one in of_clients]
                ),
            }
            for name in engines
        }
    return rows


def as_text(rows: dict[str, Any], left_out: dict[str, str]) -> str:
    """A line for each engine and number of clients."""
    titles = ("tok/s", "TTFT ms", "p99", "TPOT ms", "ITL ms", "p99")
    lines = [f"{'clients':8}{'':14}{''.join(f'{title:>10}' for title in titles)}   tiny-llm serve over it"]
    for clients, engines in rows.items():
        for name, row in engines.items():
            figures = "".join(f"{row[figure]['median']:>10.1f}" for figure in SHOWN)
            over = row["ours_over_it"]
            ratio = f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})"
            failed = f", {row['failed']} requests failed" if row["failed"] else ""
            lines.append(f"{clients:8}{name:14}{figures}   {ratio}{failed}")
    return "\n".join(lines + [f"left out: {name}: {why}" for name, why in left_out.items()])


def progress(text: str) -> None:
    """What is being done, on the error stream: a round takes minutes."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Start the servers that are there, measure them in turns, and say which are left out."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--peers", type=Path, default=Path(".peers"), help="folder of the others (default: .peers)"
    )
    options.add_argument("--llama-server", type=Path, help="llama.cpp's server (default: in --peers)")
    args = options.parse_args()
    model, threads = embedded_model_path(), tiny_llm_kernels.num_threads()
    llm = LLM(model, max_num_seqs=SLOTS)
    left_out: dict[str, str] = {}
    engines: dict[str, Callable[[ServeRun], Figures]] = {
        "engine": lambda run: asyncio.run(put_load(of_engine(llm), run, silent))
    }
    with ExitStack() as stack:
        for server in (ours(), *peers(args.peers.absolute(), args.llama_server, SLOTS)):
            progress(f"starting {server.name}")
            try:
                if (why := server.why_missing()) is not None:
                    raise ServerError(why)
                url = stack.enter_context(running(server, model, threads)).url
                engines[server.name] = lambda run, url=url: measure_server(run._replace(base_url=url), silent)  # type: ignore[misc]
            except ServerError as error:
                left_out[server.name] = str(error)
        rows = compare(engines, args.repetitions)
    result = {"benchmark": "serving", "rows": rows, "left_out": left_out}
    harness.show(result, as_json=args.json, text=as_text(rows, left_out))


def silent(*_: object) -> None:
    """A round's progress is enough."""


if __name__ == "__main__":
    main()
