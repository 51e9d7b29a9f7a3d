"""What does HTTP cost, and how do servers compare, with 1, 16 and 64 clients?

The same jobs (random prompts of 48 to 144 tokens, 32 to 96 tokens out), in interleaved rounds:

    engine      the engine in this process; each client is a coroutine that reads `Engine.generate`
    tiny-llm    `tiny-llm serve` in its own process, with the client of `tiny-llm bench serve`
    others      the servers of vLLM and llama.cpp, the same model in their own processes, same client

Client and server share the processor. The cost of HTTP is 1 minus the ratio of tiny-llm's throughput to the
engine's, round by round. "HTTP ms" is the processor time of the server's event loop for each token; the
engine, which has its own threads, is not in it. On Linux only.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import harness
import tiny_llm_kernels
from servers import RunningServer, ServerError, other_servers, random_load, run_server, tiny_llm_server
from tiny_llm import LLM, SamplingParams
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_cli.bench_serve import measure_server
from tiny_llm_cli.serve_load import Answer, Ask, ServeRun, put_load

REQUESTS = {1: 8, 16: 48, 64: 96}  # by number of clients
SLOTS = 64
Figures = dict[str, Any]
SHOWN = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms")
HTTP = "http_ms_per_token"


def engine_client(llm: LLM) -> Ask:
    """A client that calls the engine directly."""

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


def server_client(running: RunningServer) -> Callable[[ServeRun], Figures]:
    """A client of a server over HTTP."""

    def measure(run: ServeRun) -> Figures:
        before = running.main_thread_seconds
        figures = measure_server(run._replace(base_url=running.url), ignore_progress)
        after = running.main_thread_seconds
        if running.name != "tiny-llm" or before is None or after is None:
            return figures
        return {**figures, HTTP: 1e3 * (after - before) / int(str(figures["total_output_tokens"]))}

    return measure


def one_round(engines: dict[str, Callable[[ServeRun], Figures]], seed: int) -> dict[int, dict[str, Figures]]:
    """Figures by number of clients and engine; for each number all engines run, in random order."""
    numbers = random.Random(seed)
    return {
        clients: {
            name: engines[name](random_load("", clients, REQUESTS[clients], seed))
            for name in numbers.sample([*engines], len(engines))
        }
        for clients in REQUESTS
    }


def compare(engines: dict[str, Callable[[ServeRun], Figures]], repetitions: int) -> dict[str, Any]:
    """Medians of all rounds except the first, and our server's throughput over each engine's."""
    rounds = []
    for seed in range(repetitions + 1):
        harness.print_progress(f"round {seed} of {repetitions}" if seed else "warm-up round")
        rounds.append(one_round(engines, seed))
    rounds = rounds[1:]
    rows: dict[str, Any] = {}
    for clients in REQUESTS:
        of_clients = [one[clients] for one in rounds]
        rows[str(clients)] = {
            name: {
                **{figure: harness.summary([one[name][figure] for one in of_clients]) for figure in SHOWN},
                "failed": sum(one[name]["failed"] for one in of_clients),
                HTTP: harness.summary([one[name][HTTP] for one in of_clients])
                if HTTP in of_clients[0][name]
                else None,
                "ours_over_it": harness.summary(
                    [one["tiny-llm"][SHOWN[0]] / one[name][SHOWN[0]] for one in of_clients]
                ),
            }
            for name in engines
        }
    return rows


def as_text(rows: dict[str, Any], left_out: dict[str, str]) -> str:
    """One line for each engine and number of clients."""
    titles = ("tok/s", "TTFT ms", "p99 ms", "TPOT ms", "ITL ms", "p99 ms")
    heads = "".join(f"{title:>10}" for title in titles)
    lines = [f"{'clients':8}{'':14}{heads}   tiny-llm serve / this server: median (min to max)"]
    for clients, engines in rows.items():
        for name, row in engines.items():
            figures = "".join(f"{row[figure]['median']:>10.1f}" for figure in SHOWN)
            over = row["ours_over_it"]
            ratio = f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})"
            http = f"; HTTP ms {row[HTTP]['median']:.3f}" if row[HTTP] else ""
            failed = f", {row['failed']} requests failed" if row["failed"] else ""
            lines.append(f"{clients:8}{name:14}{figures}   {ratio}{http}{failed}")
    return "\n".join(lines + [f"left out: {name}: {why}" for name, why in left_out.items()])


def main() -> None:
    """Start the installed servers, measure them in interleaved rounds, and print which are left out."""
    args = harness.peers_parser(__doc__ or "").parse_args()
    model, threads = embedded_model_path(), tiny_llm_kernels.num_threads()
    llm = LLM(model, max_num_seqs=SLOTS)
    left_out: dict[str, str] = {}
    engines: dict[str, Callable[[ServeRun], Figures]] = {
        "engine": lambda run: asyncio.run(put_load(engine_client(llm), run, ignore_progress))
    }
    with ExitStack() as stack:
        for server in (tiny_llm_server(), *other_servers(args.peers.absolute(), args.llama_server, SLOTS)):
            harness.print_progress(f"starting {server.name}")
            try:
                if (why := server.why_missing()) is not None:
                    raise ServerError(why)
                engines[server.name] = server_client(stack.enter_context(run_server(server, model, threads)))
            except ServerError as error:
                left_out[server.name] = str(error)
        rows = compare(engines, args.repetitions)
    result = {"benchmark": "serving", "rows": rows, "left_out": left_out}
    harness.show(result, as_json=args.json, text=as_text(rows, left_out))


def ignore_progress(*_: object) -> None:
    """Ignore progress inside a round."""


if __name__ == "__main__":
    main()
