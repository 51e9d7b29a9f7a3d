"""Streaming detokenization for every kind of decoder. Oracle: the `tokenizers` library's `decode`."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Library

from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.tokenizer import Tokenizer

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in bytes.fromhex("20 48 9b c3 a9 e6 97 a5 f0 9f 98 80")]
WORDS = ["a", "b.", f"{SPACE}world", f"{SPACE}{SPACE}", SPACE, "##ing", "##", "un", " .", " do not", "日"]
ODD = ["<0x+1>", "<0x1>", "<0xé>", "", " ", "  ", "|", "<pad>", "end</w>", "</w>", "x</w>y", "\ufffd"]
LETTERS = ["Ġthe", "ĠĠ", "å", "ä¹", "ð", "ŁĺĢ", "é"]  # byte-level: bytes, whole and broken characters
CONTROL = ["<s>", "</s>", "<|im_end|>", f"<{SPACE}>"]

DECODERS: dict[str, Any] = {
    "none": None,
    "llama": decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "bytes and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace of fused text": decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
    "byte level": decoders.ByteLevel(),
    "byte level, stripped": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 2, 0)]),
    "word pieces": decoders.WordPiece(prefix="##", cleanup=True),
    "word pieces as they are": decoders.WordPiece(prefix="##", cleanup=False),
    "word pieces of fused text": decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]),
    "bpe": decoders.BPEDecoder(suffix="</w>"),
    "bpe, then words": decoders.Sequence([decoders.BPEDecoder(suffix="</w>"), decoders.WordPiece()]),
    "ctc": decoders.CTC(),
    "ctc as it is": decoders.CTC(cleanup=False),
    "ctc, then words": decoders.Sequence([decoders.CTC(), decoders.WordPiece()]),
    "strip each": decoders.Strip(" ", 1, 0),
    "fuse": decoders.Fuse(),
    "fused bytes": decoders.Sequence([decoders.Fuse(), decoders.ByteFallback(), decoders.ByteLevel()]),
    "a pattern": decoders.Replace(Regex("a+|w"), "$0x"),
    "a pattern over tokens": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+b"), "-")]),
    "a text over tokens": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab.", "-")]),
    "nested": decoders.Sequence(
        [decoders.Sequence([decoders.Replace(SPACE, " ")]), decoders.Sequence([decoders.Fuse()])]
    ),
    "nothing": decoders.Sequence([]),
}


def tokenizer_with(decoder: Any) -> Tokenizer:
    """A tokenizer whose vocabulary exercises decoders: bytes, spaces, prefixes, suffixes, control tokens."""
    vocab = {token: index for index, token in enumerate([*WORDS, *BYTES, *ODD, *LETTERS])}
    library = Library(models.WordLevel(vocab, unk_token="a"))
    library.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    library.add_tokens(["added", f"{SPACE}added"])
    if decoder is not None:
        library.decoder = decoder
    return Tokenizer(library)


def golden_tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    yield "embedded", gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata)
    for folder in sorted(FOLDERS.iterdir()):
        yield folder.name, hf_tokenizer(folder)


GOLDEN = dict(golden_tokenizers())
SMALL = {name: tokenizer_with(decoder) for name, decoder in DECODERS.items()}
ALL = {**GOLDEN, **SMALL}
each_tokenizer = pytest.mark.parametrize("name", ALL)


def sequences(name: str, count: int, seed: int) -> Iterator[tuple[list[int], list[int], bool]]:
    """Random prompts and outputs, and whether to skip control tokens; many consist mostly of bytes."""
    tokenizer, rng = ALL[name], random.Random(f"{name} {seed}")
    ids = range(tokenizer.vocab_size + 2)  # two beyond the vocabulary
    partial = [i for i in ids if "\ufffd" in tokenizer.token_text(i)] or list(ids)
    for _ in range(count):
        source = rng.choice([ids, partial, [*rng.choices(partial, k=12), *rng.choices(ids, k=3)]])
        sequence = rng.choices(source, k=rng.randint(0, 24))
        cut = rng.randint(0, len(sequence))
        yield sequence[:cut], sequence[cut:], rng.random() < 0.5


@each_tokenizer
def test_streamed_text_equals_the_text_that_the_output_adds_to_the_decoded_prompt(name: str) -> None:
    """Oracle: the library's `decode` of the prompt, and of prompt and output."""
    tokenizer = ALL[name]
    for prompt, output, skip in sequences(name, 200, seed=1):
        stream = tokenizer.stream(prompt, skip_special_tokens=skip)
        text = "".join([stream.push(token) for token in output]) + stream.flush()
        before = decoded(tokenizer, prompt, skip)
        whole = decoded(tokenizer, prompt + output, skip)
        pairs = enumerate(zip(before, whole, strict=False))
        common = next((place for place, (a, b) in pairs if a != b), min(len(before), len(whole)))
        assert text == whole[common:], (prompt, output, skip)
        assert stream.flush() == ""


@each_tokenizer
def test_without_a_prompt_streamed_text_equals_decode(name: str) -> None:
    tokenizer = ALL[name]
    for prompt, output, skip in sequences(name, 100, seed=2):
        stream = tokenizer.stream(skip_special_tokens=skip)
        text = "".join([stream.push(token) for token in prompt + output]) + stream.flush()
        assert text == decoded(tokenizer, prompt + output, skip)


def decoded(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    known = [token for token in ids if token < tokenizer.vocab_size]
    return str(tokenizer._tokenizer.decode(known, skip_special_tokens=skip))


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    found = [tokenizer._tokenizer.token_to_id(piece) for piece in pieces]
    assert None not in found
    return [token for token in found if token is not None]


SENTENCEPIECE = SMALL["llama"]


def test_an_invalid_byte_run_becomes_replacement_characters_when_it_ends() -> None:
    """Oracle: the library's `decode`. Its own DecodeStream raises an error here."""
    h, broken, world = ids_of(SENTENCEPIECE, "<0x48>", "<0x9B>", f"{SPACE}world")
    stream = SENTENCEPIECE.stream()
    assert [stream.push(h), stream.push(broken), stream.push(world)] == ["", "", "\ufffd\ufffd world"]
    stream = SENTENCEPIECE.stream()
    assert [stream.push(h), stream.push(broken), stream.flush(), stream.flush()] == [
        "",
        "",
        "\ufffd\ufffd",
        "",
    ]


def test_the_first_word_after_a_prompt_keeps_its_leading_space() -> None:
    prompt, [world] = ids_of(SENTENCEPIECE, "a"), ids_of(SENTENCEPIECE, f"{SPACE}world")
    assert SENTENCEPIECE.stream(prompt).push(world) == " world"
    assert SENTENCEPIECE.stream().push(world) == "world"
    start = ids_of(SENTENCEPIECE, "<s>")  # skipped, so the word is at the start of the text
    assert SENTENCEPIECE.stream(start).push(world) == "world"
    assert SENTENCEPIECE.stream(start, skip_special_tokens=False).push(world) == " world"


def test_a_character_that_starts_in_the_prompt_is_in_the_output() -> None:
    """The decoded prompt ends in U+FFFD; the output starts at the first difference of the two texts."""
    for name, pieces in (("llama", ["<0xE6>", "<0x97>", "<0xA5>", "a"]), ("byte level", ["ð", "ŁĺĢ", "a"])):
        tokenizer = SMALL[name]
        ids = ids_of(tokenizer, *pieces)
        stream = tokenizer.stream(ids[:1])
        text = "".join(map(stream.push, ids[1:])) + stream.flush()
        assert text == tokenizer.decode(ids) in ("日a", "😀a")


def test_a_complete_character_at_the_end_of_the_prompt_is_not_repeated() -> None:
    """Even though its byte run may continue and then turn out to be invalid."""
    ids = ids_of(SENTENCEPIECE, "<0xE6>", "<0x97>", "<0xA5>")
    [a, broken] = ids_of(SENTENCEPIECE, "a", "<0x9B>")
    assert SENTENCEPIECE.decode(ids) == "日"
    assert SENTENCEPIECE.stream(ids).push(a) == "a"
    assert SENTENCEPIECE.stream(ids).flush() == ""
    stream = SENTENCEPIECE.stream(ids)
    assert stream.push(broken) + stream.flush() == "\ufffd" * 4


DELAYED = ("bpe", "a pattern over", "a text over", "word pieces of", "fused bytes")  # hold words back
IMMEDIATE = [name for name in ALL if not name.startswith(DELAYED)]


@pytest.mark.parametrize("name", IMMEDIATE)
def test_a_word_is_returned_as_soon_as_its_token_arrives(name: str) -> None:
    """Text that no later token can change is not held back."""
    tokenizer = ALL[name]
    words = [token for token in range(tokenizer.vocab_size) if is_word(tokenizer, token)][:200]
    stream = tokenizer.stream(words[:1])
    for word in words[1:]:
        assert stream.push(word) == tokenizer.token_text(word)


def is_word(tokenizer: Tokenizer, token: int) -> bool:
    piece = tokenizer._tokenizer.id_to_token(token) or ""
    return tokenizer.token_text(token).strip(" ").isalpha() and not piece.startswith("<")


@pytest.mark.parametrize("name", [name for name in ALL if name != "fused bytes"])
def test_token_text_equals_the_text_that_a_token_adds_in_the_middle_of_a_text(name: str) -> None:
    """Oracle: what a token adds to the library's `decode` after the letter a."""
    tokenizer = ALL[name]
    [letter] = tokenizer.encode("a", special_tokens=False)[-1:]
    before = decoded(tokenizer, [letter], skip=False)
    for token in range(min(tokenizer.vocab_size, 900)):
        whole = decoded(tokenizer, [letter, token], skip=False)
        if token != letter and whole.startswith(before):
            assert tokenizer.token_text(token) == whole[len(before) :], token


def test_forks_of_a_detokenizer_are_independent() -> None:
    first, second = ids_of(SENTENCEPIECE, "<0xC3>", "<0xA9>")
    stream = SENTENCEPIECE.stream(ids_of(SENTENCEPIECE, "a"))
    stream.push(first)
    fork = stream.fork()
    assert fork.push(second) + fork.flush() == "é"
    assert stream.flush() == "\ufffd"


def test_the_cost_of_a_push_does_not_grow_with_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never decodes the whole list of tokens, and the held state stays small."""
    tokenizer, lengths = GOLDEN["llama"], []
    text = "The quick brown fox 日本語 \U0001fae8 " * 200
    ids = tokenizer.encode(text)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: lengths.append("all"))
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert lengths == []
    assert all(len(stage.held) < 5 for stage in stream._chain._stages)
