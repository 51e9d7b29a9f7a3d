"""What does sampling cost? The step time of requests that decode together, greedy and with temperature.

`--requests` requests on the embedded model. The figure is the median time of a decode step: greedy, at
temperature 1, and at temperature 1 with top_p 0.9, each with the compiled sampler and with its readable twin,
which sorts a row with MLX's operators. Each case has its own engine; the engines alternate step by step.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import tiny_llm.token_output as token_output  # noqa: PLR0402  (a type checker knows no module of the overlay)
from tiny_llm.sampler import sample_token

import harness
from tiny_llm import LLM, SamplingParams

PROMPT = 32  # tokens
WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
SAMPLERS = {"compiled": sample_token, "twin": sample_token.__wrapped__}


class Batch:
    """An engine whose requests all decode, with one kind of sampling and one of the samplers."""

    def __init__(self, requests: int, steps: int, how: dict[str, float], sampler: Callable[..., Any]) -> None:
        self.llm = LLM(max_num_seqs=requests, num_blocks=requests * 16, enable_prefix_caching=False)
        self._sampler = sampler
        params = SamplingParams(max_tokens=steps + 8, ignore_eos=True, seed=0, **how)  # type: ignore[arg-type]
        for i in range(requests):
            tokens = [1000 + (37 * j + 101 * i) % 30_000 for j in range(PROMPT)]
            self.llm.engine.call(partial(self.llm.core.add_request, str(i), tokens, params))
        while any(s.num_computed < PROMPT for s in self._running()) or len(self._running()) < requests:
            self.step()
        self.step()

    def step(self) -> float:
        """Run one step and return its seconds."""
        token_output.sample_token = self._sampler
        try:
            return float(self.llm.engine.call(partial(harness.timed, self.llm.core.step)))
        finally:
            token_output.sample_token = sample_token

    def _running(self) -> list[Any]:
        return list(self.llm.engine.call(lambda: [*self.llm.core.manager.running]))


def main() -> None:
    """Print the median step and the throughput of each kind of sampling and sampler."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=40)
    options.add_argument(
        "--requests", type=harness.positive, default=16, help="requests at a time (default: 16)"
    )
    args = options.parse_args()
    batches = {
        (way, name): Batch(args.requests, args.repetitions, how, sampler)
        for way, how in WAYS.items()
        for name, sampler in SAMPLERS.items()
    }
    times: dict[tuple[str, str], list[float]] = {which: [] for which in batches}
    for _ in range(args.repetitions):
        for which, batch in batches.items():
            times[which].append(batch.step())
    rows = [
        {"way": way, "sampler": name, **harness.summary(seconds)} for (way, name), seconds in times.items()
    ]
    lines = [f"{'':26}{'sampler':>10}{'step':>11}{'tok/s':>8}"]
    lines += [
        f"{way:26}{name:>10}{median(seconds) * 1e3:>8.1f} ms{args.requests / median(seconds):>8.0f}"
        for (way, name), seconds in times.items()
    ]
    result = {"benchmark": "sampling", "requests": args.requests, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
