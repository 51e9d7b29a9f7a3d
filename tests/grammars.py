"""Grammars in tests: tokenizers with a token for each byte, and random walks that need no model."""

import random
from functools import cache
from typing import Any

from tiny_llm.grammar import Grammar
from tiny_llm.grammar_compiler import GrammarCompiler
from tiny_llm.token_mask import TokenMask

from tiny_llm import StructuredOutputsParams
from tiny_llm_checkpoints.decoder_stages import BYTE_OF
from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer

END = "<|end|>"
TOY_LETTERS = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
BY_BYTE = {byte: letter for letter, byte in BYTE_OF.items()}
ALMOST_ENDS = b'"}],'  # bytes that bring a JSON text closer to its end


@cache
def byte_tokenizer() -> Tokenizer:
    """Token i is the byte i; token 256 is the end-of-sequence token."""
    letters = [BY_BYTE[byte] for byte in range(256)]
    return Tokenizer(byte_level_bpe([*letters, END], [], "smollm"), eos_token_ids=frozenset([256]))


@cache
def byte_compiler() -> GrammarCompiler:
    """Compiles grammars for `byte_tokenizer`."""
    return GrammarCompiler(byte_tokenizer(), 257, [256])


@cache
def toy_compiler(vocab_size: int, num_tokens: int, eos: int) -> GrammarCompiler:
    """Compiles grammars for a toy vocabulary: a visible character or byte for each token, from "!" on."""
    tokenizer = Tokenizer(byte_level_bpe(TOY_LETTERS[:num_tokens], [], "smollm"))
    return GrammarCompiler(tokenizer, vocab_size, [eos])


def byte_grammar(**form: Any) -> Grammar:
    """A grammar whose tokens are bytes."""
    return byte_compiler().compile(StructuredOutputsParams(**form))


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a text is complete, byte by byte, and may end there; the grammar is left as it is."""
    copy = grammar.fork()
    for byte in text.encode():
        if byte not in copy.allowed():
            return False
        copy.accept(byte)
    return copy.has_ended or 256 in copy.allowed()


def allowed_ids(mask: TokenMask, vocab_size: int) -> list[int]:
    """The allowed tokens, in order."""
    return [token for token in range(vocab_size) if token in mask]


def random_text(grammar: Grammar, seed: int, most: int = 400) -> bytes | None:
    """Walk through a grammar of bytes to a complete text; None if it has not ended after `most` bytes."""
    rng, text = random.Random(seed), bytearray()
    while len(text) < most and not grammar.has_ended:
        among = allowed_ids(grammar.allowed(), 257)
        closing = [token for token in among if token == 256 or token in ALMOST_ENDS]
        readable = [token for token in among if token < 128 or token == 256]
        token = rng.choice((rng.random() < 0.35 and closing) or (rng.random() < 0.9 and readable) or among)
        if token == 256:
            return bytes(text)
        text.append(token)
        grammar.accept(token)
    return bytes(text) if grammar.has_ended else None


def chained_schemas(count: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another so deeply that a recursion runs out of stack."""
    refs = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(count)]
    definitions = {f"d{i}": {"type": "object", "properties": {"a": ref}} for i, ref in enumerate(refs)}
    return {"$defs": {**definitions, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}
