"""How does the time of a decode step grow with the context and with the number of requests?

First one request with 128 to 8,160 tokens of context, then 1 to 64 requests of `--prompt` tokens each, on
the embedded model; medians of `--steps` steps. A step reads all keys and values of the context, so its time
is predicted as a straight line: through the shortest context, with the slope between the two longest. The
requests of a step share the weights that it reads, so one step for many requests takes much less time than
one step for each.
"""

from functools import partial
from statistics import median
from typing import Any

import harness
from tiny_llm import LLM, SamplingParams

CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8160]
MAX_MODEL_LEN = 8192  # the embedded model's; the longest prompt and the measured steps must fit
REQUESTS = [1, 2, 4, 8, 16, 32, 64]
SPARE = 8  # for steps that are not measured: prefill and one warm-up step
NUM_BLOCKS, BLOCK_SIZE = 1024, 16
LONGEST_PROMPT = NUM_BLOCKS * BLOCK_SIZE // max(REQUESTS) - 64


def step_seconds(llm: LLM, requests: int, prompt: int, steps: int) -> float:
    """Median seconds of a decode step with `requests` requests, each with `prompt` tokens of context."""
    params = SamplingParams(temperature=0, max_tokens=steps + SPARE, ignore_eos=True)
    call = llm.engine.call
    for i in range(requests):
        tokens = [1000 + (37 * j + 101 * i) % 30_000 for j in range(prompt)]
        call(partial(llm.core.add_request, f"{prompt} {requests} {i}", tokens, params))
    while any(sequence.num_computed < prompt for sequence in call(lambda: [*llm.core.manager.running])) or (
        call(lambda: llm.core.manager.waiting)
    ):
        call(llm.core.step)
    call(llm.core.step)
    times = [call(partial(harness.timed, llm.core.step)) for _ in range(steps)]
    while call(lambda: llm.core.has_work):
        call(llm.core.step)
    return median(times)


def main() -> None:
    """Print the step times by context and by number of requests."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--steps", type=harness.positive, default=24, help="decode steps for each row (default: 24)"
    )
    options.add_argument(
        "--prompt",
        type=harness.positive,
        default=128,
        help="prompt tokens in table 2 (default: 128)",
    )
    args = options.parse_args()
    max_steps = MAX_MODEL_LEN - max(CONTEXTS) - SPARE
    if args.steps > max_steps:
        options.error(f"--steps {args.steps}: at most {max_steps} fit after {max(CONTEXTS)} tokens")
    if args.prompt > LONGEST_PROMPT:
        options.error(
            f"--prompt {args.prompt}: at most {LONGEST_PROMPT}, so that {max(REQUESTS)} prompts fit the pool"
        )
    llm = LLM(
        max_num_seqs=max(REQUESTS),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
    )
    contexts: list[dict[str, Any]] = []
    for context in CONTEXTS:
        contexts.append({"context": context, "step_s": step_seconds(llm, 1, context, args.steps)})
    slope = (contexts[-1]["step_s"] - contexts[-2]["step_s"]) / (CONTEXTS[-1] - CONTEXTS[-2])
    for row in contexts:
        row["predicted_s"] = contexts[0]["step_s"] + slope * (row["context"] - CONTEXTS[0])
    many: list[dict[str, Any]] = []
    for count in REQUESTS:
        seconds = step_seconds(llm, count, args.prompt, args.steps)
        many.append({"requests": count, "step_s": seconds, "tokens_per_s": count / seconds})
    lines = [f"{'context':>9}{'step':>10}{'predicted':>12}"]
    lines += [
        f"{row['context']:>9}{row['step_s'] * 1e3:>7.2f} ms{row['predicted_s'] * 1e3:>9.2f} ms"
        for row in contexts
    ]
    lines += ["", f"{'requests':>9}{'step':>10}{'tok/s':>10}{'speedup':>9}"]
    lines += [
        f"{row['requests']:>9}{row['step_s'] * 1e3:>7.2f} ms{row['tokens_per_s']:>10.0f}"
        f"{row['tokens_per_s'] / many[0]['tokens_per_s']:>8.1f}x"
        for row in many
    ]
    result = {"benchmark": "growth", "contexts": contexts, "requests": many}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
