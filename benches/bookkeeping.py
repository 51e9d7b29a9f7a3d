"""What does bookkeeping cost in a decode step, from 1 to 256 requests that run?

Two batch managers take the same requests and get the same tokens, in turns: one with the embedded model, in
an engine that samples; one without a model, which does all of a step but the computing: admission, pages,
budget, prefix cache, forks, commit. "arrays" is the packing of positions, slots and tables for the model,
measured apart. Their sum is to stay under 5% of the engine's step.

Expected: 4 us for each running request and step, 0.2% or so at any number. Found: ten times as much, as a
dozen small functions look at each sequence, and still 0.4 to 1.0% of the step.
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
    """Medians of `steps` decode steps with so many requests running."""
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
        began = perf_counter()
        outputs = {output.seq_id: output.token for output in core.step()}
        stepped = perf_counter()
        plain.process_batch()
        plain.commit(outputs)
        kept = perf_counter()
        pack_batch(
            [Span(s.table, s.num_computed - 1, s.num_computed) for s in plain.running if s.num_computed]
        )
        packed = perf_counter()
        if len(outputs) == num_running:
            for name, seconds in zip(samples, (stepped - began, kept - stepped, packed - kept), strict=True):
                samples[name].append(seconds)
    medians = {name: harness.summary(times)["median"] for name, times in samples.items()}
    share = (medians["bookkeeping"] + medians["arrays"]) / medians["step"]
    return {"running": num_running, **{f"{name}_s": value for name, value in medians.items()}, "share": share}


def main() -> None:
    """Print the share of bookkeeping for each number of running requests."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--running", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="requests at once"
    )
    options.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default: 64)")
    options.add_argument("--steps", type=int, default=32, help="decode steps to time (default: 32)")
    args = options.parse_args()
    model = load_model(None).model
    rows = [measure(model, running, args.prompt, args.steps) for running in args.running]
    text = "\n".join(
        f"{row['running']:>4} running: step {row['step_s'] * 1e3:8.2f} ms, bookkeeping "
        f"{row['bookkeeping_s'] * 1e6:7.0f} us, arrays {row['arrays_s'] * 1e6:6.0f} us: {row['share']:.2%}"
        for row in rows
    )
    harness.show(
        {"benchmark": "bookkeeping", "prompt": args.prompt, "rows": rows}, as_json=args.json, text=text
    )


if __name__ == "__main__":
    main()
