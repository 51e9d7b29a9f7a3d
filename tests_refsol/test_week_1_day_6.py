"""Day 1.6: text from a model.

When these tests pass, you have a loop that extends a prompt by the most likely token each time, and text that
it yields piece by piece, every character complete.
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
    """A rule: the next token is the last one plus 1, modulo the vocabulary size."""
    return (tokens[-1] + 1) % VOCABULARY


def total(tokens: list[int]) -> int:
    """A rule in which the next token depends on every token and its position."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % VOCABULARY


@dataclass
class RuleModel:
    """A model that follows a rule, so the expected tokens are known.

    It records the sequence of each call and the number of rows of logits that the call computed.
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


def test_task_1_the_most_likely_token_is_returned() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert next_token(RuleModel(), [7]) == 8


def test_task_1_the_logits_of_the_last_token_are_used() -> None:
    """Oracle: by hand, with a model that counts up by 1. The logits of the first token would give 31."""
    assert next_token(RuleModel(), [30, 9, 20]) == 21


def test_task_1_a_token_is_an_int() -> None:
    """Oracle: the signature. An array of one element looks like a number but cannot index a list."""
    assert type(next_token(RuleModel(), [7])) is int


@pytest.mark.parametrize("tokens", [[3], [3, 4], [0, 0, 1], [5, 40, 7, 7, 30, 2]])
def test_task_1_the_model_gets_the_whole_sequence(tokens: list[int]) -> None:
    """Oracle: by hand, with a rule that depends on every token and its position."""
    model = RuleModel(total)
    assert next_token(model, tokens) == total(tokens)
    assert model.sequences == [tokens], "the model must be called once, with the whole sequence"


def test_task_1_positions_start_at_zero() -> None:
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


def test_task_1_a_tie_is_won_by_the_lowest_token_id() -> None:
    """Oracle: by hand: 1 and 3 have the same logit."""

    def logits(tokens: mx.array, context: KVContext) -> mx.array:
        return mx.array([[[0.0, 2.0, 1.0, 2.0]]])

    assert next_token(FunctionModel(logits), [0]) == 1


def test_task_1_attention_uses_the_scale_of_the_model() -> None:
    """Oracle: by hand: logits are attention weights. Token 0 occurs 5 times, with weight 1 each.

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


def test_task_2_generation_continues_from_the_prompt() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate(RuleModel(), [3], 4, ())) == [4, 5, 6, 7]
    assert list(generate(RuleModel(), [30, 9, 20], 2, ())) == [21, 22]
    assert list(generate(RuleModel(), [48], 2, ())) == [49, 0]


def test_task_2_every_token_depends_on_all_earlier_tokens() -> None:
    """Oracle: a plain loop over the rule. A loop that does not append its tokens repeats the first one."""
    known = [4, 40, 14]
    for _ in range(12):
        known.append(total(known))
    assert list(generate(RuleModel(total), [4, 40, 14], 12, ())) == known[3:]


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_task_2_at_most_max_tokens_are_generated(max_tokens: int) -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate(RuleModel(), [8], max_tokens, ())) == [9, 10][:max_tokens]


def test_task_2_max_tokens_of_zero_never_calls_the_model() -> None:
    """Oracle: by hand."""
    model = RuleModel()
    assert list(generate(model, [8], 0, ())) == []
    assert model.sequences == []


@pytest.mark.parametrize("eos_token_ids", [(6,), [99, 6], {6, 30}, frozenset({6})])
def test_task_2_generation_stops_after_an_end_token_and_yields_it(eos_token_ids: Collection[int]) -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate(RuleModel(), [3], 10, eos_token_ids)) == [4, 5, 6]


def test_task_2_the_first_token_may_be_an_end_token() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate(RuleModel(), [5], 10, (6,))) == [6]


def test_task_2_an_end_token_in_the_prompt_does_not_stop_generation() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate(RuleModel(), [6], 2, (6,))) == [7, 8]
    assert list(generate(RuleModel(), [6, 3], 2, (6,))) == [4, 5]


def test_task_2_the_model_is_not_called_after_the_end_token() -> None:
    """Oracle: counted by hand: one call per token."""
    model = RuleModel()
    assert len(list(generate(model, [3], 10, (6,)))) == 3
    assert len(model.sequences) == 3


def test_task_2_tokens_are_generated_lazily() -> None:
    """Oracle: counted by hand: at most one call of the model per token taken. A full list is not a stream."""
    model = RuleModel()
    stream = generate(model, [3], 40, ())
    assert len(model.sequences) == 0
    for taken in range(1, 6):
        assert next(stream) == 3 + taken
        assert len(model.sequences) <= taken


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_task_2_an_empty_prompt_is_rejected_at_the_first_next(max_tokens: int) -> None:
    """Oracle: the docstring."""
    model = RuleModel()
    stream = generate(model, [], max_tokens, ())
    with pytest.raises(ValueError):
        next(stream)
    assert model.sequences == [], "the model must not be called with an empty prompt"


def test_task_2_the_prompt_of_the_caller_is_not_modified() -> None:
    """Oracle: by hand. Common mistake: appending tokens to the caller's list."""
    prompt = [3, 4]
    assert list(generate(RuleModel(), prompt, 3, ())) == [5, 6, 7]
    assert prompt == [3, 4]
    assert list(generate(RuleModel(), (3, 4), 3, ())) == [5, 6, 7]


def test_task_2_two_generations_at_the_same_time_are_independent() -> None:
    """Oracle: each one run separately."""
    first, second = generate(RuleModel(), [3], 4, ()), generate(RuleModel(), [20], 4, ())
    assert list(zip(first, second, strict=True)) == [(4, 21), (5, 22), (6, 23), (7, 24)]


# Task 3: stream_text


@cache
def tokenizer() -> Tokenizer:
    """The embedded model's tokenizer, without the model."""
    return gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata)


def test_task_3_words_are_yielded_one_by_one() -> None:
    """Oracle: by hand: each word is one token of this vocabulary, with the space before it."""
    pieces = list(stream_text(tokenizer().encode("The capital of France"), tokenizer()))
    assert pieces == ["The", " capital", " of", " France"]


def test_task_3_no_tokens_give_no_pieces() -> None:
    """Oracle: by hand: no piece, not even an empty one."""
    assert list(stream_text([], tokenizer())) == []


def test_task_3_a_character_of_several_tokens_is_yielded_complete() -> None:
    """Oracle: by hand. Decoding token by token gives only U+FFFD."""
    tokens = tokenizer().encode(FACE)
    assert len(tokens) > 1, "this vocabulary has no token for the character"
    assert list(stream_text(tokens, tokenizer())) == [FACE]


@pytest.mark.parametrize(
    "text", [f"Hi {FACE}!", f"naïve 東京 {LLAMA} ok", LLAMA * 2, "  two spaces,\n\ta tab", "x² ≤ 10"]
)
def test_task_3_pieces_join_to_the_encoded_text(text: str) -> None:
    """Oracle: the text that was encoded. No piece is empty, and none has a broken character."""
    pieces = list(stream_text(tokenizer().encode(text), tokenizer()))
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_task_3_an_incomplete_character_at_the_end_is_yielded_last(num_tokens: int) -> None:
    """Oracle: `Tokenizer.decode` of all tokens. The incomplete character was held back."""
    tokens = [*tokenizer().encode("Hi"), *tokenizer().encode(FACE)[:num_tokens]]
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == tokenizer().decode(tokens)
    assert "".join(pieces).endswith("\ufffd")
    assert all(pieces)


def test_task_3_control_tokens_give_no_piece() -> None:
    """Oracle: `Tokenizer.decode`, which leaves them out. An empty piece is never yielded."""
    tokens = tokenizer().encode("<|im_start|>Hi there<|im_end|>")
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == "Hi there"
    assert all(pieces)


@pytest.mark.parametrize("seed", range(5))
def test_task_3_pieces_of_random_tokens_join_to_the_decoded_text(seed: int) -> None:
    """Oracle: `Tokenizer.decode`."""
    tokens = np.random.default_rng(seed).integers(0, tokenizer().vocab_size, size=100).tolist()
    pieces = list(stream_text(tokens, tokenizer()))
    assert "".join(pieces) == tokenizer().decode(tokens)
    assert all(pieces)


def test_task_3_a_piece_is_yielded_as_soon_as_its_last_token_arrives() -> None:
    """Oracle: counted by hand. Text must not wait for the last token or for the next one."""
    tokens, taken = [*tokenizer().encode("The"), *tokenizer().encode(FACE), *tokenizer().encode(" of")], []

    def arriving() -> Iterator[int]:
        for token in tokens:
            taken.append(token)
            yield token

    stream = stream_text(arriving(), tokenizer())
    assert taken == [], "no token may be taken before the first piece is requested"
    for piece, count in [("The", 1), (FACE, len(tokens) - 1), (" of", len(tokens))]:
        assert next(stream) == piece
        assert len(taken) == count


def test_task_3_two_streams_at_the_same_time_are_independent() -> None:
    """Oracle: each one run separately. Both have the start of a character held back at the same time."""
    first, second = (stream_text(tokenizer().encode(text), tokenizer()) for text in (FACE, LLAMA))
    assert list(zip(first, second, strict=True)) == [(FACE, LLAMA)]
