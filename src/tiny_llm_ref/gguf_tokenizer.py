"""The tokenizer that a GGUF file describes in its metadata, rebuilt with the `tokenizers` library.

Two kinds: byte-level BPE ("gpt2"), whose `pre` names how text is cut into words before merging, and
SentencePiece's BPE ("llama"), whose merges follow from the tokens' scores.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .tokenizer import Tokenizer
from .tokenizer_library import guarded

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_SPECIAL = (_UNKNOWN, _CONTROL)
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPACE = "\u2581"  # SentencePiece writes a space as this

# How words are cut: a letter may take the character before it along; digits in threes, or one by one.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit stands alone, then GPT-2's pattern over bytes; the order matters for "  1"."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_LLAMA3_WORDS),
    "qwen2": lambda: _split(_QWEN2_WORDS),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}  # llama.cpp's


@guarded("a tokenizer that cannot be built")
def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build from a GGUF file's metadata.

    Tokens that the file marks as control or as unknown are special; those that it marks as user-defined are
    kept whole but are ordinary text. The end-of-sequence ids are the file's eos, eot and eom, as far as it
    names them.

    Raises ValueError for a kind of tokenizer or a pre-tokenizer that is not supported, and for a file that
    lacks a part or whose parts do not fit together.
    """
    found = _Metadata(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; supported: {', '.join(_KINDS)}")
    tokens, types = found.texts("tokens"), found.numbers("token_type")
    if len(types) != len(tokens):
        raise ValueError(f"the file gives {len(types)} token types for {len(tokens)} tokens")
    built = _KINDS[kind](found, tokens, types)
    typed = list(zip(tokens, types, strict=True))
    # SentencePiece looks for them in normalised text; a prefix would be put before their own text as well.
    normalized = kind == "llama" and not found.flag("add_space_prefix", True)
    built.add_tokens([AddedToken(token, normalized=normalized) for token, t in typed if t == _USER_DEFINED])
    built.add_special_tokens([AddedToken(token, normalized=False) for token, t in typed if t in _SPECIAL])
    _frame(built, found, tokens, kind_adds_bos=_adds_bos(found))
    ends = [found.token_id(key, len(tokens)) for key in _END_KEYS]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        built,
        bos_token=_text_of(found, "bos_token_id", tokens),
        eos_token=_text_of(found, "eos_token_id", tokens),
        eos_token_ids=frozenset(token for token in ends if token is not None),
        chat_template=template if isinstance(template, str) else None,
    )


def byte_level_bpe(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], pre_tokenizer: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE from `tokens[id]`, in the byte-level alphabet, and merges in rank order.

    Raises ValueError for a pre-tokenizer that is not supported and for merges that do not fit the tokens.
    """
    name = _ALIASES.get(pre_tokenizer, pre_tokenizer)
    if name not in _PRE_TOKENIZERS:
        known = ", ".join([*_PRE_TOKENIZERS, *_ALIASES])
        raise ValueError(f"pre-tokenizer {pre_tokenizer!r} is not supported; supported: {known}")
    built = _bpe(tokens, merges, ignore_merges=name == "llama-bpe")
    if name == "qwen2":
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = _PRE_TOKENIZERS[name]()
    built.decoder = decoders.ByteLevel()
    return built


def _gpt2(found: "_Metadata", tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in found.texts("merges"))]
    return byte_level_bpe(tokens, pairs, found.text("pre", "default"))


def _llama(found: "_Metadata", tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: the pair whose token scores best merges first; unknown characters become bytes."""
    scores = found.numbers("scores")
    if len(scores) != len(tokens):
        raise ValueError(f"the file gives {len(scores)} scores for {len(tokens)} tokens")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    mergeable = [
        (token, score) for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL
    ]
    merges = _merges_by_score(mergeable)
    built = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", _SPACE)
    prefixed = found.flag("add_space_prefix", True)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return built


_KINDS: dict[Any, Callable[["_Metadata", list[str], list[int]], tokenizers.Tokenizer]] = {
    "gpt2": _gpt2,
    "llama": _llama,
}


def _bpe(tokens: Sequence[str], merges: Iterable[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"token {twice!r} is there twice")
    with guarded(f"merges that do not fit the {len(tokens)} tokens"):
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **options))


def _merges_by_score(scored: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every way of putting a token together from two others, the best-scored token first."""
    known = {token for token, _ in scored}
    ranked = sorted((-score, index, token) for index, (token, score) in enumerate(scored))
    return [
        (token[:cut], token[cut:])
        for _, _, token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _adds_bos(found: "_Metadata") -> bool:
    """Whether text begins with the beginning-of-sequence token; without a word on it, as llama.cpp has it."""
    pre = found.text("pre", "default")
    by_default = found.text("model", "") == "llama" or _ALIASES.get(pre, pre) == "llama-bpe"
    return found.flag("add_bos_token", by_default)


def _frame(
    built: tokenizers.Tokenizer, found: "_Metadata", tokens: list[str], *, kind_adds_bos: bool
) -> None:
    """Let `encode(..., add_special_tokens=True)` put the file's tokens around a text."""
    added = {"bos": kind_adds_bos, "eos": found.flag("add_eos_token", False)}
    ids = {name: found.token_id(f"{name}_token_id", len(tokens)) for name, wanted in added.items() if wanted}
    pairs = [(tokens[i], i) for i in ids.values() if i is not None]
    if not pairs:
        return
    bos = [tokens[i] for i in [ids.get("bos")] if i is not None]
    eos = [tokens[i] for i in [ids.get("eos")] if i is not None]
    built.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=pairs)


def _text_of(found: "_Metadata", key: str, tokens: list[str]) -> str:
    index = found.token_id(key, len(tokens))
    return "" if index is None else tokens[index]


class _Metadata:
    """The `tokenizer.ggml.` part of a file's metadata, checked as it is asked for."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def numbers(self, name: str) -> list[Any]:
        """A list that must be there, of numbers."""
        return self._values(name, {int, float}, "numbers")

    def texts(self, name: str) -> list[str]:
        """A list that must be there, of texts."""
        return self._values(name, {str}, "texts")

    def text(self, name: str, default: str) -> str:
        """A text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"tokenizer.ggml.{name} is {str(value)[:40]!r}, expected a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"tokenizer.ggml.{name} is {str(value)[:40]!r}, expected true or false")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None where the file names none."""
        value = self._get(name, None)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise ValueError(f"tokenizer.ggml.{name} is {str(value)[:40]!r}, expected 0 to {vocab_size - 1}")
        return value

    def _values(self, name: str, types: set[type], kinds: str) -> list[Any]:
        value = self._get(name, None)
        if value is None:
            raise ValueError(f"the file holds no tokenizer.ggml.{name}")
        if not isinstance(value, list) or not types.issuperset(map(type, value)):
            raise ValueError(f"tokenizer.ggml.{name} is not a list of {kinds}")
        return value

    def _get(self, name: str, default: Any) -> Any:
        """A value as plain Python: what MLX's reader gives as arrays becomes numbers and lists."""
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        return value.tolist() if hasattr(value, "tolist") else value
