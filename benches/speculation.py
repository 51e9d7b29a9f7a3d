"""What does speculation gain, and what does it cost where it cannot help? The same answers with and without.

The embedded model gets real prompts. "copying" asks it to correct a text, to replace a name, to quote, and to
turn a record into JSON: answers that repeat the prompt. "free" asks for stories and explanations. The load is
one stream, then 4 and 16 requests together, greedy and at temperature 1. Engines without and with
`speculative_config` take turns step by step, so that a busy machine slows all of them. The speed is that of
the output tokens in steps that only decode; a warm-up round has cached the prompts.

  tokens/s    output tokens per second, median over the rounds: without and with speculation
  ratio       with / without, median of the rounds' ratios, with its 95% confidence interval
  control     the same ratio for a second engine without speculation: how far noise moves it
  drafted     guessed tokens that were checked, as a share of the output
  accepted    the share of these that were right
  equal       answers that are the same, token by token: all of them, or speculation is broken

Also shown: the cost of a step by its number of rows, as the engine measured it at its start. On a CPU, rows
soon cost time: 8 rows take two to three times as long as 1. Expected: at least 1.5 times the speed for
copying at 1 stream, and at least 0.97 at 16 and for free text, because tokens are drafted only if their rows
pay.
"""

from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.speculation import Speculation

import harness
from tiny_llm import LLM, SamplingParams

TEXT = (
    "The lighthouse at Cape Morrow was built in 1874 by a small crew of stonemasons. For almost a century "
    "its lamp was lit every evening by a keeper who lived in the cottage below. In 1968 the lamp was made "
    "automatic, and the last keeper, Edwin Hale, moved to the village. The cottage stood empty until 1991, "
    "when the town council turned it into a museum. Today about nine thousand visitors climb the stairs "
    "every year, and a volunteer tells them the story of the great storm of 1903."
)
MISSPELLED = TEXT.replace("almost", "allmost").replace("visitors", "visiters").replace("museum", "musem")
RECORD = """\
id: 48213
name: Margaret Ellison
street: 17 Harbour Lane
city: Port Alder
postcode: PA4 7QT
email: margaret.ellison@example.com
phone: +44 1632 960153
plan: annual
member since: 2016-03-21
last order: 2025-11-02
note: leave the parcel with the neighbour at number 19"""
PROMPTS = {
    "copying": [
        f"Correct the spelling of the following text. Copy it word by word.\n\n{MISSPELLED}",
        f"Replace Edwin by Edward in this text and return the whole text:\n\n{TEXT}",
        f"Summarize this text in quotes from it:\n\n{TEXT}",
        f"Write this record as JSON:\n\n{RECORD}",
    ],
    "free": [
        "Write a short story about a sailor who finds a map.",
        "Explain to a child why the sky is blue.",
        "What should I consider before I adopt a dog?",
        "Describe a market in the early morning.",
    ],
}
STREAMS = (1, 4, 16)
CONFIG = {"method": "ngram"}


class Load(NamedTuple):
    """A kind of prompt, how many requests run together, and their temperature."""

    kind: str
    streams: int
    temperature: float

    @property
    def name(self) -> str:
        """The load in words."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{self.kind}, {self.streams} at a time, {how}"


class Round(NamedTuple):
    """What one engine did in a round: seconds and output tokens of its decode steps, and the answers."""

    seconds: float
    tokens: int
    answers: list[list[int]]

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


class Batch:
    """Requests that run together on one engine, step by step."""

    def __init__(self, llm: LLM, texts: list[str], temperature: float, tokens: int) -> None:
        self._llm = llm
        self._answers: dict[str, list[int]] = {}
        self.seconds, self.tokens = 0.0, 0
        for i, text in enumerate(texts):
            params = SamplingParams(temperature=temperature, seed=100 + i, max_tokens=tokens)
            request = llm.engine.chat_request([{"role": "user", "content": text}], params, request_id=str(i))
            llm.engine.call(partial(request.begin, llm.core))
            self._answers[request.request_id] = []

    def step(self) -> bool:
        """Run one step, and count it if it only decodes; False if nothing is left to do."""
        return self._llm.engine.call(self._step)

    def _step(self) -> bool:
        core = self._llm.core
        if not core.has_work:
            return False
        decodes = not core.manager.waiting and all(one.outputs for one in core.manager.running)
        start = perf_counter()
        outputs = core.step()
        if decodes:
            self.seconds += perf_counter() - start
        for output in outputs:
            new = [one.token for one in (*output.earlier, output)]
            self._answers[output.request_id] += new
            self.tokens += len(new) * decodes
        return True

    @property
    def answers(self) -> list[list[int]]:
        """The answers' tokens so far, in the order of the requests."""
        return list(self._answers.values())


def run_round(engines: list[LLM], load: Load, tokens: int) -> list[Round]:
    """Answer the load's prompts on all engines, which take turns step by step."""
    texts = PROMPTS[load.kind]
    groups = [[text] for text in texts] if load.streams == 1 else [texts * (load.streams // len(texts))]
    rounds = [Round(0.0, 0, []) for _ in engines]
    for group in groups:
        batches = [Batch(llm, group, load.temperature, tokens) for llm in engines]
        busy = batches
        while busy:
            busy = [batch for batch in busy if batch.step()]
        rounds = [
            Round(one.seconds + batch.seconds, one.tokens + batch.tokens, one.answers + batch.answers)
            for one, batch in zip(rounds, batches, strict=True)
        ]
    return rounds


def compare(engines: dict[str, LLM], load: Load, repetitions: int, tokens: int) -> dict[str, Any]:
    """Run a load on all engines, several times."""
    guessing = engines["with"]
    run_round([*engines.values()], load, tokens)  # prompts enter the prefix cache, memory is touched
    before = guessing.core.stats.drafts
    rounds = [run_round([*engines.values()], load, tokens) for _ in range(repetitions)]
    after = guessing.core.stats.drafts
    ran = {name: [one[place] for one in rounds] for place, name in enumerate(engines)}
    ratios, control = (
        [two.speed / one.speed for one, two in zip(ran["without"], ran[name], strict=True)]
        for name in ("with", "control")
    )
    pairs = [pair for one in ran["with"] for pair in zip(one.answers, ran["without"][0].answers, strict=True)]
    drafted = after.num_draft_tokens - before.num_draft_tokens
    return {
        "load": load.name,
        **{name: harness.summary([one.speed for one in of_name]) for name, of_name in ran.items()},
        "ratio": harness.summary(ratios),
        "interval": harness.interval(ratios),
        "control": harness.summary(control),
        "control_interval": harness.interval(control),
        "drafted": drafted / sum(one.tokens for one in ran["with"]),
        "accepted": (after.num_accepted_tokens - before.num_accepted_tokens) / max(1, drafted),
        "equal": sum(one == other for one, other in pairs) / len(pairs),
    }


def table(costs: dict[int, float], found: list[dict[str, Any]]) -> str:
    """The result as text."""
    shown = ", ".join(f"{rows}: {1e3 * seconds:.1f}" for rows, seconds in costs.items())
    lines = [f"milliseconds of a step by its rows: {shown}", ""]
    lines += [" " * 39 + "without    with  ratio  95% interval   control  drafted  accepted  equal"]
    for one in found:
        low, high = one["interval"]
        lines.append(
            f"{one['load']:38} {one['without']['median']:8.0f}{one['with']['median']:8.0f}"
            f"{one['ratio']['median']:7.2f}  {low:.2f} to {high:.2f} {one['control']['median']:9.2f}"
            f"{one['drafted']:9.0%}"
            f"{one['accepted']:10.0%}{one['equal']:7.0%}"
        )
    return "\n".join(lines)


def _costs(llm: LLM) -> dict[int, float]:
    """The seconds of a step by its number of rows, as the engine measured them."""
    manager = llm.core.manager
    assert isinstance(manager, PagedBatchManager)
    drafting = manager.drafting
    assert isinstance(drafting, Speculation)
    return dict(zip(drafting.costs.rows, drafting.costs.seconds, strict=True))


def main() -> None:
    """Compare all loads and print the result."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--tokens", type=harness.positive, default=128, help="longest answer (default: 128)")
    parser.add_argument(
        "--streams",
        type=int,
        choices=STREAMS,
        action="append",
        help="requests at a time; may be repeated (default: 1, 4 and 16)",
    )
    options = parser.parse_args()
    with LLM() as plain, LLM() as control, LLM(speculative_config=CONFIG) as guessing:
        engines = {"without": plain, "control": control, "with": guessing}
        costs = _costs(guessing)
        found = []
        for temperature in (0.0, 1.0):
            for kind in PROMPTS:
                for streams in options.streams or STREAMS:
                    load = Load(kind, streams, temperature)
                    harness.print_progress(load.name)
                    found.append(compare(engines, load, options.repetitions, options.tokens))
    result = {"step_seconds": costs, "loads": found}
    harness.show(result, as_json=options.json, text=table(costs, found))


if __name__ == "__main__":
    main()
