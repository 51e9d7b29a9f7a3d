"""The embedded model's tokenizer: transformers' ids (tests/goldens), round trips, streaming, and errors."""

import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiny_llm_checkpoints import tokenizer_library
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.errors import PromptTooLongError
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "tokens.json").read_text(encoding="utf-8"))
# The bytes that have no token in the embedded vocabulary but occur in valid text.
DROPPED = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}

IM_START, IM_END = 1, 2


METADATA: dict[str, Any] = read_gguf_header(embedded_model_path()).metadata
TOKENIZER = gguf_tokenizer(METADATA)

token_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)
# Single bytes and parts of characters, which split UTF-8 over tokens, in any order, valid or not.
byte_ids = [i for i, token in enumerate(METADATA["tokenizer.ggml.tokens"]) if len(token) == 1]
piece_ids = [i for i in range(TOKENIZER.vocab_size) if "\ufffd" in TOKENIZER.token_text(i)]
broken_ids = st.lists(st.sampled_from(byte_ids + piece_ids + [0, 1, 2]), max_size=40)
# Text without characters that contain a dropped byte.
text_kept = st.text().filter(lambda text: not DROPPED & set(text.encode()))


def test_the_goldens_were_made_from_the_embedded_file() -> None:
    assert hashlib.sha256(embedded_model_path().read_bytes()).hexdigest() == GOLDEN["gguf_sha256"]


@pytest.mark.parametrize("record", GOLDEN["strings"], ids=lambda record: ascii(record["text"])[:40])
def test_ids_and_decoded_text_match_transformers(record: dict[str, Any]) -> None:
    text, ids = record["text"], record["ids"]
    assert TOKENIZER.encode(text) == ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == record["decoded"]
    skipped = record.get("decoded_skipping_special_tokens", record["decoded"])
    assert TOKENIZER.decode(ids) == skipped
    assert TOKENIZER.encode(text, special_tokens=False) == record.get("ids_without_special_tokens", ids)


def test_transformers_gguf_conversion_differs_only_where_a_number_follows_whitespace() -> None:
    """Oracle: the conversion's ids, from the goldens. If this fails, transformers now supports "smollm"."""
    differ = [record for record in GOLDEN["strings"] if "gguf_conversion_ids" in record]
    assert differ
    for record in differ:
        text = record["text"]
        assert any(a.isspace() and b.isnumeric() for a, b in pairwise(text))
        # Both decode to the same text; only the whitespace is split differently.
        assert TOKENIZER.decode(record["gguf_conversion_ids"]) == TOKENIZER.decode(record["ids"])


@given(text_kept)
@example("  1\r\n\t👩‍👩‍👧 <|im_end|> e\u0301")
def test_decoding_encoded_text_returns_the_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, special_tokens=False)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@given(text_kept, text_kept)
def test_typed_control_tokens_stay_text_without_special_tokens(before: str, after: str) -> None:
    text = f"{before}<|im_start|>{after}<|im_end|>"
    assert {IM_START, IM_END} <= set(TOKENIZER.encode(text))
    ids = TOKENIZER.encode(text, special_tokens=False)
    assert all(token_id > 16 for token_id in ids)  # 0 to 16 are this model's control tokens
    assert TOKENIZER.decode(ids) == text


def test_only_a_byte_without_a_token_is_dropped() -> None:
    """The checkpoint's tokenizer has no unknown token, so `tokenizers` drops such bytes (goldens)."""
    assert TOKENIZER.encode("a\x04b") == [*TOKENIZER.encode("a"), *TOKENIZER.encode("b")]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "ids", [token_ids, broken_ids, token_ids | broken_ids], ids=["any", "broken", "both"]
)
def test_streamed_text_equals_decoded_text(ids: st.SearchStrategy[list[int]], skip: bool) -> None:
    @given(ids)
    def check(sequence: list[int]) -> None:
        stream = TOKENIZER.stream(skip_special_tokens=skip)
        text = "".join([stream.push(token_id) for token_id in sequence]) + stream.flush()
        assert text == TOKENIZER.decode(sequence, skip_special_tokens=skip)

    check()


@given(text_kept)
@example("👩‍👩‍👧 日本 é")
def test_a_character_of_several_tokens_is_streamed_whole(text: str) -> None:
    """Before the flush, pushes return no replacement character that is not in the text itself."""
    stream = TOKENIZER.stream()
    streamed = ""
    for token_id in TOKENIZER.encode(text, special_tokens=False):
        streamed += stream.push(token_id)
        assert text.startswith(streamed)
    assert streamed + stream.flush() == text


def test_a_flush_returns_an_incomplete_last_character_only_once() -> None:
    ids = TOKENIZER.encode("ok \U0001fae8")
    stream = TOKENIZER.stream()
    pushed = "".join(stream.push(token_id) for token_id in ids[:-1])
    assert "\ufffd" not in pushed
    assert pushed + stream.flush() == "ok \ufffd"
    assert stream.flush() == ""


def test_detokenizers_do_not_share_state() -> None:
    one, two = TOKENIZER.stream(), TOKENIZER.stream()
    ids = TOKENIZER.encode("日本語のテキスト 😀")
    interleaved = [(one.push(token_id), two.push(token_id)) for token_id in ids]
    assert "".join(a for a, _ in interleaved) + one.flush() == "日本語のテキスト 😀"
    assert [a for a, _ in interleaved] == [b for _, b in interleaved]


def test_special_tokens_and_chat_template_come_from_the_gguf_file() -> None:
    assert TOKENIZER.vocab_size == 49152
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert {TOKENIZER.token_text(token) for token in TOKENIZER.eos_token_ids} == {
        *("<|im_end|>", "<|endoftext|>", "<reponame>")  # the second and third by llama.cpp's rules
    }
    assert TOKENIZER.token_text(IM_END) == "<|im_end|>"
    assert TOKENIZER.token_text(TOKENIZER.encode(" the")[0]) == " the"
    assert TOKENIZER.chat_template == METADATA["tokenizer.chat_template"]
    assert len(TOKENIZER.control_tokens) == 17


def test_user_defined_tokens_are_not_split_but_are_text() -> None:
    tokens = METADATA["tokenizer.ggml.tokens"]
    types = [4 if token == "<repo_name>" else kind for token, kind in zip(tokens, _types(), strict=True)]
    tokenizer = gguf_tokenizer({**METADATA, "tokenizer.ggml.token_type": types})
    for special in (True, False):
        assert tokenizer.encode("a<repo_name>", special_tokens=special)[1:] == [tokens.index("<repo_name>")]
    assert tokenizer.decode(tokenizer.encode("a<repo_name>")) == "a<repo_name>"


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_sep_token_id"])
def test_every_end_token_key_of_the_file_ends_generation(key: str) -> None:
    tokenizer = gguf_tokenizer({**METADATA, f"tokenizer.ggml.{key}": 7})
    assert tokenizer.eos_token_ids == {*TOKENIZER.eos_token_ids, 7}


USES = {"decode": lambda token: TOKENIZER.decode([5, token]), "token_text": TOKENIZER.token_text}
USES["push"] = lambda token: TOKENIZER.stream().push(token)


@pytest.mark.parametrize("use", USES)
def test_a_negative_id_is_rejected(use: str) -> None:
    with pytest.raises(ValueError, match="token id -1 is negative"):
        USES[use](-1)


@pytest.mark.parametrize("beyond", [49152, 2**40])
def test_an_id_beyond_the_vocabulary_has_no_text(beyond: int) -> None:
    """Many models have more rows than their tokenizer has tokens, and may sample one of them."""
    assert TOKENIZER.decode([5, beyond, 5]) == TOKENIZER.decode([5, 5])
    assert TOKENIZER.token_text(beyond) == ""
    stream = TOKENIZER.stream()
    assert [stream.push(beyond), stream.push(5) + stream.flush()] == ["", TOKENIZER.decode([5])]


def test_a_lone_surrogate_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud800', at character 2"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ({"model": None}, "tokenizer.ggml.model None is not supported"),
        ({"pre": "tekken"}, "'tekken' is not a supported pre-tokenizer; supported: smollm, gpt-2, llama"),
        ({"add_bos_token": 7}, "tokenizer.ggml.add_bos_token is '7', expected true or false"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 items, expected 49152"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is .*, expected a list of strings"),
        (
            {"tokens": [*"aabc"], "token_type": [1] * 4, "eos_token_id": 1, "bos_token_id": 1},
            "token 'a' appears twice",
        ),
        ({"eos_token_id": 49152}, "tokenizer.ggml.eos_token_id is '49152', expected 0 to 49151"),
        ({"bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'"),
        ({"model": "llama"}, "metadata tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores has 1 items, expected 49152"),
        ({"merges": ["qz"]}, "tokenizer.ggml.merges has 'qz', expected two tokens separated by a space"),
        ({"merges": ["q zq"]}, "the merges do not match the 49152 tokens"),
    ],
)
def test_unsupported_tokenizer_metadata_is_rejected_with_its_value(
    change: dict[str, Any], message: str
) -> None:
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer({**METADATA, **changed})


@pytest.mark.parametrize("part", ["tokens", "merges"])
def test_missing_tokenizer_metadata_is_rejected_by_name(part: str) -> None:
    metadata = {key: value for key, value in METADATA.items() if key != f"tokenizer.ggml.{part}"}
    with pytest.raises(ValueError, match=f"metadata tokenizer.ggml.{part} is missing"):
        gguf_tokenizer(metadata)


def _types() -> list[int]:
    types: list[int] = METADATA["tokenizer.ggml.token_type"]
    return types


# Long texts.

KINDS = {
    "words": "The quick brown fox, 123 times. ",
    "one word": "a",
    "spaces": " ",
    "newlines": "\n",
    "control tokens": "<|im_start|>",
    "characters of three bytes": "日本語",
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_threads_run_while_a_text_is_encoded_and_decoded(kind: str) -> None:
    """Counted, not timed: if the library held the GIL, this thread would wake up once, at the end."""
    text = KINDS[kind] * (300_000 // len(KINDS[kind]))
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(lambda: TOKENIZER.encode(text))
        ticks = wakeups_until(encoding)
        assert ticks > 1
        decoding = pool.submit(lambda: TOKENIZER.decode(encoding.result() * 4, skip_special_tokens=False))
        wakeups_until(decoding)
        assert decoding.result() == text * 4


def wakeups_until(done: "Future[Any]") -> int:
    """How often this thread runs before `done` has a result."""
    ticks = 0
    while not done.done():
        time.sleep(0.001)
        ticks += 1
    return ticks


def test_a_prompt_without_space_for_output_is_rejected_with_its_length_and_the_limit() -> None:
    text = "one two three"
    assert TOKENIZER.encode(text, context=4) == TOKENIZER.encode(text)
    message = "3 prompt tokens and 1 output token exceed the context of 3"
    with pytest.raises(PromptTooLongError, match=message):
        TOKENIZER.encode(text, context=3)
    with pytest.raises(
        PromptTooLongError, match=r"^at least 1 prompt token and 1 output token exceed the context of 1$"
    ):
        TOKENIZER.encode("one", context=1)


def test_a_prompt_that_is_far_too_long_is_rejected_without_tokenizing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_library, "encode", None)
    with pytest.raises(PromptTooLongError, match=r"at least \d+ prompt tokens and .* the context of 8192"):
        TOKENIZER.encode("no end " * 100_000, context=8192)


def test_a_long_text_with_few_tokens_is_accepted() -> None:
    """Bytes without a token cost nothing, and 81 spaces or dashes may be one token."""
    longest = max(METADATA["tokenizer.ggml.tokens"], key=len)
    text = "\x04" * 100_000 + TOKENIZER.decode([METADATA["tokenizer.ggml.tokens"].index(longest)]) * 3
    assert len(TOKENIZER.encode(text, context=9)) < 9
