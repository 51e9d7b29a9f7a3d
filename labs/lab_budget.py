"""2.6: What a long prompt does to the others with different budgets of tokens per step.

A few requests decode on the embedded model. Then one with a long prompt arrives. Measured until its first
token, for budgets from small ones up to the whole prompt in one step: how long it waits for that token, and
how long the others wait for each of theirs.

The number of steps is predicted by `first_token_steps`. The times are predicted by a line (time per step and
time per token), fitted to the steps with the smallest budget and to decode steps. The line ignores that later
tokens of a prompt attend to more keys.

\b
pdm run lab budget
pdm run lab budget --prompt-len 800 --others 8 --plot budget.svg
"""

import random
from collections.abc import Iterator, Sequence
from statistics import fmean
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.chunked_prefill import first_token_steps

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table
from step_cost import Cost, Step
from tiny_llm import LLM, EngineCore, PagedBatchManager, SamplingParams

SMALLEST = 64  # tokens per step
DECODES = 8  # steps before the long prompt arrives
SHORT = 16  # tokens of the other prompts
BLOCK_SIZE = 16


def measure(
    progress: Progress,
    prompt_len: Annotated[
        int, typer.Option(min=SMALLEST, max=8000, help="Tokens of the long prompt.")
    ] = 1600,
    others: Annotated[int, typer.Option(min=1, max=32, help="Requests that decode.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the tokens.")] = 0,
) -> Result:
    """Let the prompt arrive with each budget, and compare with the predictions."""
    budgets = [SMALLEST]
    while budgets[-1] < prompt_len + others:
        budgets.append(2 * budgets[-1])
    draw = random.Random(seed)
    prompt = [draw.randrange(1000, 40_000) for _ in range(prompt_len)]
    progress("budget: reading the model", 0, len(budgets))
    llm = LLM(num_blocks=8)
    _run(llm, prompt[:SMALLEST], others, SMALLEST)  # warms up
    runs = []
    for done, budget in enumerate(budgets):
        progress("budget: budgets tried:", done, len(budgets))
        runs.append(_run(llm, prompt, others, budget))
    progress("budget", len(budgets), len(budgets))
    cost = Cost.of([*runs[0].decodes, *runs[0].steps])
    return Result(
        title="A long prompt among decodes",
        question="A long prompt arrives while others decode. How long does each of them wait?",
        tables=[_table(runs, cost)],
        conclusion=_conclusion(runs),
        picture=_picture(runs, cost),
    )


class Run(NamedTuple):
    """A budget, the decode steps before the long prompt arrived, and the steps until its first token."""

    budget: int
    prompt_len: int
    others: int
    decodes: list[Step]
    steps: list[Step]

    @property
    def num_steps(self) -> Pair:
        """Steps until the first token of the long prompt; the others take a token of each step."""
        predicted = first_token_steps([*[1] * self.others, self.prompt_len], self.budget)[-1]
        return Pair(predicted, len(self.steps))

    def first_token(self, cost: Cost) -> Pair:
        """Milliseconds until the first token of the long prompt."""
        steps = self.num_steps.predicted
        predicted = cost.seconds(steps, self.prompt_len + steps * self.others)
        return Pair(1e3 * predicted, 1e3 * sum(step.seconds for step in self.steps))

    def longest_wait(self, cost: Cost) -> Pair:
        """Milliseconds of the longest wait of another request for its next token: the longest step."""
        tokens = min(self.budget, self.prompt_len + self.others)
        return Pair(1e3 * cost.seconds(1, tokens), 1e3 * max(step.seconds for step in self.steps))

    @property
    def mean_wait(self) -> float:
        """Milliseconds that another request waits for a token, on average."""
        return 1e3 * fmean(step.seconds for step in self.steps)


def _run(llm: LLM, prompt: list[int], others: int, budget: int) -> Run:
    """Start the others, let them decode, add the long prompt, and step until its first token."""
    blocks = -(-len(prompt) // BLOCK_SIZE) + others * (SHORT + len(prompt)) // BLOCK_SIZE + 8
    manager = PagedBatchManager(blocks, BLOCK_SIZE, others + 1, model=llm.model, max_batched_tokens=budget)
    core = EngineCore(manager, eos_token_ids=())
    for user in range(others):
        params = SamplingParams(temperature=0, max_tokens=len(prompt))
        core.add_request(str(user), [1000 + user] * SHORT, params)
    while any(sequence.num_uncomputed > 1 for sequence in [*manager.waiting, *manager.running]):
        core.step()
    decodes = [_timed(core) for _ in range(DECODES)]
    core.add_request("long", prompt, SamplingParams(temperature=0, max_tokens=1))
    steps = []
    while core.has_request("long"):
        steps.append(_timed(core))
    return Run(budget, len(prompt), others, decodes, steps)


def _timed(core: EngineCore) -> Step:
    """Make a step, and time it."""
    before, start = core.stats.num_tokens, perf_counter()
    outputs = core.step()
    return Step(core.stats.num_tokens - before, len(outputs), perf_counter() - start)


# ---- The result ----


def _table(runs: Sequence[Run], cost: Cost) -> Table:
    ms = "{:,.0f}".format
    decode = 1e3 * fmean(step.seconds for run in runs for step in run.decodes)
    return Table(
        f"The first token of a prompt of {runs[0].prompt_len:,} tokens, and the waits of {runs[0].others} "
        f"others that wait {decode:.1f} ms before; predicted: {1e3 * cost.per_step:.1f} ms per step and "
        f"{1e3 * cost.per_token:.2f} ms per token",
        [
            Column("budget", "tokens\nper step"),
            Column("steps", "steps", "{:,.0f}".format),
            Column("first_token_ms", "first token\n(ms)", ms),
            Column("longest_wait_ms", "longest wait\n(ms)", ms),
            Column("mean_wait_ms", "mean wait\n(ms)", ms),
        ],
        [
            (run.budget, run.num_steps, run.first_token(cost), run.longest_wait(cost), run.mean_wait)
            for run in runs
        ],
    )


def _picture(runs: Sequence[Run], cost: Cost) -> Picture:
    return Picture(
        title="A long prompt among decodes",
        x="budget (tokens per step)",
        y="time (ms)",
        lines=[
            *_lines("first token of the prompt", [(run.budget, run.first_token(cost)) for run in runs]),
            *_lines("longest wait of the others", [(run.budget, run.longest_wait(cost)) for run in runs]),
        ],
        x_base=2,
        y_base=10,
    )


def _lines(name: str, pairs: Sequence[tuple[int, Pair]]) -> Iterator[Line]:
    yield Line(name, [Point(budget, pair.predicted) for budget, pair in pairs], is_predicted=True)
    yield Line(name, [Point(budget, pair.measured) for budget, pair in pairs])


def _conclusion(runs: Sequence[Run]) -> str:
    first, last = runs[0], runs[-1]
    times = [
        (run.budget, run.longest_wait(Cost(0, 0)).measured, run.first_token(Cost(0, 0)).measured)
        for run in (first, last)
    ]
    (small, wait, token), (large, long_wait, early_token) = times
    return (
        f"With {large:,} tokens per step the others wait up to {long_wait:,.0f} ms for a token; with {small} "
        f"up to {wait:,.0f} ms. The first token of the long prompt comes after {early_token:,.0f} ms and "
        f"{token:,.0f} ms."
    )
