"""Builds the tokenizer that a GGUF file describes in its metadata, with the `tokenizers` library.

Two kinds are supported: byte-level BPE ("gpt2"), where `tokenizer.ggml.pre` names the rule that splits text
into words, and SentencePiece's BPE ("llama"), whose merges follow from token scores. Missing keys have
llama.cpp's defaults; docs/models.md lists the keys.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .gguf_keys import GGUFKeys
from .gguf_special_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SpecialTokens, special_tokens
from .tokenizer import Tokenizer
from .tokenizer_library import guarded

_PHI3_EXCEPTIONS = ("<unk>", "<s>", "<|endoftext|>")  # these keep the white space after them
MAX_CUTS = 1 << 30  # sum of squared token lengths: the cost of finding merges; Gemma 3 has 10 million
MAX_MERGED = 1 << 26  # characters of all merges; Gemma 3 has 6 million
_SPACE = "\u2581"  # SentencePiece's character for a space

# Rules that split text into words: letters, after at most one other character (such as a space), or digits,
# up to three in llama 3 and one in Qwen 2.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Split off every digit, then apply GPT-2's pattern to bytes; the order matters for "  1"."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_LLAMA3_WORDS),
    "qwen2": lambda: _split(_QWEN2_WORDS),
}
# llama.cpp's other names for them.
_ALIASES = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"
    ),
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), "gpt-2"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo"), "qwen2"),
}


class _Vocabulary(NamedTuple):
    """tokens: by id. special: their types, and the ids with a special role."""

    keys: GGUFKeys
    tokens: list[str]
    special: SpecialTokens


@guarded("the tokenizer cannot be built")
def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from a GGUF file's metadata.

    Control and unknown tokens are special; user-defined ones are never split, but are ordinary text.
    `gguf_special_tokens` decides which tokens are control tokens and which end a generation.

    Raises ValueError if the kind of tokenizer or the pre-tokenizer is not supported, and for missing or
    inconsistent metadata.
    """
    keys = GGUFKeys(metadata, "tokenizer.ggml")
    kind = keys.value("model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; supported: {', '.join(_KINDS)}")
    if keys.value("suppress_tokens"):
        raise ValueError("tokenizer.ggml.suppress_tokens is not supported; expected none or an empty list")
    vocabulary = _vocabulary(keys, kind)
    built = _KINDS[kind](vocabulary)
    _add_special(built, vocabulary, kind, _is_phi3(metadata))
    _set_special_token_frame(built, vocabulary)
    special = vocabulary.special
    return Tokenizer(
        built,
        bos_token=_text_of(special.bos, vocabulary.tokens),
        eos_token=_text_of(special.eos, vocabulary.tokens),
        eos_token_ids=special.ends,
        chat_template=_chat_template(metadata, "chat_template"),
        tool_template=_chat_template(metadata, "chat_template.tool_use"),
    )


def _vocabulary(keys: GGUFKeys, kind: str) -> _Vocabulary:
    """Read tokens and their types; a token without text gets llama.cpp's name for it."""
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(keys.texts("tokens"))]
    types = keys.numbers("token_type") if keys.has("token_type") else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(types)} items, expected {len(tokens)}, one per token"
        )
    return _Vocabulary(keys, tokens, special_tokens(keys, kind, tokens, types))


def _add_special(
    built: tokenizers.Tokenizer, vocabulary: _Vocabulary, kind: str, strips_space_after: bool
) -> None:
    """Register user-defined tokens, which are never split, and control tokens, which are special.

    strips_space_after: most of these tokens absorb the white space that follows them (Phi-3).
    """

    def added(token: str, normalized: bool) -> AddedToken:
        rstrip = strips_space_after and token not in _PHI3_EXCEPTIONS
        return AddedToken(token, normalized=normalized, rstrip=rstrip)

    typed = list(zip(vocabulary.tokens, vocabulary.special.types, strict=True))
    # SentencePiece finds user-defined tokens in normalized text. That fails if normalizing adds a space
    # prefix, because the prefix would also be added to the text of the token itself.
    normalized = kind == "llama" and not vocabulary.keys.flag("add_space_prefix", True)
    built.add_tokens([added(token, normalized) for token, t in typed if t == USER_DEFINED])
    control = (UNKNOWN, CONTROL)
    built.add_special_tokens([added(token, False) for token, t in typed if t in control])


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Whether this is a Phi-3 tokenizer, which llama.cpp recognizes by the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _chat_template(metadata: Mapping[str, Any], name: str) -> str | None:
    keys = GGUFKeys(metadata, "tokenizer")
    return keys.text(name) if keys.has(name) else None


def byte_level_bpe(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], pre_tokenizer: str
) -> tokenizers.Tokenizer:
    """Build byte-level BPE.

    tokens: by id, written in the byte-level alphabet. merges: pairs in rank order.

    Raises ValueError if the pre-tokenizer is not supported or if merges and tokens do not match.
    """
    name = _ALIASES.get(pre_tokenizer, pre_tokenizer)
    if name not in _PRE_TOKENIZERS:
        known = ", ".join([*_PRE_TOKENIZERS, *_ALIASES])
        raise ValueError(
            f"tokenizer.ggml.pre {pre_tokenizer!r} is not a supported pre-tokenizer; supported: {known}"
        )
    built = _bpe(tokens, merges, ignore_merges=name == "llama-bpe")
    if name == "qwen2":
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = _PRE_TOKENIZERS[name]()
    built.decoder = decoders.ByteLevel()
    return built


def _gpt2(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    pairs = map(_pair, vocabulary.keys.texts("merges"))
    return byte_level_bpe(vocabulary.tokens, pairs, vocabulary.keys.text("pre", "default"))


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge. The separating space is never the first character."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ValueError(
            f"tokenizer.ggml.merges has {merge[:60]!r}, expected two tokens separated by a space"
        )
    return merge[:cut], merge[cut + 1 :]


def _llama(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: merges the pair whose result scores best; unknown characters become bytes."""
    keys, tokens, special = vocabulary
    scores = keys.numbers("scores")
    if len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores has {len(scores)} items, expected {len(tokens)}, one per token"
        )
    mergeable = [
        (token, score)
        for token, score, kind in zip(tokens, scores, special.types, strict=True)
        if kind == NORMAL
    ]
    unknown = None if special.unknown is None else tokens[special.unknown]
    merges = _merges_by_score(mergeable)
    built = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", _SPACE)
    prefixed = keys.flag("add_space_prefix", True)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return built


_KINDS: dict[str, Callable[[_Vocabulary], tokenizers.Tokenizer]] = {"gpt2": _gpt2, "llama": _llama}


def _bpe(tokens: Sequence[str], merges: Iterable[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"token {twice!r} appears twice in tokenizer.ggml.tokens")
    with guarded(f"the merges do not match the {len(tokens)} tokens"):
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **options))


def _merges_by_score(scored: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every split of a token into two other tokens, in the order of the whole token's score, best first.

    Raises ValueError for tokens so long that trying all splits would take minutes, and for merges that would
    fill the memory.
    """
    if (cuts := sum(len(token) ** 2 for token, _ in scored)) > MAX_CUTS:
        longest = max(len(token) for token, _ in scored)
        raise ValueError(
            f"tokenizer.ggml.tokens are too long to compute merges: the longest has {longest} characters, "
            f"and the squares of all lengths add up to {cuts}, expected at most {MAX_CUTS}"
        )
    known = {token for token, _ in scored}
    ranked = sorted((-score, index, token) for index, (token, score) in enumerate(scored))
    merges, length = [], 0
    for _, _, token in ranked:
        found = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in known]
        merges += [(left, right) for left, right in found if right in known]
        length += len(token) * len(found)
        if length > MAX_MERGED:
            raise ValueError(
                f"tokenizer.ggml.tokens has too many merges: those of the best {len(merges)} are over "
                f"{MAX_MERGED} characters long"
            )
    return merges


def _adds_bos(keys: GGUFKeys) -> bool:
    """Whether text starts with the beginning-of-sequence token; the default is llama.cpp's."""
    pre = keys.text("pre", "default")
    by_default = keys.text("model") == "llama" or _ALIASES.get(pre, pre) == "llama-bpe"
    return keys.flag("add_bos_token", by_default)


def _set_special_token_frame(built: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Make `encode(..., add_special_tokens=True)` add the file's tokens before and after a text."""
    keys, tokens, special = vocabulary
    bos = [special.bos] if special.bos is not None and _adds_bos(keys) else []
    eos = [special.eos] if special.eos is not None and keys.flag("add_eos_token", False) else []
    pairs = [(tokens[index], index) for index in (*bos, *eos)]
    if pairs:
        frame = [*(tokens[i] for i in bos), "$A", *(tokens[i] for i in eos)]
        built.post_processor = processors.TemplateProcessing(single=frame, special_tokens=pairs)


def _text_of(index: int | None, tokens: Sequence[str]) -> str:
    return "" if index is None else tokens[index]
