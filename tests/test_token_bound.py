"""The lower bound on a text's number of tokens: it always holds, and it is tight."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from tiny_llm_checkpoints.decoder_stages import BYTE_OF
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.token_bound import TokenBound, token_bound

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
TOKENIZERS = {
    "embedded": gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata),
    **{folder.name: hf_tokenizer(folder) for folder in sorted(FOLDERS.iterdir())},
}
PIECES = ["a", "the ", " ", "\n", "    ", "----------------", "\x04", "\x00", "\u2581", "<s>", "<|im_end|>"]
PIECES += [
    "\u0301",
    "\u03b1\u0313\u0300\u0345",
    "\u1100\u1161\u11a8",
    "日",
    "\U0001fae8",
    "\U000f1234",
    "\U0010ffff",
]


def bound(library: Library) -> TokenBound | None:
    return token_bound(library, library.get_vocab())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_has_fewer_tokens_than_the_bound(name: str) -> None:
    """Oracle: the tokenizer. The texts merge well, are composed by NFC, are dropped, or have no token."""
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    found = bound(tokenizer._tokenizer)
    assert found is not None
    vocab = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
    longest = sorted(vocab, key=len)[-30:]
    for _ in range(400):
        pieces = rng.choices(rng.choice([PIECES, longest, vocab, [rng.choice(PIECES)]]), k=rng.randint(0, 30))
        text = "".join(pieces)
        for special in (True, False):
            assert found.of(text) <= len(tokenizer.encode(text, special_tokens=special)), text


def test_some_text_has_exactly_as_many_tokens_as_the_bound() -> None:
    """A text that consists only of the longest token."""
    library = byte_level()
    library.add_tokens(["abcdef"])
    found = bound(library)
    assert found is not None
    assert found.of("abcdef" * 7) == len(library.encode("abcdef" * 7).ids) == 7
    assert (found.of(""), found.of("a")) == (0, 1)


def byte_level() -> Library:
    library = Library(models.BPE({letter: byte for byte, letter in enumerate(BYTE_OF)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


def after_byte_level(other: pre_tokenizers.PreTokenizer) -> tuple[str, Any]:
    return "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(), other])


ABSORBING: dict[str, tuple[str, Any]] = {
    "strip": ("normalizer", normalizers.Strip()),
    "nfkc": ("normalizer", normalizers.NFKC()),
    "nothing for a": ("normalizer", normalizers.Replace("a", "")),
    "one for many": ("normalizer", normalizers.Replace("aa", "a")),
    "whitespace": after_byte_level(pre_tokenizers.Whitespace()),
    "removed": after_byte_level(pre_tokenizers.Split("a", "removed")),
    "no text": ("post_processor", processors.TemplateProcessing(single="a", special_tokens=[("a", 97)])),
}


@pytest.mark.parametrize("name", ABSORBING)
def test_there_is_no_bound_if_text_may_be_dropped(name: str) -> None:
    part, value = ABSORBING[name]
    library = byte_level()
    setattr(library, part, value)
    assert bound(library) is None


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_there_is_no_bound_if_tokens_absorb_spaces(side: str) -> None:
    library = byte_level()
    library.add_special_tokens([AddedToken("<x>", **{side: True})])
    assert bound(library) is None


MODELS = [models.WordLevel({"a": 0}, "a"), models.WordPiece({"a": 0}, unk_token="a"), models.Unigram()]


@pytest.mark.parametrize("model", MODELS)
def test_there_is_no_bound_for_models_that_merge_unknown_text(model: models.Model) -> None:
    assert bound(Library(model)) is None
