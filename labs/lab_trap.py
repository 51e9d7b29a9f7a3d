"""2.1: What one more token costs without and with a KV cache.

Counts the tokens that go through a model while it generates; the model computes keys and values for each of
them. Then times the embedded model's next token after texts of growing length, without a cache (all keys and
values computed again) and with one.

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
CACHED = 8  # times as many tokens are timed with a cache, because they are fast
TEXT = "Once upon a time, in a small house by the sea, there lived a cat who could read. "

Generate = Callable[[Any, Sequence[int], int, Sequence[int]], Iterator[int]]


def measure(
    progress: Progress,
    prompt_len: Annotated[int, typer.Option(min=1, help="Prompt tokens in the counted example.")] = 128,
    gen_len: Annotated[int, typer.Option(min=1, help="Tokens generated in the counted example.")] = 100,
    longest: Annotated[
        int,
        typer.Option(
            min=SHORTEST, help=f"Tokens of the longest timed text; the others have {SHORTEST}, 32, 64, ..."
        ),
    ] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Tokens timed at each length.")] = 1,
) -> Result:
    """Count keys, then time tokens."""
    counts, times = Counts.of(prompt_len, gen_len), _times(longest, repetitions, progress)
    return Result(
        title="The quadratic trap",
        question="A new token attends to all earlier tokens. Must their keys and values be computed again?",
        tables=[_table_of_counts(counts, prompt_len, gen_len), _table_of_times(times)],
        conclusion=_conclusion(counts, times),
        picture=Picture(
            title="Time of one more token of the embedded model",
            x="earlier tokens",
            y="time (ms)",
            lines=[
                Line("without a cache", [Point(t.length, 1000 * t.recomputing) for t in times]),
                Line("with a cache", [Point(t.length, 1000 * t.cached) for t in times]),
            ],
            x_base=2,
            y_base=10,
        ),
    )


class CountingModel:
    """Replaces a model: computes nothing and counts the tokens of its inputs."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.config = SimpleNamespace(attention_scale=1.0)

    def __call__(self, tokens: mx.array, context: object) -> mx.array:
        """Tokens [1, L] -> logits [1, 1, 2], all zero."""
        self.num_tokens += tokens.shape[1]
        return mx.zeros((1, 1, 2))


class Counts(NamedTuple):
    """Keys (or values) computed per head and layer, without and with a cache."""

    recomputing: Pair
    cached: Pair

    @classmethod
    def of(cls, prompt_len: int, gen_len: int) -> "Counts":
        """Count for these lengths, including the key of the last token.

        The pass that computes this key generates one more token.
        """
        ways = ((generate, attention_without_cache), (generate_with_cache, attention_with_cache))
        pairs = []
        for function, predict in ways:
            model = CountingModel()
            _run(function, model, [0] * prompt_len, gen_len + 1)
            pairs.append(Pair(predict(prompt_len, gen_len), model.num_tokens))
        return cls(*pairs)

    @property
    def ratio(self) -> Pair:
        """How many times as many keys are computed without a cache."""
        return Pair(*(a / b for a, b in zip(self.recomputing, self.cached, strict=True)))


class Times(NamedTuple):
    """Median seconds of one more token after `length` tokens.

    predicted: keys computed for it without a cache; with a cache it is one. same: both ways gave the same
    tokens.
    """

    length: int
    recomputing: float
    cached: float
    predicted: float
    same: bool


class Generated(NamedTuple):
    """The tokens of a run, and the seconds of each."""

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
    """Time one more token after 16, 32, 64, ... tokens.

    With a cache, the first token does not count, because its pass computes the whole prompt.
    """
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
        [("without a cache", counts.recomputing), ("with a cache", counts.cached)],
    )


def _table_of_times(times: list[Times]) -> Table:
    ms = "{:,.1f}".format
    return Table(
        "Time of one more token of the embedded model; predicted: ratio of the keys computed",
        [
            Column("length", "earlier\ntokens"),
            Column("recomputing_ms", "without a cache\n(ms)", ms),
            Column("cached_ms", "with a cache\n(ms)", ms),
            Column("ratio", "times as long\nwithout", "{:,.1f}".format),
        ],
        [
            (t.length, 1000 * t.recomputing, 1000 * t.cached, Pair(t.predicted, t.recomputing / t.cached))
            for t in times
        ],
    )


def _conclusion(counts: Counts, times: list[Times]) -> str:
    last, same = times[-1], sum(t.same for t in times)
    factor = last.recomputing / last.cached
    reason = (
        " The time differs less than the keys, because with a cache a token still reads all weights and "
        "attends to all earlier tokens."
        if factor < last.predicted
        else ""
    )
    return (
        f"Without a cache, {counts.ratio.measured:.1f} times as many keys are computed. After {last.length} "
        f"tokens, the next token takes {factor:.0f} times as long, for {last.predicted:.0f} times as many "
        f"keys.{reason} Both ways gave the same tokens at {same} of {len(times)} lengths."
    )
