"""What does bookkeeping cost in a decode step, with 1 to 256 running requests?

Two batch managers get the same requests and the same tokens, step by step. One has the embedded model and
runs in an engine that samples. The other has no model and does everything else of a step ("bookkeeping"):
admission, block tables, token budget, prefix cache, forks, commit. "arrays" is the packing of positions,
slots and tables for the model, measured separately. Goal: both together under 5% of the engine's step.

Then, without a model and with thousands of waiting requests: the time to queue one request, to run one step
and read the statistics, and to cancel one request.

Expected: 4 us for each running request and step, about 0.2% for any number of requests. Measured: ten times
as much, because a dozen small functions look at each sequence, but still only 0.4 to 1.0% of the step. A
waiting request costs the same among 1,000 others and among 16,000, and steps do not become slower.
"""

from time import perf_counter
from typing import Any

from tiny_llm.loader import load_model
from tiny_llm.managers import make_manager, without_model
from tiny_llm.model import Model
from tiny_llm.paged_kernel import Span, pack_batch

import harness
from tiny_llm import EngineConfig, EngineCore, SamplingParams


def measure(model: Model, num_running: int, prompt: int, steps: int) -> dict[str, Any]:
    """Medians over `steps` decode steps with `num_running` running requests."""
    longest = prompt + 2 * steps + num_running
    config = EngineConfig(
        num_blocks=num_running * (longest // 16 + 1),
        max_num_seqs=num_running,
        max_num_batched_tokens=max(512, num_running),
        max_model_len=longest,
    )
    core = EngineCore(make_manager(config, model), ())
    plain = without_model(config, model.config)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(num_running):
        tokens = [3 + (7 * i + j) % 400 for j in range(prompt)]
        core.add_request(str(i), tokens, params)
        plain.add_request(tokens, str(i), params)
    samples: dict[str, list[float]] = {"step": [], "bookkeeping": [], "arrays": []}
    while len(samples["step"]) < steps:
        started = perf_counter()
        outputs = {output.seq_id: output.token for output in core.step()}
        stepped = perf_counter()
        plain.process_batch()
        plain.commit(outputs)
        booked = perf_counter()
        pack_batch(
            [Span(s.table, s.num_computed - 1, s.num_computed) for s in plain.running if s.num_computed]
        )
        packed = perf_counter()
        if len(outputs) == num_running:
            for name, seconds in zip(
                samples, (stepped - started, booked - stepped, packed - booked), strict=True
            ):
                samples[name].append(seconds)
    medians = {name: harness.summary(times)["median"] for name, times in samples.items()}
    share = (medians["bookkeeping"] + medians["arrays"]) / medians["step"]
    return {"running": num_running, **{f"{name}_s": value for name, value in medians.items()}, "share": share}


def measure_waiting(model: Model, num_waiting: int, steps: int) -> dict[str, Any]:
    """Seconds to queue and to cancel a request, and the median step, with `num_waiting` requests queued."""
    config = EngineConfig(num_blocks=64, max_num_seqs=8, max_model_len=256)
    core = EngineCore(without_model(config, model.config), ())
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    names = [str(number) for number in range(num_waiting)]
    started = perf_counter()
    for name in names:
        core.add_request(name, [5, 6, 7], params)
    queued, samples = perf_counter(), []
    for _ in range(steps):
        before = perf_counter()
        core.manager.process_batch()
        core.manager.commit({sequence.seq_id: 5 for sequence in core.manager.running})
        assert core.stats.num_waiting == num_waiting - 8
        samples.append(perf_counter() - before)
    stepped = perf_counter()
    for name in names:
        core.cancel(name)
    cancelled = perf_counter()
    return {
        "waiting": num_waiting,
        "queue_s": (queued - started) / num_waiting,
        "step_s": harness.summary(samples)["median"],
        "cancel_s": (cancelled - stepped) / num_waiting,
    }


def main() -> None:
    """Print the share of bookkeeping for each number of running requests, then the cost of waiting ones."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--running", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="numbers of running requests"
    )
    options.add_argument(
        "--waiting",
        type=int,
        nargs="+",
        default=[1000, 16000],
        help="numbers of queued requests, more than 8",
    )
    options.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default: 64)")
    options.add_argument("--steps", type=int, default=32, help="decode steps to time (default: 32)")
    args = options.parse_args()
    model = load_model(None).model
    rows = [measure(model, running, args.prompt, args.steps) for running in args.running]
    waiting = [measure_waiting(model, waiting, args.steps) for waiting in args.waiting]
    text = "\n".join(
        f"{row['running']:>4} running: step {row['step_s'] * 1e3:8.2f} ms, bookkeeping "
        f"{row['bookkeeping_s'] * 1e6:7.0f} us, arrays {row['arrays_s'] * 1e6:6.0f} us: "
        f"{row['share']:.2%} of the step"
        for row in rows
    )
    text += "".join(
        f"\n{row['waiting']:>6} waiting: queue {row['queue_s'] * 1e6:6.1f} us, "
        f"step {row['step_s'] * 1e6:6.0f} us, cancel {row['cancel_s'] * 1e6:6.1f} us"
        for row in waiting
    )
    harness.show(
        {"benchmark": "bookkeeping", "prompt": args.prompt, "rows": rows, "waiting": waiting},
        as_json=args.json,
        text=text,
    )


if __name__ == "__main__":
    main()
