"""2.1: What a token costs without a cache, and with one.

Counts the tokens that go through a model while it generates: each of them has its keys and values
computed. Then times the embedded model's next token at growing lengths, everything computed again and
from a cache.

\b
pdm run lab trap
pdm run lab trap --longest 512 --plot trap.svg
"""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import typer
from tiny_llm.generate import generate
from tiny_llm.kv_cache import attention_with_cache, attention_without_cache, generate_with_cache
from tiny_llm.loader import load_model

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table

SHORTEST = 16
CACHED = 8  # times as many tokens are timed with a cache: they are quick
TEXT = "Once upon a time, in a small house by the sea, there lived a cat who could read. "

Generate = Callable[[Any, Sequence[int], int, Sequence[int]], Iterator[int]]


def measure(
    progress: Progress,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that is counted with.")] = 128,
    gen_len: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 100,
    longest: Annotated[
        int, typer.Option(min=SHORTEST, help=f"Times {SHORTEST} tokens, 32, and so on up to this.")
    ] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Tokens timed at each length.")] = 1,
) -> Result:
    """Count, then time."""
    counts, times = Counts.of(prompt_len, gen_len), _times(longest, repetitions, progress)
    return Result(
        title="The quadratic trap",
        asks="A new token looks at all before it. Must their keys and values be computed again for it?",
        tables=[_table_of_counts(counts, prompt_len, gen_len), _table_of_times(times)],
        conclusion=_conclusion(counts, times),
        picture=Picture(
            title="Time for one more token of the embedded model",
            x="tokens before it",
            y="time (ms)",
            lines=[
                Line("all computed again", [Point(t.length, 1000 * t.recomputing) for t in times]),
                Line("with a cache", [Point(t.length, 1000 * t.cached) for t in times]),
            ],
            x_base=2,
            y_base=10,
        ),
    )


class CountingModel:
    """Stands in for a model: computes nothing, and counts the tokens that are brought to it."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.config = SimpleNamespace(attention_scale=1.0)

    def __call__(self, tokens: mx.array, context: object) -> mx.array:
        """Tokens [1, L] -> logits [1, 1, 2], all zero."""
        self.num_tokens += tokens.shape[1]
        return mx.zeros((1, 1, 2))


class Counts(NamedTuple):
    """Keys (or values) computed per head and layer."""

    recomputing: Pair
    cached: Pair

    @classmethod
    def of(cls, prompt_len: int, gen_len: int) -> "Counts":
        """For so many tokens, the last one's keys too: the pass that computes them yields one token more."""
        ways = ((generate, attention_without_cache), (generate_with_cache, attention_with_cache))
        pairs = []
        for function, predict in ways:
            model = CountingModel()
            _run(function, model, [0] * prompt_len, gen_len + 1)
            pairs.append(Pair(predict(prompt_len, gen_len), model.num_tokens))
        return cls(*pairs)

    @property
    def ratio(self) -> Pair:
        """How many times more without a cache."""
        return Pair(*(a / b for a, b in zip(self.recomputing, self.cached, strict=True)))


class Times(NamedTuple):
    """Median seconds for one more token after `length` others.

    predicted: keys that it costs without a cache; with one it costs its own alone. same: both ways gave the
    same tokens.
    """

    length: int
    recomputing: float
    cached: float
    predicted: float
    same: bool


class Generated(NamedTuple):
    """The tokens of a run, and the seconds that each took."""

    tokens: list[int]
    seconds: list[float]


def _run(function: Generate, model: object, prompt: Sequence[int], max_tokens: int) -> Generated:
    found = Generated([], [])
    start = time.perf_counter()
    for token in function(model, prompt, max_tokens, ()):
        now = time.perf_counter()
        found.tokens.append(token)
        found.seconds.append(now - start)
        start = now
    return found


def _times(longest: int, repetitions: int, progress: Progress) -> list[Times]:
    """At 16 tokens, 32, 64 and so on. With a cache the first token is not counted: it computes the prompt."""
    loaded = load_model(None)
    lengths = [SHORTEST << doublings for doublings in range((longest // SHORTEST).bit_length())]
    text = loaded.tokenizer.encode(TEXT * (1 + longest // SHORTEST))
    found = []
    for done, length in enumerate(lengths):
        progress(f"trap: up to {longest} tokens, lengths timed:", done, len(lengths))
        again = _run(generate, loaded.model, text[:length], repetitions)
        cached = _run(generate_with_cache, loaded.model, text[:length], CACHED * repetitions + 1)
        found.append(
            Times(
                length=length,
                recomputing=median(again.seconds),
                cached=median(cached.seconds[1:]),
                predicted=attention_without_cache(length, repetitions - 1) / repetitions,
                same=again.tokens == cached.tokens[:repetitions],
            )
        )
    progress("trap", len(lengths), len(lengths))
    return found


def _table_of_counts(counts: Counts, prompt_len: int, gen_len: int) -> Table:
    return Table(
        f"Keys computed, per head and layer, for a prompt of {prompt_len} tokens and {gen_len} more",
        [Column("way", "way"), Column("keys", "keys", "{:,.0f}".format)],
        [("all computed again", counts.recomputing), ("with a cache", counts.cached)],
    )


def _table_of_times(times: list[Times]) -> Table:
    ms = "{:,.1f}".format
    return Table(
        "One more token of the embedded model; predicted from the keys that are computed",
        [
            Column("length", "tokens before it"),
            Column("recomputing_ms", "all computed again\n(ms)", ms),
            Column("cached_ms", "with a cache\n(ms)", ms),
            Column("ratio", "times as long", ms),
        ],
        [
            (t.length, 1000 * t.recomputing, 1000 * t.cached, Pair(t.predicted, t.recomputing / t.cached))
            for t in times
        ],
    )


def _conclusion(counts: Counts, times: list[Times]) -> str:
    last, same = times[-1], sum(t.same for t in times)
    return (
        f"Without a cache {counts.ratio.measured:.1f} times as many keys are computed. After {last.length} "
        f"tokens the next one takes {last.recomputing / last.cached:.0f} times as long, for "
        f"{last.predicted:.0f} times as many keys: a token alone reads all weights too, and attends to all "
        f"before it. Both ways gave the same tokens at {same} of {len(times)} lengths."
    )
