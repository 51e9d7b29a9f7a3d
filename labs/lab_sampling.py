"""1.7: How many tokens each filter keeps, and how often each token is drawn.

Takes the embedded model's logits after three prompts: one has a clear answer, one leaves a choice, and one
could continue in many ways. Counts the tokens that your filters keep, and compares the shares of many draws
with the probabilities. Predictions are computed in float64 from the definitions.

\b
pdm run lab sampling
pdm run lab sampling --draws 10000 --plot sampling.svg
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np
import typer
from tiny_llm.llm import LLM
from tiny_llm.sampler import keep_min_p, keep_top_p, sample_token
from tiny_llm.sampling_params import SamplingParams

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent

PROMPTS = ("The capital of France is", "My favourite thing about the rain is", "Once upon a time there was a")
DRAWN = PROMPTS[1]  # the prompt whose next token is drawn many times
TEMPERATURES = (0.5, 0.7, 1.3)
NUM_SHOWN = 5  # rows of the table of draws
NUM_LIKELIEST = 40  # tokens of each prompt in the JSON output
GROUP_WIDTH = 0.2  # of logits; the JSON output has the other tokens in groups of about the same logit


def measure(
    progress: Progress,
    draws: Annotated[int, typer.Option(min=1, help="Tokens drawn after one of the prompts.")] = 5000,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="The probability that top-p keeps.")] = 0.9,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the likeliest token's probability for min-p.")
    ] = 0.1,
) -> Result:
    """Count what the filters keep, then draw."""
    rows = _rows()
    drawn = next(row for row in rows if row.prompt == DRAWN)
    return Result(
        title="What a filter keeps",
        question="The model gives a probability to every token. How many of them should be possible?",
        tables=[
            _table_of_filters(rows, top_p, min_p),
            _table_of_temperatures(rows, top_p),
            _table_of_draws(drawn, _draw(drawn, draws, progress)),
        ],
        conclusion=_conclusion(rows, top_p, min_p),
        picture=Picture(
            title="Probability of the likeliest tokens together",
            x="likeliest tokens",
            y="their probability together",
            lines=[Line(row.prompt, row.shares()) for row in rows],
            x_base=10,
            y_is_share=True,
        ),
        data={"prompts": [row.as_json() for row in rows]},
    )


class Row(NamedTuple):
    """The logits after a prompt. order: ids, the likeliest first. texts: of the `NUM_LIKELIEST` likeliest."""

    prompt: str
    logits: np.ndarray
    order: np.ndarray
    texts: Sequence[str]

    @property
    def array(self) -> mx.array:
        """The logits, [V] in float32."""
        return mx.array(self.logits, mx.float32)

    def descending(self, temperature: float = 1.0) -> np.ndarray:
        """The probabilities, the largest first, in float64."""
        scaled = self.logits[self.order] / temperature
        weights = np.exp(scaled - scaled[0])
        return np.asarray(weights / weights.sum())

    def shares(self) -> list[Point]:
        """The probability of the 1, 2, 5, 10, 20, ... likeliest tokens together."""
        sums = np.cumsum(self.descending())
        counts = [step * 10**power for power in range(5) for step in (1, 2, 5)]
        return [Point(count, float(sums[count - 1])) for count in counts if count <= len(sums)]

    def as_json(self) -> dict[str, object]:
        """The likeliest tokens as id, text and logit; the others as groups: a logit and a number of tokens.

        A group's logit gives it the probability that its tokens have together, at temperature 1.
        """
        ids = self.order[:NUM_LIKELIEST]
        likeliest = [
            [int(token), text, round(float(self.logits[token]), 4)]
            for token, text in zip(ids, self.texts, strict=True)
        ]
        others = self.logits[self.order[NUM_LIKELIEST:]]
        places = np.floor((others[0] - others) / GROUP_WIDTH).astype(int)
        groups = [others[places == place] for place in np.unique(places)]
        tail = [[round(float(np.log(np.exp(group).mean())), 4), len(group)] for group in groups]
        return {"prompt": self.prompt, "vocabulary": len(self.logits), "likeliest": likeliest, "tail": tail}


def _rows() -> list[Row]:
    """The logits of the embedded model after each prompt."""
    llm = LLM(num_blocks=64)
    rows = []
    for prompt in PROMPTS:
        logits = np.array(llm.logits(llm.tokenizer.encode(prompt))[-1].astype(mx.float32)).astype(np.float64)
        order = np.argsort(-logits, kind="stable")
        texts = [llm.tokenizer.decode([int(token)]) for token in order[:NUM_LIKELIEST]]
        rows.append(Row(prompt, logits, order, texts))
    return rows


def _num_kept(logits: mx.array) -> int:
    return int(mx.sum(logits > -mx.inf))


def _num_for_share(descending: np.ndarray, share: float) -> int:
    """The number of likeliest tokens whose probabilities sum to at least `share`."""
    return int((np.cumsum(descending) - descending < share).sum())


def _table_of_filters(rows: Sequence[Row], top_p: float, min_p: float) -> Table:
    found = []
    for row in rows:
        probabilities = row.descending()
        found.append(
            (
                row.prompt,
                row.texts[0].strip(),
                float(probabilities[0]),
                float(probabilities[:NUM_LIKELIEST].sum()),
                Pair(_num_for_share(probabilities, top_p), _num_kept(keep_top_p(row.array, top_p))),
                Pair(
                    int((probabilities >= min_p * probabilities[0]).sum()),
                    _num_kept(keep_min_p(row.array, min_p)),
                ),
            )
        )
    return Table(
        f"Of {len(rows[0].logits):,} tokens, at temperature 1",
        [
            Column("prompt", "prompt"),
            Column("likeliest", "likeliest"),
            Column("largest", "its\nprobability", percent),
            Column("forty", f"the {NUM_LIKELIEST}\nlikeliest", percent),
            Column("top_p", f"top_p {top_p:g}\nkeeps"),
            Column("min_p", f"min_p {min_p:g}\nkeeps"),
        ],
        found,
    )


def _table_of_temperatures(rows: Sequence[Row], top_p: float) -> Table:
    def kept(row: Row, temperature: float) -> Pair:
        found = _num_kept(keep_top_p(row.array / temperature, top_p))
        return Pair(_num_for_share(row.descending(temperature), top_p), found)

    return Table(
        f"Tokens that top_p {top_p:g} keeps, by temperature",
        [Column("prompt", "prompt"), *(Column(f"{one:g}", f"at {one:g}") for one in TEMPERATURES)],
        [(row.prompt, *(kept(row, temperature) for temperature in TEMPERATURES)) for row in rows],
    )


def _draw(row: Row, draws: int, progress: Progress) -> np.ndarray:
    """The ids drawn with seed 0 at the output indices 0, 1, 2, ..."""
    tokens, params = [], SamplingParams(temperature=1.0)
    for index in range(draws):
        tokens.append(int(sample_token(row.array, params, 0, index)))
        progress("sampling: tokens drawn:", index + 1, draws)
    return np.array(tokens)


def _table_of_draws(row: Row, tokens: np.ndarray) -> Table:
    shown = row.order[:NUM_SHOWN]
    probabilities = row.descending()[:NUM_SHOWN]
    shares = [float((tokens == token).mean()) for token in shown]
    rows = [
        (text.strip(), Pair(float(probability), share))
        for text, probability, share in zip(row.texts, probabilities, shares, strict=False)
    ]
    return Table(
        f"Share of {len(tokens):,} draws after {row.prompt!r}; predicted: the probability",
        [Column("token", "token"), Column("share", "share", percent)],
        [*rows, ("all others", Pair(1 - float(probabilities.sum()), 1 - sum(shares)))],
    )


def _conclusion(rows: Sequence[Row], top_p: float, min_p: float) -> str:
    first, *_, last = rows
    counts = [_num_kept(keep_top_p(row.array, top_p)) for row in (first, last)]
    fewer = [_num_kept(keep_min_p(row.array, min_p)) for row in (first, last)]
    return (
        f"Where the answer is clear, {counts[0]:,} tokens have {top_p:.0%} of the probability, and where it "
        f"is open, {counts[1]:,}. No top_k fits both. top_p and min_p adapt to the distribution; of the open "
        f"one, min_p keeps only {fewer[1]:,}, because it compares with the likeliest token, not with the sum."
    )
