"""What does structured output cost? A step of requests with a form and without, and the mask of one token.

`--requests` requests on the embedded model at temperature 1. The first figure is the median time of a decode
step: without a form, in the form of a JSON schema, and of an expression that allows any text. Each case
has its own engine; the engines alternate step by step. The second figure is the time in which a request's
grammar computes a mask and moves past a token, without the model.
"""

from functools import partial
from statistics import median
from typing import Any

import harness
from tiny_llm import LLM, SamplingParams, StructuredOutputsParams

PROMPT = 32  # tokens
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "kind": {"enum": ["person", "place", "thing"]},
        "size": {"type": "number", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "kind", "size", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any] | None] = {
    "no form": None,
    "JSON schema": {"json": {"type": "array", "items": RECORD, "minItems": 10_000}},
    "any text, by regex": {"regex": "(?s:.*)"},
}


class Batch:
    """An engine whose requests all decode in the same form."""

    def __init__(self, requests: int, steps: int, form: dict[str, Any] | None) -> None:
        self.llm = LLM(max_num_seqs=requests, num_blocks=requests * 32, enable_prefix_caching=False)
        self.params = SamplingParams(
            temperature=1.0, max_tokens=steps + 8, ignore_eos=True, seed=0, structured_outputs=form
        )
        for i in range(requests):
            tokens = [1000 + (37 * j + 101 * i) % 30_000 for j in range(PROMPT)]
            request = self.llm.engine.request(tokens, self.params, str(i))
            self.llm.engine.call(partial(request.begin, self.llm.core))
        while any(s.num_computed < PROMPT for s in self._running()) or len(self._running()) < requests:
            self.step()
        self.step()

    def step(self) -> float:
        """Run one step and return its seconds."""
        return float(self.llm.engine.call(partial(harness.timed, self.llm.core.step)))

    def mask_times(self) -> list[float]:
        """Seconds for each output token: the mask, and accepting the token. Empty without a form."""
        form, compiler = self.params.structured_outputs, self.llm.engine._grammars
        if not isinstance(form, StructuredOutputsParams) or compiler is None:
            return []
        times = []
        for sequence in self._running():
            grammar = compiler.compile(form)
            for token in sequence.outputs:
                times.append(harness.timed(grammar.allowed) + harness.timed(partial(grammar.accept, token)))
        return times

    def _running(self) -> list[Any]:
        return list(self.llm.engine.call(lambda: [*self.llm.core.manager.running]))


def main() -> None:
    """Print the median step, the throughput and the time of a mask, for each form."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=100)
    options.add_argument(
        "--requests", type=harness.positive, default=16, help="requests at a time (default: 16)"
    )
    args = options.parse_args()
    batches = {name: Batch(args.requests, args.repetitions, form) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(args.repetitions):
        for name, batch in batches.items():
            times[name].append(batch.step())
    masks = {name: batch.mask_times() for name, batch in batches.items()}
    rows = [
        {
            "form": name,
            "step": harness.summary(steps),
            "mask": harness.summary(masks[name]) if masks[name] else None,
        }
        for name, steps in times.items()
    ]
    lines = [f"{'':22}{'step':>11}{'tok/s':>8}{'mask of a token':>18}{'largest':>11}"]
    for name, steps in times.items():
        line = f"{name:22}{median(steps) * 1e3:>8.1f} ms{args.requests / median(steps):>8.0f}"
        if masks[name]:
            line += f"{median(masks[name]) * 1e6:>15.0f} µs{max(masks[name]) * 1e3:>8.2f} ms"
        lines.append(line)
    result = {"benchmark": "structured", "requests": args.requests, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
