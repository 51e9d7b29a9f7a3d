"""Finds the start, end and control tokens of a GGUF file, with the rules of llama.cpp (llama-vocab).

Many files name only one end token, often the base model's, and mark the end-of-turn token of a chat as normal
text. llama.cpp therefore recognizes well-known tokens by their text, whatever type the file gives them, and
so does this module. Knows nothing of how text is split into tokens.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .gguf_keys import GGUFKeys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

# Tokens that end a generation, whatever their type.
END_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "[e~[", "<turn|>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
# Tokens of code models: the file's key, and the names to look for if the key is missing.
_INFILL_NAMES: Mapping[str, tuple[str, ...]] = {
    "fim_pre_token_id": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>"),
        *("\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf_token_id": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>"),
        *("\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid_token_id": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>"),
        *("\u2581<MID>", "<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
_INFILL_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")  # these end a generation too
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: part of the visible text
# If a vocabulary has all names of the set, the token before the set does not end a generation.
_EXCEPTIONS = (
    ("<|end|>", {"<|return|>", "<|call|>"}, USER_DEFINED),
    ("<|end|>", {"<|return|>", "<|calls|>"}, USER_DEFINED),
    ("<|end|>", {"<|flush|>", "<|call|>"}, USER_DEFINED),
    ("<|end|>", {"<|flush|>", "<|calls|>"}, USER_DEFINED),
    ("</s>", {"<|tool_response>"}, NORMAL),
)
# Default ids if the file lacks the key, by tokenizer.ggml.model.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11},  # Falcon's <|endoftext|>
}


class SpecialTokens(NamedTuple):
    """types: each token's type after llama.cpp's corrections. ends: ids of tokens that end a generation."""

    types: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    ends: frozenset[int]


def special_tokens(keys: GGUFKeys, model: str, tokens: Sequence[str], types: Sequence[int]) -> SpecialTokens:
    """Find the special tokens of a vocabulary.

    keys: the `tokenizer.ggml` keys. model: the value of `tokenizer.ggml.model`.

    Raises ValueError for an id outside the vocabulary.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    corrected = list(types)
    infill = {key: _infill_id(keys, key, ids, corrected) for key in _INFILL_NAMES}
    by_key = {key: _id_or_default(keys, key, model, corrected) for key in (*_END_KEYS, "bos_token_id")}
    ends = {ids[name] for name in END_NAMES if name in ids}
    for token in ends:
        corrected[token] = CONTROL
    ends |= {index for key in _INFILL_ENDS if (index := infill[key]) is not None}
    ends |= {index for key in _END_KEYS if (index := by_key[key]) is not None}
    for name in _SHOWN:
        if name in ids:
            corrected[ids[name]] = USER_DEFINED
    for name, others, kind in _EXCEPTIONS:
        if name in ids and others <= ids.keys():
            ends.discard(ids[name])
            corrected[ids[name]] = kind
    unknown = _id_or_default(keys, "unknown_token_id", model, corrected)
    return SpecialTokens(corrected, by_key["bos_token_id"], by_key["eos_token_id"], unknown, frozenset(ends))


def _infill_id(keys: GGUFKeys, key: str, ids: Mapping[str, int], types: list[int]) -> int | None:
    """The id from the file's key, or of the first token with a well-known name; its type becomes CONTROL."""
    if keys.has(key):
        return keys.token_id(key, len(types))
    found = min((ids[name] for name in _INFILL_NAMES[key] if name in ids), default=None)
    if found is not None:
        types[found] = CONTROL
    return found


def _id_or_default(keys: GGUFKeys, key: str, model: str, types: Sequence[int]) -> int | None:
    """The id from the file's key, or the default for this `model`.

    llama.cpp's default for byte-level BPE is token 11, which is a comma in most vocabularies; so it is used
    only if the file marks it as control.
    """
    if keys.has(key):
        return keys.token_id(key, len(types))
    default = _DEFAULT_IDS[model].get(key)
    if default is None or default >= len(types) or (model == "gpt2" and types[default] != CONTROL):
        return None
    return default
