"""Grammars: which tokens may come next. Oracles: Python's `re`, `json`, and the texts themselves."""

import json
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llm.errors import GrammarError, SamplingParamsError
from tiny_llm.grammar_compiler import CACHED_GRAMMARS, GrammarCompiler
from tiny_llm.grammar_vocabulary import library_tokenizer
from tiny_llm.token_mask import TokenMask, stacked_masks

from grammars import (
    accepts,
    allowed_ids,
    byte_compiler,
    byte_grammar,
    byte_tokenizer,
    chained_schemas,
    random_text,
)
from tiny_llm import StructuredOutputsParams
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.tokenizer import Tokenizer

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
TOKENIZERS = {
    "embedded": gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata),
    **{folder.name: hf_tokenizer(folder) for folder in sorted(FOLDERS.iterdir())},
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def compiler_of(tokenizer: Tokenizer, vocab_size: int | None = None) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size or tokenizer.vocab_size, tokenizer.eos_token_ids)


# Masks.


def test_a_mask_has_one_bit_for_each_token() -> None:
    mask = TokenMask.of([0, 31, 32, 69], 70)
    assert list(mask.words) == [1 | 1 << 31, 1, 1 << 5]
    assert allowed_ids(mask, 70) == [0, 31, 32, 69]
    assert allowed_ids(mask.without([31, 40, 69]), 70) == [0, 32]
    assert allowed_ids(mask, 70) == [0, 31, 32, 69], "the mask itself must not change"
    assert mask
    assert not TokenMask.of([], 70)


def test_masks_become_rows_of_one_array() -> None:
    array = stacked_masks([TokenMask.of([0, 63], 64), TokenMask.of([32], 64)])
    assert str(array.dtype).endswith("int32")
    assert np.array_equal(np.array(array).view(np.uint32), [[1, 1 << 31], [0, 1]])


# What each form accepts.


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"choice": ["yes", "no", "nobody"]}, ["yes", "no", "nobody"], ["", "y", "nob", "yesno"]),
        (
            {"choice": ['"', "\\", "\n", "é\u2028日😀", "<|end|>", "a b"]},
            ['"', "\\", "\n", "é\u2028日😀", "<|end|>", "a b"],
            ["\\n", "e"],
        ),
        ({"regex": r"[a-c]{2}\d+"}, ["ab1", "cc42"], ["ab", "a1", "xab1", "ab1x"]),
        ({"regex": "a|ab"}, ["a", "ab"], ["b", "abb"]),
        ({"regex": "é."}, ["éx", "é😀"], ["é", "ex", "é\n"]),
        ({"grammar": 'start: "x" "=" NUMBER\nNUMBER: /[0-9]+/'}, ["x=1", "x=12"], ["x=", "y=1", "x = 1"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["(x", "()"]),
        (
            {"json_object": True},
            ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": 1\n}'],
            ["[]", "1", "", " {}", "{} "],
        ),
        (
            {"json": PERSON},
            ['{"name":"A","age":3}', '{ "name": "A",\n    "age": 0 }'],
            ['{"age":3}', '{"age":3,"name":"A"}', '{"name":"A","age":-1}', '{"name":"A","age":3,"b":1}'],
        ),
        (
            {"json": PERSON, "disable_any_whitespace": True},
            ['{"name":"A b","age":3}'],
            ['{"name": "A","age":3}'],
        ),
        (
            {"json": {"type": "array", "items": {"type": "null"}}, "whitespace_pattern": "_{1,2}"},
            ["[null,__null]", "[null_,null]"],
            ["[null, null]", "[null,___null]"],
        ),
        ({"json": {"type": "object", "properties": {"a": {}}}}, ['{"a":1,"b":2}', '{"b":2}'], []),
        (
            {"json": {"type": "object", "properties": {"a": {}}}, "disable_additional_properties": True},
            ['{"a":1}', "{}"],
            ['{"a":1,"b":2}', '{"b":2}'],
        ),
    ],
)
def test_exactly_the_texts_of_the_form_are_accepted(
    form: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = byte_grammar(**form)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_white_space_between_json_tokens_is_bounded() -> None:
    """Otherwise a model can write blanks until it reaches `max_tokens`."""
    grammar = byte_grammar(json=PERSON)
    for blanks, is_allowed in (
        (" ", True),
        ("\n" + 16 * " ", True),
        ("  ", False),
        ("\n\n", False),
        ("\t", False),
    ):
        assert accepts(grammar, f'{{{blanks}"name":"A","age":1}}') == is_allowed
    assert not accepts(grammar, "{\n" + 17 * " " + '"name":"A","age":1}')


@pytest.mark.parametrize("pattern", ["a+b?", "(ab|c){1,3}", "[^x]{2}", r"\w\d?", "x*"])
def test_a_random_text_of_an_expression_matches_it(pattern: str) -> None:
    for seed in range(30):
        text = random_text(byte_grammar(regex=pattern), seed, most=60)
        assert text is None or re.fullmatch(pattern, text.decode())


# Vocabularies.


@each_tokenizer
def test_the_bytes_of_a_token_are_those_of_its_text(name: str) -> None:
    """All tokens of the vocabulary that are whole characters, in random order. Oracle: the streamed text."""
    tokenizer = TOKENIZERS[name]
    spelled = {token: tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    known = [token for token, one in spelled.items() if one and not tokenizer.is_control(token)]
    whole = [token for token in known if spelled[token].decode(errors="ignore").encode() == spelled[token]]
    assert len(whole) > 0.6 * tokenizer.vocab_size
    random.Random(name).shuffle(whole)
    stream = tokenizer.stream_mid_text()
    text = "".join([stream.push(token) for token in whole]) + stream.flush()
    assert text.encode() == b"".join(spelled[token] for token in whole)


@each_tokenizer
def test_the_bytes_of_a_texts_tokens_are_the_bytes_of_the_text(name: str) -> None:
    """Characters of one to four bytes, many of which take several tokens."""
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    for _ in range(200):
        blocks = rng.choices([(32, 127), (0xA0, 0x2FF), (0x3040, 0xD7FF), (0x1F300, 0x1FAFF)], k=8)
        text = "x" + "".join(chr(rng.randint(*block)) for block in blocks)
        tokens = tokenizer.encode(text, special_tokens=False)
        found = b"".join(map(tokenizer.token_bytes, tokens)).decode()
        assert found.removeprefix(" " if name == "llama" else "") == tokenizer.decode(tokens).lstrip(" ")


@each_tokenizer
def test_every_byte_has_a_token_of_its_own(name: str) -> None:
    """The embedded model lacks a few bytes that no text needs; see `Tokenizer.encode`."""
    tokenizer = TOKENIZERS[name]
    alone = {
        spelled for token in range(tokenizer.vocab_size) if len(spelled := tokenizer.token_bytes(token)) == 1
    }
    missing = {byte for byte in range(256) if bytes([byte]) not in alone}
    assert len(missing) <= (8 if name in ("embedded", "smollm") else 0) + len({0xC0, 0xC1, *range(0xF5, 256)})


@each_tokenizer
def test_a_random_walk_over_tokens_ends_in_valid_json(name: str) -> None:
    """The text is what a client gets: streamed after a prompt."""
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    compiler = compiler_of(tokenizer)
    prompt = tokenizer.encode("An answer:")
    for _ in range(15):
        grammar, stream, text = (
            compiler.compile(StructuredOutputsParams(json=PERSON)),
            tokenizer.stream(prompt),
            "",
        )
        while not grammar.has_ended:
            token = rng.choice(allowed_ids(grammar.allowed(), tokenizer.vocab_size))
            grammar.accept(token)
            text += stream.push(token)
        found = json.loads(text + stream.flush())
        assert list(found) == ["name", "age"]
        assert len(found["name"]) <= 12
        assert found["age"] >= 0


@each_tokenizer
def test_a_control_token_is_never_part_of_a_text(name: str) -> None:
    """Not even if the text spells it: then it is written with ordinary tokens."""
    tokenizer = TOKENIZERS[name]
    spelled = tokenizer.token_text(min(tokenizer.eos_token_ids))
    compiler = compiler_of(tokenizer)
    for form in ({"regex": "(?s:.*)"}, {"choice": [spelled]}):
        mask = compiler.compile(StructuredOutputsParams(**form)).allowed()  # type: ignore[arg-type]
        allowed = allowed_ids(mask, tokenizer.vocab_size)
        control = {token for token in allowed if tokenizer.is_control(token)}
        assert control == (set() if "choice" in form else set(tokenizer.eos_token_ids))
        assert len(allowed) > len(control)


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_allowed() -> None:
    """Many models compute more logits than there are tokens."""
    tokenizer = byte_tokenizer()
    for vocab_size in (257, 258, 288, 300, 1000):
        compiler = GrammarCompiler(tokenizer, vocab_size, [256])
        mask = compiler.compile(StructuredOutputsParams(regex="(?s:.*)")).allowed()
        assert len(mask.words) == -(-vocab_size // 32)
        assert max(allowed_ids(mask, 32 * len(mask.words))) == 256


def test_tokens_beyond_the_models_logits_are_never_allowed() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), 100, [256])
    mask = compiler.compile(StructuredOutputsParams(regex="[a-z]+")).allowed()
    assert allowed_ids(mask, 32 * len(mask.words)) == [97, 98, 99]


def test_a_vocabulary_without_end_tokens_still_has_grammars() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), 257, [])
    grammar = compiler.compile(StructuredOutputsParams(regex="ab?"))
    grammar.accept(97)
    assert allowed_ids(grammar.allowed(), 257) == [98]
    grammar.accept(98)
    assert grammar.has_ended


def test_a_text_that_the_model_has_no_token_for_is_rejected() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), 100, [])
    with pytest.raises(SamplingParamsError, match=r"structured_outputs.choice: .* no token"):
        compiler.compile(StructuredOutputsParams(choice=["xyz"]))
    grammar = compiler.compile(StructuredOutputsParams(choice=["axyz"]))
    grammar.accept(97)
    with pytest.raises(GrammarError, match="no token"):
        grammar.allowed()


def test_forced_text_is_tokenized_as_the_tokenizer_does() -> None:
    """Where the grammar leaves no choice, the only allowed token is the tokenizer's."""
    tokenizer = TOKENIZERS["embedded"]
    text = '{"international":"unbelievable"}'
    grammar, found = compiler_of(tokenizer).compile(StructuredOutputsParams(choice=[text])), []
    while not grammar.has_ended:
        [token] = allowed_ids(grammar.allowed(), tokenizer.vocab_size)
        found.append(token)
        grammar.accept(token)
    assert found == tokenizer.encode(text)


def test_bytes_that_the_tokenizer_cannot_encode_are_tokenized_by_the_longest_token() -> None:
    """SentencePiece's tokenizers put a space before a text."""
    tokenizer = TOKENIZERS["llama"]
    library = library_tokenizer(tokenizer, sorted(tokenizer.eos_token_ids))
    for text in ("abc", " abc", "é日", '{"name"'):
        tokens = library.tokenize_str(text)
        assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


# One sequence's place.


def test_a_fork_is_independent() -> None:
    one = byte_grammar(regex="a[bc]d")
    one.accept(97)
    other = one.fork()
    one.accept(98)
    assert allowed_ids(one.allowed(), 257) == [100]
    assert allowed_ids(other.allowed(), 257) == [98, 99]
    other.accept(99)
    other.accept(100)
    assert other.has_ended
    assert not one.has_ended


@pytest.mark.parametrize("seed", range(8))
def test_a_rollback_restores_every_mask(seed: int) -> None:
    rng, grammar = random.Random(seed), byte_grammar(json=PERSON)
    text = random_text(grammar.fork(), seed)
    assert text is not None
    masks = []
    for byte in text:
        masks.append(list(grammar.allowed().words))
        grammar.accept(byte)
    assert grammar.has_ended
    place = len(text)
    for _ in range(6):
        back = rng.randint(1, place)
        grammar.rollback(back)
        place -= back
        assert not grammar.has_ended
        assert list(grammar.allowed().words) == masks[place]
        for byte in text[place:]:
            grammar.accept(byte)
        place = len(text)
        assert grammar.has_ended


def test_the_end_token_is_accepted_where_the_text_is_complete() -> None:
    grammar = byte_grammar(regex="a+")
    grammar.accept(97)
    assert 256 in grammar.allowed()
    assert not grammar.has_ended
    grammar.accept(256)
    assert grammar.has_ended
    assert allowed_ids(grammar.allowed(), 257) == [256]
    grammar.rollback(1)
    assert allowed_ids(grammar.allowed(), 257) == [97, 256]


def test_a_token_that_is_not_allowed_is_rejected() -> None:
    grammar = byte_grammar(regex="ab")
    with pytest.raises(GrammarError, match="token 99 is not possible"):
        grammar.accept(99)
    with pytest.raises(GrammarError):
        grammar.allowed()


def test_more_tokens_than_were_accepted_cannot_be_taken_back() -> None:
    grammar = byte_grammar(regex="ab")
    grammar.accept(97)
    with pytest.raises(GrammarError, match="cannot go back 2"):
        grammar.rollback(2)


@pytest.mark.parametrize(
    "form", [{"json": PERSON}, {"regex": "(ab|a)c?"}, {"choice": ["a", "ab", "abc"]}, {"json_object": True}]
)
def test_a_grammar_has_ended_exactly_when_only_the_end_token_is_left(form: dict[str, Any]) -> None:
    for seed in range(20):
        rng, grammar = random.Random(seed), byte_grammar(**form)
        for _ in range(60):
            allowed = allowed_ids(grammar.allowed(), 257)
            assert grammar.has_ended == (allowed == [256])
            if grammar.has_ended:
                break
            grammar.accept(rng.choice([token for token in allowed if token != 256]))


# Compiling.


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"regex": "("}, "structured_outputs.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex: .*look-around"),
        ({"grammar": "start: a"}, 'structured_outputs.grammar: .*unknown name: "a"'),
        ({"grammar": "a: b"}, "structured_outputs.grammar: "),
        ({"grammar": ""}, "structured_outputs.grammar: Empty grammar"),
        (
            {"grammar": 'start: %json {"x-guidance": {"lenient": true}}'},
            "structured_outputs.grammar at line 1: x-guidance may have whitespace_flexible, ",
        ),
        ({"grammar": ' {"grammars": []}'}, "structured_outputs.grammar must be a grammar in Lark's syntax"),
        ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.whitespace_pattern: .*unclosed group"),
        ({"json": {"type": "null"}, "whitespace_pattern": "[a"}, "structured_outputs.whitespace_pattern: "),
    ],
)
def test_a_form_without_a_grammar_is_rejected_with_the_librarys_reason(
    form: dict[str, Any], named: str
) -> None:
    with pytest.raises(SamplingParamsError, match=f"^{named}") as error:
        byte_grammar(**form)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": r"\d("}, r"regex: the regular expression '\d(' is wrong at character 3: unclosed group"),
        (
            {"regex": "é/(["},
            r"regex: the regular expression 'é\/([' is wrong at character 5: unclosed character class",
        ),
        (
            {"regex": r"a\b"},
            r"regex: the regular expression 'a\b' has an anchor or a word boundary inside, "
            "which is not supported",
        ),
        (
            {"json": {"properties": {"a": {"pattern": "a{3"}}}},
            "json at #/properties/a: the regular expression 'a{3' is wrong at character 2: "
            "unclosed counted repetition",
        ),
        ({"grammar": "start: a\n\na: b"}, 'grammar: unknown name: "b" (line 3)'),
        (
            {"grammar": "start: A\nA: /(/"},
            "grammar: the regular expression '(' is wrong at character 1: unclosed group (line 2)",
        ),
    ],
)
def test_an_error_names_the_place_in_an_expression_or_a_grammar(form: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingParamsError) as error:
        byte_grammar(**form)
    assert str(error.value) == f"structured_outputs.{message}"


def chain(count: int) -> str:
    """A grammar whose rules refer to one another, so deeply that a recursion runs out of stack."""
    rules = "\n".join(f'r{i}: "a" r{i + 1} | r{i + 1}' for i in range(count))
    return f'start: r0\n{rules}\nr{count}: "x"'


def doubling_schemas(count: int) -> dict[str, Any]:
    """Each definition needs the next one twice."""
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": {**twice, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def either(name: str) -> dict[str, Any]:
    return {"anyOf": [{"properties": {name: {"type": kind}}} for kind in ("string", "null")]}


# Each would take seconds, gigabytes or the whole stack without limits; some do in the library itself.
COSTLY: dict[str, dict[str, Any]] = {
    "regex": {"regex": "(a|b)*a(a|b){18}(a|b)*b(a|b){18}" * 100},
    "repetition": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "unicode": {"regex": r"(\w{1,1000}\p{L}{1,1000}){1,1000}"},
    "intersection": {"grammar": "start: T\nT: /(a{97})+b/ & /(a{89})+b/ & /(a{83})+b/ & /(a{101})+b/"},
    "rules": {"grammar": chain(3000)},
    "depth": {"grammar": "start: " + "(" * 5000 + '"x"' + ")" * 5000},
    "definitions": {"json": chained_schemas(1500)},
    "doubling": {"json": doubling_schemas(40)},
    "multiple": {"json": {"type": "integer", "multipleOf": 99_999_989}},
    "multiples": {"json": {"allOf": [{"type": "integer", "multipleOf": k} for k in (97, 89, 83, 79)]}},
    "many multiples": {"json": {"prefixItems": [{"type": "integer", "multipleOf": 9973}] * 1000}},
    "patterns": {"json": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(40)]}},
    "alternatives": {"json": {"allOf": [either(f"p{i}") for i in range(20)]}},
    "items": {"json": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}},
    "length": {"json": {"type": "string", "minLength": 10**9}},
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_form_is_rejected_or_compiled_within_bounds(name: str) -> None:
    """In a process of its own, which a hang, a crash or a lack of memory would end."""
    code = (
        "import json, resource, sys\n"
        "from grammars import byte_compiler, byte_grammar\n"
        "from tiny_llm import SamplingParamsError\n"
        "byte_grammar(regex='a')\n"
        "spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + 4, int(spent) + 5))\n"
        "try:\n"
        "    grammar = byte_grammar(**json.load(sys.stdin))\n"
        "    for _ in range(30):\n"
        "        mask = grammar.allowed()\n"
        "        grammar.accept(next(token for token in range(257) if token in mask))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"  # not ru_maxrss: a process
        "print(int(peak) < 600_000)\n"  # starts with that of its parent
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(COSTLY[name]), capture_output=True, text=True,
        cwd=Path(__file__).parent, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split()[-1] == "True"
    assert set(ended.stdout.split()[:-1]) <= {"SamplingParamsError", "GrammarError"}


def test_equal_forms_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compiled = GrammarCompiler(byte_tokenizer(), 257, [256]), []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: compiled.append(a[0]) or original(*a))
    first = compiler.compile(StructuredOutputsParams(json=PERSON))
    first.accept(ord("{"))
    second = compiler.compile(StructuredOutputsParams(json=json.dumps(PERSON)))
    assert len(compiled) == 1
    assert ord("{") in second.allowed(), "a cached grammar is at its start"


def test_the_cache_keeps_the_grammars_that_were_used_last() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), 257, [256])
    forms = [StructuredOutputsParams(choice=[f"choice {i}"]) for i in range(CACHED_GRAMMARS + 1)]
    for form in forms[:-1]:
        compiler.compile(form)
    compiler.compile(forms[0])
    compiler.compile(forms[-1])
    assert len(compiler._compiled) == CACHED_GRAMMARS
    assert forms[0] in compiler._compiled
    assert forms[1] not in compiler._compiled


def test_the_cache_is_bounded_in_characters() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), 257, [256])
    for i in range(6):
        compiler.compile(StructuredOutputsParams(choice=[f"{i}{j}".ljust(1000, "a") for j in range(250)]))
    assert len(compiler._compiled) == 4


def test_threads_share_one_compiler() -> None:
    """Oracle: the same texts from one thread."""
    compiler = GrammarCompiler(byte_tokenizer(), 257, [256])
    forms = [StructuredOutputsParams(json=PERSON | {"title": str(i % 5)}) for i in range(40)]

    def walk(index: int) -> bytes | None:
        return random_text(compiler.compile(forms[index]), index)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(walk, range(40)))
    assert found == [random_text(byte_compiler().compile(forms[i]), i) for i in range(40)]


def test_the_library_is_imported_only_by_the_first_grammar() -> None:
    code = (
        "import sys, tiny_llm, tiny_llm.llm, tiny_llm_server, tiny_llm_cli.main\n"
        "from tiny_llm import LLM, SamplingParams, StructuredOutputsParams\n"
        "SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))\n"
        "print('llguidance' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_a_mask_ahead_is_that_after_accepting_these_tokens() -> None:
    grammar, other = byte_grammar(json=PERSON), byte_grammar(json=PERSON)
    text = random_text(grammar.fork(), 3)
    assert text is not None
    for place in range(len(text) - 4):
        ahead = text[place : place + 4]
        masks = [list(grammar.allowed(ahead[:count]).words) for count in range(5)]
        for byte, mask in zip(ahead, masks, strict=False):
            assert list(other.allowed().words) == mask
            other.accept(byte)
        other.rollback(3)
        grammar.accept(text[place])
        assert list(grammar.allowed().words) == list(other.allowed().words)


@pytest.mark.parametrize(
    ("regex", "draft", "count"),
    [
        ("abc*", b"abcc", 4),
        ("abc*", b"abxc", 2),
        ("abc*", b"xabc", 0),
        ("abc", b"abc", 2),  # nothing is drawn after the text is complete
        ("a+", [97, 97, 256, 97], 2),
        ("a+", b"", 0),
    ],
)
def test_a_draft_ends_before_a_token_after_which_nothing_is_drawn(
    regex: str, draft: bytes | list[int], count: int
) -> None:
    grammar = byte_grammar(regex=regex)
    before = list(grammar.allowed().words)
    assert grammar.num_drafted([*draft]) == count
    assert list(grammar.fork().allowed().words) == before
    assert not grammar.has_ended
