"""Day 1.6: text from a model.

When it passes, you have a loop that continues a prompt with the likeliest token each time, and text that
comes out of it piece by piece, every character whole.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.generate import generate, next_token, stream_text
from tiny_llm.kv_context import KVContext

from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.tokenizer import Tokenizer

VOCABULARY = 50
FACE, LLAMA = "\N{GRINNING FACE}", "\N{LLAMA}"


def successor(tokens: list[int]) -> int:
    """A rule: after a token comes its successor, and after the last of the vocabulary the first."""
    return (tokens[-1] + 1) % VOCABULARY


def total(tokens: list[int]) -> int:
    """A rule that every token of the sequence has a part in."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % VOCABULARY


@dataclass
class RuleModel:
    """A model that follows a rule, so that what comes is known without computing.

    It notes the sequence of each call, and how many rows of logits the call computed.
    """

    rule: Callable[[list[int]], int] = successor
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(attention_scale=1.0))
    sequences: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        (sequence,) = tokens.tolist()
        self.sequences.append(sequence)
        logits = np.full((1, len(sequence), VOCABULARY), -1.0, np.float32)
        for row in range(len(sequence)):
            logits[0, row, self.rule(sequence[: row + 1])] = 1.0
        chosen = mx.array(logits)
        if context.logit_rows is not None:
            chosen = chosen[:, context.logit_rows]
        self.rows.append(chosen.shape[1])
        return chosen


@dataclass
class FunctionModel:
    """A model that is a function of the tokens and the context."""

    function: Callable[[mx.array, KVContext], mx.array]
    attention_scale: float = 1.0

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(attention_scale=self.attention_scale)

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        return self.function(tokens, context)


# Task 1: next_token


def test_task_1_the_likeliest_token_comes() -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert next_token(RuleModel(), [7]) == 8


def test_task_1_the_last_token_decides_what_comes_after_it() -> None:
    """Oracle: by hand, with a model that always counts on. The logits of the first token would give 31."""
    assert next_token(RuleModel(), [30, 9, 20]) == 21


def test_task_1_a_token_is_an_int() -> None:
    """Oracle: the signature. An array of one element looks like a number, and is no list index."""
    assert type(next_token(RuleModel(), [7])) is int


@pytest.mark.parametrize("tokens", [[3], [3, 4], [0, 0, 1], [5, 40, 7, 7, 30, 2]])
def test_task_1_the_model_gets_the_whole_sequence(tokens: list[int]) -> None:
    """Oracle: by hand, with a rule that every token and its place have a part in."""
    model = RuleModel(total)
    assert next_token(model, tokens) == total(tokens)
    assert model.sequences == [tokens], "one sequence, in one call"


def test_task_1_tokens_stand_at_positions_from_zero_on() -> None:
    """Oracle: by hand."""
    seen = []

    def logits(tokens: mx.array, context: KVContext) -> mx.array:
        seen.append(context.positions.tolist())
        return RuleModel()(tokens, context)

    next_token(FunctionModel(logits), [4, 4, 4])
    assert seen == [[0, 1, 2]]


def test_task_1_only_the_last_logits_are_computed() -> None:
    """Oracle: the docstring. In a large vocabulary the others cost more than the rest of the model."""
    model = RuleModel()
    next_token(model, [1, 2, 3, 4, 5])
    assert model.rows == [1]


def test_task_1_the_lowest_of_equally_likely_tokens_comes() -> None:
    """Oracle: by hand: 1 and 3 have the same logit."""

    def logits(tokens: mx.array, context: KVContext) -> mx.array:
        return mx.array([[[0.0, 2.0, 1.0, 2.0]]])

    assert next_token(FunctionModel(logits), [0]) == 1


def test_task_1_attention_runs_with_the_scale_of_the_model() -> None:
    """Oracle: by hand: logits are attention weights. Token 0 stands there 5 times, with weight 1 each.

    Token 1 has the score 4 ln 2 times the scale: a weight of 4 with the model's scale of 0.5, of 16 with a
    scale of 1.
    """

    def logits(tokens: mx.array, context: KVContext) -> mx.array:
        first = tokens[:, None, :, None] == 0  # [1, 1, L, 1]
        q = mx.broadcast_to(mx.array([1.0, 0.0]), (1, 1, tokens.shape[1], 2))
        k = mx.where(first, mx.array([0.0, 0.0]), mx.array([4 * np.log(2.0), 0.0]))
        v = mx.where(first, mx.array([1.0, 0.0]), mx.array([0.0, 1.0]))
        weights = context.attend(0, q, k, v)[:, 0]
        return weights if context.logit_rows is None else weights[:, context.logit_rows]

    model = FunctionModel(logits, attention_scale=0.5)
    assert next_token(model, [1, 0, 0, 0, 0, 0]) == 0
    assert next_token(model, [1, 0, 0, 0]) == 1


# Task 2: generate


def test_task_2_counts_on_from_the_prompt() -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert list(generate(RuleModel(), [3], 4, ())) == [4, 5, 6, 7]
    assert list(generate(RuleModel(), [30, 9, 20], 2, ())) == [21, 22]
    assert list(generate(RuleModel(), [48], 2, ())) == [49, 0]


def test_task_2_every_token_comes_from_all_before_it() -> None:
    """Oracle: a plain loop over the rule. A loop that forgets its own tokens repeats the first."""
    known = [4, 40, 14]
    for _ in range(12):
        known.append(total(known))
    assert list(generate(RuleModel(total), [4, 40, 14], 12, ())) == known[3:]


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_task_2_at_most_max_tokens_come(max_tokens: int) -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert list(generate(RuleModel(), [8], max_tokens, ())) == [9, 10][:max_tokens]


def test_task_2_nothing_is_computed_for_no_tokens() -> None:
    """Oracle: by hand."""
    model = RuleModel()
    assert list(generate(model, [8], 0, ())) == []
    assert model.sequences == []


@pytest.mark.parametrize("eos_token_ids", [(6,), [99, 6], {6, 30}, frozenset({6})])
def test_task_2_an_end_token_is_the_last_one_and_is_given_too(eos_token_ids: Collection[int]) -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert list(generate(RuleModel(), [3], 10, eos_token_ids)) == [4, 5, 6]


def test_task_2_an_end_token_may_come_first() -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert list(generate(RuleModel(), [5], 10, (6,))) == [6]


def test_task_2_an_end_token_in_the_prompt_ends_nothing() -> None:
    """Oracle: by hand, with a model that always counts on."""
    assert list(generate(RuleModel(), [6], 2, (6,))) == [7, 8]
    assert list(generate(RuleModel(), [6, 3], 2, (6,))) == [4, 5]


def test_task_2_nothing_is_computed_after_the_end() -> None:
    """Oracle: counted by hand: one call a token."""
    model = RuleModel()
    assert len(list(generate(model, [3], 10, (6,)))) == 3
    assert len(model.sequences) == 3


def test_task_2_tokens_come_as_they_are_asked_for() -> None:
    """Oracle: counted by hand: no more calls of the model than tokens taken. A full list is no stream."""
    model = RuleModel()
    stream = generate(model, [3], 40, ())
    assert len(model.sequences) == 0
    for taken in range(1, 6):
        assert next(stream) == 3 + taken
        assert len(model.sequences) <= taken


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_task_2_an_empty_prompt_is_refused_when_the_first_token_is_asked_for(max_tokens: int) -> None:
    """Oracle: the docstring."""
    model = RuleModel()
    stream = generate(model, [], max_tokens, ())
    with pytest.raises(ValueError):
        next(stream)
    assert model.sequences == [], "the model has nothing to do with an empty prompt"


def test_task_2_the_prompt_of_the_caller_stays_as_it_is() -> None:
    """Oracle: by hand. Tokens that are appended to the caller's own list are the mistake that this finds."""
    prompt = [3, 4]
    assert list(generate(RuleModel(), prompt, 3, ())) == [5, 6, 7]
    assert prompt == [3, 4]
    assert list(generate(RuleModel(), (3, 4), 3, ())) == [5, 6, 7]


def test_task_2_two_generations_side_by_side_do_not_mix() -> None:
    """Oracle: each alone."""
    first, second = generate(RuleModel(), [3], 4, ()), generate(RuleModel(), [20], 4, ())
    assert list(zip(first, second, strict=True)) == [(4, 21), (5, 22), (6, 23), (7, 24)]


# Task 3: stream_text


@cache
def tokenizer() -> Tokenizer:
    """The embedded model's tokenizer, without the model."""
    return gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata)


def test_task_3_words_come_one_by_one() -> None:
    """Oracle: by hand: each word is one token of this vocabulary, with the space before it."""
    pieces = list(stream_text(tokenizer().encode("The capital of France"), tokenizer()))
    assert pieces == ["The", " capital", " of", " France"]


def test_task_3_no_tokens_have_no_text() -> None:
    """Oracle: by hand: no piece, not an empty one."""
    assert list(stream_text([], tokenizer())) == []


def test_task_3_a_character_of_several_tokens_comes_whole() -> None:
    """Oracle: by hand. Tokens that are decoded one by one give nothing but U+FFFD."""
    tokens = tokenizer().encode(FACE)
    assert len(tokens) > 1, "this vocabulary has no token for the character"
    assert list(stream_text(tokens, tokenizer())) == [FACE]


@pytest.mark.parametrize(
    "text", [f"Hi {FACE}!", f"naïve 東京 {LLAMA} ok", LLAMA * 2, "  two spaces,\n\ta tab", "x² ≤ 10"]
)
def test_task_3_pieces_make_up_the_text(text: str) -> None:
    """Oracle: the text that was encoded. No piece is empty, and none has a broken character."""
    pieces = list(stream_text(tokenizer().encode(text), tokenizer()))
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kept", [1, 2])
def test_task_3_what_is_left_when_the_tokens_end_comes_last(kept: int) -> None:
    """Oracle: `Tokenizer.decode` of all tokens. The start of a character was held back."""
    tokens = [*tokenizer().encode("Hi"), *tokenizer().encode(FACE)[:kept]]
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == tokenizer().decode(tokens)
    assert "".join(pieces).endswith("\ufffd")
    assert all(pieces)


def test_task_3_control_tokens_have_no_text() -> None:
    """Oracle: `Tokenizer.decode`, which leaves them out. A piece of no text is none."""
    tokens = tokenizer().encode("<|im_start|>Hi there<|im_end|>")
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == "Hi there"
    assert all(pieces)


@pytest.mark.parametrize("seed", range(5))
def test_task_3_any_tokens_give_the_text_of_all_of_them(seed: int) -> None:
    """Oracle: `Tokenizer.decode`."""
    tokens = np.random.default_rng(seed).integers(0, tokenizer().vocab_size, size=100).tolist()
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == tokenizer().decode(tokens)
    assert all(pieces)


def test_task_3_a_piece_comes_with_the_token_that_completes_it() -> None:
    """Oracle: counted by hand. Text that waits for the last token, or for the next one, is no stream."""
    tokens, taken = [*tokenizer().encode("The"), *tokenizer().encode(FACE), *tokenizer().encode(" of")], []

    def arriving() -> Iterator[int]:
        for token in tokens:
            taken.append(token)
            yield token

    stream = stream_text(arriving(), tokenizer())
    assert taken == [], "nothing is taken before the first piece is asked for"
    for piece, count in [("The", 1), (FACE, len(tokens) - 1), (" of", len(tokens))]:
        assert next(stream) == piece
        assert len(taken) == count


def test_task_3_two_streams_side_by_side_do_not_mix() -> None:
    """Oracle: each alone. Both have the start of a character held back at the same time."""
    first, second = (stream_text(tokenizer().encode(text), tokenizer()) for text in (FACE, LLAMA))
    assert list(zip(first, second, strict=True)) == [(FACE, LLAMA)]
