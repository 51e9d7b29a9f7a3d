"""How much does an expensive sampling parameter of one request slow down other requests?

Two requests decode together: a plain one, the neighbour, and one with a field of `SamplingParams` at its
limit. The figure is the neighbour's median step time with the field, divided by its median step time without
it, with the same tokens. Each field is measured separately, in pairs (without, with), with one completion and
with `--completions`; penalties and logprobs also with a long prompt. `prompt_logprobs` are measured during
prefill. Beam search is compared with as many plain completions.

Expected: a ratio of at most 2 for every field, because the fields have size limits, and what stays the same
during a request is prepared once.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from threading import Event
from time import perf_counter
from typing import Any

from tiny_llm.delivery import Item
from tiny_llm.engine_loop import Request
from tiny_llm.outputs import RequestEvent
from tiny_llm.sampling_params import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
)

import harness
from tiny_llm import LLM, BeamSearchParams, SamplingParams

NEIGHBOUR_PROMPT, SHORT, LONG = 32, 64, 8000  # tokens
BEAM_START_SECONDS = 0.5  # after this time a beam search runs with all its beams
IDS = range(1000, 1000 + max(MAX_STOP_IDS, MAX_BIASES))
PLAIN: dict[str, Any] = {"temperature": 0.0, "max_tokens": None, "ignore_eos": True}


@dataclass(frozen=True)
class Case:
    """A field at its limit. fields: parameters added to the plain ones; prompt: its length in tokens."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    prompt: int = SHORT
    completions: int = 1
    in_prompt: bool = False  # measure the prefill steps instead of the decode steps
    beams: int = 0


def fields_at_their_limits() -> dict[str, dict[str, Any]]:
    """For each field, the values that cost the most."""
    stops = [chr(0x4E00 + i) * MAX_STOP_CHARACTERS for i in range(MAX_STOPS)]
    stop_ids = list(IDS[:MAX_STOP_IDS])
    return {
        "stop_token_ids": {"stop_token_ids": stop_ids},
        "min_tokens and stop_token_ids": {"stop_token_ids": stop_ids, "min_tokens": 4000},
        "logit_bias": {"logit_bias": dict.fromkeys(IDS[:MAX_BIASES], 1.0)},
        "stop": {"stop": stops},
        "logprobs": {"logprobs": MAX_LOGPROBS},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "frequency_penalty": {"frequency_penalty": 0.1},
        "presence_penalty": {"presence_penalty": 0.1},
        "temperature": {"temperature": 1.0},
        "min_p": {"temperature": 1.0, "min_p": 0.05},
        "top_k": {"temperature": 1.0, "top_k": 1000},
        "top_p": {"temperature": 1.0, "top_p": 0.99},
        "cache_salt": {"cache_salt": "s" * 1000},
        "include_stop_str_in_output": {"include_stop_str_in_output": True, "skip_special_tokens": False},
        "priority": {"priority": 1},
    }


def cases(completions: int, long: bool) -> list[Case]:
    """Every field with one and with several completions.

    long: add cases with a long prompt for the fields that read earlier tokens.
    """
    fields = fields_at_their_limits()
    made = [Case(name, value, completions=n) for name, value in fields.items() for n in (1, completions)]
    made += [Case("prompt_logprobs", {"prompt_logprobs": MAX_LOGPROBS}, 2000, in_prompt=True)]
    made += [Case("beam_width", beams=width) for width in (4, completions)]
    if long:
        read_earlier_tokens = ("repetition_penalty", "frequency_penalty", "logprobs")
        made += [Case(name, fields[name], LONG, n) for name in read_earlier_tokens for n in (1, completions)]
    return made


class Neighbour:
    """A listener, called in the engine's thread, that records the times of the neighbour's events.

    others_first: time of the other request's first event. enough: set after `wanted` later events of the
    neighbour.
    """

    def __init__(self, own: Request, wanted: int) -> None:
        self.times: list[float] = []
        self.others_first: float | None = None
        self.enough = Event()
        self._wanted = wanted
        self._own = own.request_id

    def __call__(self, items: list[Item]) -> None:
        """Receive one step's events of both requests."""
        now = perf_counter()
        for item in items:
            if not isinstance(item, RequestEvent):
                raise item
            if item.request_id != self._own and self.others_first is None:
                self.others_first = now
        if any(isinstance(item, RequestEvent) and item.request_id == self._own for item in items):
            self.times.append(now)
        counted = [time for time in self.times if self.others_first is not None and time > self.others_first]
        if len(counted) >= self._wanted:
            self.enough.set()


def random_prompt(length: int, seed: int) -> list[int]:
    """`length` random token ids, the same for the same seed."""
    return random.Random(seed).choices(range(1000, 40_000), k=length)


def neighbour_steps(llm: LLM, case: Case, with_field: bool, steps: int, seed: int) -> list[float]:
    """Seconds of the neighbour's steps while the case's request runs, with the field or without."""
    own = llm.engine.request(random_prompt(NEIGHBOUR_PROMPT, 0), SamplingParams(**PLAIN))
    other = _other(llm, case, with_field, seed)
    neighbour = Neighbour(own, 2 if case.in_prompt else steps)
    try:
        llm.engine.submit([own], neighbour).result()
        submitted = perf_counter()
        llm.engine.submit([other], neighbour).result()
        if case.beams:  # a beam search sends no event before it is finished
            neighbour.others_first = submitted + BEAM_START_SECONDS
        neighbour.enough.wait(600)
    finally:
        llm.engine.forget([own, other])
    first = neighbour.others_first or submitted
    if case.in_prompt:
        return _gaps(time for time in neighbour.times if submitted < time <= first)
    return _gaps(time for time in neighbour.times if time > first)


def _other(llm: LLM, case: Case, with_field: bool, seed: int) -> Request:
    prompt = random_prompt(case.prompt, seed if case.in_prompt else case.prompt)
    if case.beams and with_field:
        return llm.engine.search(
            prompt, BeamSearchParams(beam_width=case.beams, max_tokens=256, ignore_eos=True)
        )
    fields = case.fields if with_field else {}
    return llm.engine.request(
        prompt, SamplingParams(**{**PLAIN, "n": case.beams or case.completions, **fields})
    )


def _gaps(times: Iterable[float]) -> list[float]:
    moments = list(times)
    return [later - earlier for earlier, later in pairwise(moments)]


def compare(llm: LLM, case: Case, steps: int, repetitions: int) -> dict[str, Any]:
    """Median steps of the neighbour without and with the field, and the median ratio of the pairs."""
    without, with_field = [], []
    for repetition in range(repetitions + 1):
        seed = 1000 + 2 * repetition
        pair = [
            median(neighbour_steps(llm, case, with_it, steps, seed + with_it)) for with_it in (False, True)
        ]
        if repetition:  # the first pair warms up
            without.append(pair[0])
            with_field.append(pair[1])
    ratios = [b / a for a, b in zip(without, with_field, strict=True)]
    return {
        "field": case.name,
        "completions": case.beams or case.completions,
        "prompt": case.prompt,
        "without_s": harness.summary(without),
        "with_s": harness.summary(with_field),
        "ratio": harness.summary(ratios),
    }


def main() -> None:
    """Print the neighbour's step time without and with each field."""
    names = sorted({case.name for case in cases(1, long=False)})
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=3)
    options.add_argument(
        "--steps", type=harness.positive, default=30, help="timed steps of each run (default: 30)"
    )
    options.add_argument("--completions", type=harness.positive, default=16, help="value of n (default: 16)")
    options.add_argument(
        "--field", action="append", choices=names, help="measure only this field; repeatable"
    )
    options.add_argument("--no-long", action="store_true", help=f"skip prompts of {LONG} tokens")
    args = options.parse_args()
    llm = LLM(max_num_seqs=args.completions + 1, num_blocks=1500 + 20 * args.completions)
    chosen = args.field or names
    rows = [
        compare(llm, case, args.steps, args.repetitions)
        for case in cases(args.completions, not args.no_long)
        if case.name in chosen
    ]
    lines = [f"{'':30}{'n':>4}{'prompt':>8}{'without':>12}{'with':>12}{'ratio':>8}"]
    lines += [
        f"{row['field']:30}{row['completions']:>4}{row['prompt']:>8}"
        f"{row['without_s']['median'] * 1e3:>9.1f} ms{row['with_s']['median'] * 1e3:>9.1f} ms"
        f"{row['ratio']['median']:>8.2f}"
        for row in rows
    ]
    harness.show({"benchmark": "neighbours", "rows": rows}, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
