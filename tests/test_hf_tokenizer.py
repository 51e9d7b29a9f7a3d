"""Tokenizers of Hugging Face folders: transformers' ids, equal ids from GGUF, errors for broken files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.tokenizer import Tokenizer
from tiny_llm_checkpoints.tokenizer_library import TokenizerError
from tokenizer_fuzz import broken_files, outcome

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
GOLDENS = {path.name: json.loads((path / "expected.json").read_text("utf-8")) for path in FOLDERS.iterdir()}
STRINGS = [(name, record) for name, golden in GOLDENS.items() for record in golden["strings"]]
PRE = {"smollm": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2"}  # llama.cpp's names of pre-tokenizers
CONTROL, UNKNOWN, NORMAL, BYTE = 3, 2, 1, 6


def as_gguf(name: str) -> dict[str, Any]:
    """The metadata of a GGUF file with this folder's vocabulary; pre-tokenizers are given by name."""
    folder = FOLDERS / name
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    library = Library.from_file(str(folder / "tokenizer.json"))
    tokens = [library.id_to_token(i) for i in range(library.get_vocab_size())]
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    kinds = {
        **dict.fromkeys(special, CONTROL),
        **{f"<0x{byte:02X}>": BYTE for byte in range(256)},
        **({"<unk>": UNKNOWN} if name == "llama" else {}),
    }
    found: dict[str, Any] = {
        "model": "llama" if name == "llama" else "gpt2",
        "tokens": tokens,
        "token_type": [kinds.get(token, NORMAL) for token in tokens],
        "eos_token_id": tokens.index(settings["eos_token"]),
    }
    if settings.get("bos_token"):
        found["bos_token_id"] = tokens.index(settings["bos_token"])
    if name == "llama":
        found["scores"] = [-float(i) for i in range(len(tokens))]
    else:
        found |= {"pre": PRE[name], "merges": [" ".join(pair) for pair in model["merges"]]}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


TOKENIZERS = {name: hf_tokenizer(FOLDERS / name) for name in GOLDENS}
FROM_GGUF = {name: gguf_tokenizer(as_gguf(name)) for name in GOLDENS}
each_string = pytest.mark.parametrize(
    ("name", "record"), STRINGS, ids=[f"{name}-{ascii(record['text'])[:40]}" for name, record in STRINGS]
)


@each_string
def test_ids_and_text_match_transformers(name: str, record: dict[str, Any]) -> None:
    assert_golden(TOKENIZERS[name], record)


@each_string
def test_the_same_vocabulary_as_gguf_gives_the_same_ids(name: str, record: dict[str, Any]) -> None:
    """From GGUF, the pre-tokenizers are built from llama.cpp's names, not from the tokenizer.json.

    In this llama vocabulary "<|im_end|>" is a learned word; in a GGUF file it is always a control token.
    """
    if name == "llama" and "<|im_end|>" in record["text"]:
        [im_end] = FROM_GGUF[name].encode("<|im_end|>")
        assert im_end in FROM_GGUF[name].encode(record["text"])
        return
    assert_golden(FROM_GGUF[name], record)


def assert_golden(tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    text, ids = record["text"], record["ids"]
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=True) == record.get("framed", ids)
    assert tokenizer.encode(text, special_tokens=False) == record.get("as_text", ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == record.get("decoded", text)
    assert tokenizer.decode(ids) == record.get("skipped", text)


def test_the_goldens_have_hundreds_of_strings_for_every_tokenizer() -> None:
    assert set(GOLDENS) == {*PRE, "llama"}
    assert all(len(golden["strings"]) > 350 for golden in GOLDENS.values())


@pytest.mark.parametrize("name", GOLDENS)
def test_special_tokens_and_chat_template_come_from_the_folders_files(name: str) -> None:
    settings = json.loads((FOLDERS / name / "tokenizer_config.json").read_text("utf-8"))
    found = TOKENIZERS[name]
    assert found.bos_token == (settings.get("bos_token") or "")
    assert found.eos_token == settings["eos_token"]
    assert [found.token_text(token) for token in found.eos_token_ids] == [settings["eos_token"]]
    assert found.chat_template == (FOLDERS / name / "chat_template.jinja").read_text("utf-8")
    assert set(GOLDENS[name]["special_tokens"]) <= set(found.control_tokens)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a folder that tests may change."""
    return Path(shutil.copytree(FOLDERS / "llama3", tmp_path / "model"))


def settings_of(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}))


@pytest.mark.parametrize("bos", ["<|eot_id|>", {"content": "<|eot_id|>", "lstrip": False}])
def test_a_special_token_may_be_a_string_or_an_object(folder: Path, bos: Any) -> None:
    settings_of(folder, bos_token=bos)
    assert hf_tokenizer(folder).bos_token == "<|eot_id|>"


def test_special_tokens_can_come_from_special_tokens_map(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    found = hf_tokenizer(folder)
    assert (found.bos_token, found.eos_token, len(found.eos_token_ids)) == ("", "<|eot_id|>", 1)


def test_a_tokenizer_needs_only_tokenizer_json(folder: Path) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    found = hf_tokenizer(folder)
    assert (found.bos_token, found.eos_token, found.eos_token_ids, found.chat_template) == (
        "",
        "",
        frozenset(),
        None,
    )
    assert found.encode("a b") == TOKENIZERS["llama3"].encode("a b")


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "S"}}, "J"),
        ({"tokenizer_config.json": {"chat_template": "S"}}, "S"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "D"),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, None),
        ({"tokenizer_config.json": {"chat_template": {"default": "D", "rag": "R"}}}, "D"),
        ({"tokenizer_config.json": {"chat_template": []}}, None),
        ({"tokenizer_config.json": {"chat_template": ""}}, None),
        ({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "O"}}, "O"),
        ({"tokenizer_config.json": {}}, None),
    ],
)
def test_the_chat_template_may_be_in_any_of_three_files(
    folder: Path, files: dict[str, Any], expected: str | None
) -> None:
    (folder / "chat_template.jinja").unlink()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert hf_tokenizer(folder).chat_template == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": NAMED}}, ("D", "T")),
        ({"tokenizer_config.json": {"chat_template": "S"}}, ("S", None)),
        ({"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "A"}, ("J", "A")),
        ({"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "A"}, ("J", None)),
        # Files replace the setting as a whole, as in transformers.
        ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": NAMED}}, ("J", None)),
    ],
)
def test_a_model_may_have_a_template_of_its_own_for_chats_with_tools(
    folder: Path, files: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    found = hf_tokenizer(folder)
    assert (found.chat_template, found.tool_template) == expected


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("found", [5, True, ["x"], [{"name": 7, "template": "x"}], [{"name": "a"}], {"a": 7}])
def test_a_chat_template_that_is_not_text_is_rejected_by_its_file(
    folder: Path, file: str, found: Any
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(json.dumps({"chat_template": found}))
    with pytest.raises(ModelFileError, match=rf"{file}: chat_template is .*, expected a text or a list"):
        hf_tokenizer(folder)


# Tokens that only the settings name. Oracle: transformers 5.24, tried with 900 folders of random settings.

FIRST_NEW = 643  # the id after those of this folder's tokenizer.json


@pytest.mark.parametrize(
    ("settings", "further"),
    [
        ({"pad_token": "[PAD]"}, {}),
        ({"pad_token": {"__type": "AddedToken", "content": "[PAD]", "normalized": False}}, {}),
        ({"image_token": "[PAD]"}, {}),
        ({"additional_special_tokens": ["<|eot_id|>", "[PAD]"]}, {}),
        ({"extra_special_tokens": ["[PAD]"], "additional_special_tokens": ["ignored"]}, {}),
        ({"extra_special_tokens": {"image_token": "[PAD]"}}, {}),
        ({"added_tokens_decoder": {str(FIRST_NEW): {"content": "[PAD]", "special": True}}}, {}),
        ({}, {"special_tokens_map.json": {"pad_token": {"content": "[PAD]", "normalized": False}}}),
        ({"pad_token": "[PAD]"}, {"added_tokens.json": {"[PAD]": FIRST_NEW}}),
    ],
)
def test_a_special_token_that_only_the_settings_name_is_a_control_token(
    folder: Path, settings: dict[str, Any], further: dict[str, Any]
) -> None:
    settings_of(folder, **settings)
    for name, content in further.items():
        (folder / name).write_text(json.dumps(content))
    found = hf_tokenizer(folder)
    assert "ignored" not in found.control_tokens
    assert found.encode("a[PAD]b") == [*found.encode("a"), FIRST_NEW, *found.encode("b")]
    assert found.is_control(FIRST_NEW)
    assert found.encode("[PAD]", special_tokens=False) == TOKENIZERS["llama3"].encode("[PAD]")
    assert (found.decode([FIRST_NEW]), found.token_text(FIRST_NEW)) == ("", "[PAD]")


@pytest.mark.parametrize(
    ("settings", "further"),
    [
        ({"added_tokens_decoder": {str(FIRST_NEW): {"content": "<tool>", "special": False}}}, {}),
        ({}, {"added_tokens.json": {"<tool>": FIRST_NEW}}),
    ],
)
def test_an_added_token_that_is_not_special_is_one_token_and_shown(
    folder: Path, settings: dict[str, Any], further: dict[str, Any]
) -> None:
    settings_of(folder, **settings)
    for name, content in further.items():
        (folder / name).write_text(json.dumps(content))
    found = hf_tokenizer(folder)
    assert found.encode("a<tool>") == [*found.encode("a"), FIRST_NEW]
    assert (found.decode([FIRST_NEW]), found.is_control(FIRST_NEW)) == ("<tool>", False)


def test_new_tokens_get_ids_in_the_order_of_the_list_and_named_ones_follow(folder: Path) -> None:
    listed = {"700": {"content": "<b>", "special": False}, "699": {"content": "<a>", "special": True}}
    settings_of(folder, added_tokens_decoder=listed, pad_token="[PAD]", extra_special_tokens=["<x>"])
    assert hf_tokenizer(folder).encode("<a><b>[PAD]<x>") == [643, 644, 645, 646]


def test_the_list_may_make_a_word_of_the_vocabulary_special(folder: Path) -> None:
    [word] = TOKENIZERS["llama3"].encode("in")
    settings_of(folder, added_tokens_decoder={str(word): {"content": "in", "special": True}})
    found = hf_tokenizer(folder)
    assert found.encode("in") == [word]
    assert found.decode([word]) == ""


def test_an_end_token_that_tokenizer_json_lacks_is_added(folder: Path) -> None:
    settings_of(folder, eos_token="<|done|>")
    found = hf_tokenizer(folder)
    assert (found.eos_token, found.eos_token_ids) == ("<|done|>", frozenset({FIRST_NEW}))


def test_a_new_token_without_a_row_in_the_embedding_stays_text(folder: Path) -> None:
    settings_of(folder, pad_token="[PAD]", eos_token="<|done|>")
    found = hf_tokenizer(folder, num_rows=FIRST_NEW + 1)
    assert found.vocab_size == FIRST_NEW + 1
    assert (found.eos_token_ids, "[PAD]" in found.control_tokens) == (frozenset({FIRST_NEW}), False)
    assert hf_tokenizer(folder, num_rows=FIRST_NEW).eos_token_ids == frozenset()


def test_the_list_of_added_tokens_takes_the_place_of_special_tokens_map(folder: Path) -> None:
    """Without the list, special_tokens_map.json wins over tokenizer_config.json."""
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|end_of_text|>"}))
    assert hf_tokenizer(folder).bos_token == "<|end_of_text|>"
    settings_of(folder, added_tokens_decoder={})
    assert hf_tokenizer(folder).bos_token == "<|begin_of_text|>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "NewKind"}}', "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: .*utf-8"),
        ("tokenizer.json", None, "tokenizer.json: .*"),
        ("tokenizer_config.json", b"[", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: contains a list, expected an object"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b'{"bos_token": 7}', "tokenizer_config.json: bos_token is '7'"),
        ("tokenizer_config.json", b'{"pad_token": {"content": 7}}', "tokenizer_config.json: pad_token is"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 7}', "added_tokens_decoder is '7'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x' is not a token"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"7": "a", "8": 9}}',
            "added_tokens_decoder.8 is",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"7": {"content": "a", "lstrip": 1}}}',
            "decoder.7",
        ),
        ("tokenizer_config.json", b'{"extra_special_tokens": "abc"}', "special tokens is 'abc'"),
        ("tokenizer_config.json", b'{"extra_special_tokens": [7]}', "a special token is '7'"),
        ("tokenizer_config.json", b'{"extra_special_tokens": {"x": 7}}', "x is '7'"),
        ("added_tokens.json", b'{"<tool>": -1}', "added_tokens.json: '-1' is not a token id"),
        ("added_tokens.json", b'{"<tool>": 1e400}', "added_tokens.json: 'inf' is not a token id"),
        ("tokenizer_config.json", b'{"eos_token": {"a": 1}}', "tokenizer_config.json: eos_token is"),
        ("special_tokens_map.json", b'{"eos_token": [1]}', "special_tokens_map.json: eos_token is"),
        ("special_tokens_map.json", b"nonsense", "special_tokens_map.json: not valid JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: .*utf-8"),
    ],
)
def test_an_error_names_the_broken_tokenizer_file(
    folder: Path, file: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        hf_tokenizer(folder)


def test_a_folder_with_only_tokenizer_model_is_rejected(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelFileError, match=r"only tokenizer\.model, .* expected tokenizer\.json"):
        hf_tokenizer(folder)


def test_a_huge_tokenizer_json_is_rejected_before_it_is_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(ModelFileError, match="536870912 bytes, expected at most 268435456"):
        hf_tokenizer(folder)


def replace_parts(folder: Path, **parts: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **parts}))


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
UNKNOWN_FRAME = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": PRECOMPILED},
        {"post_processor": UNKNOWN_FRAME},
        {"pre_tokenizer": split("(")},
        {"model": {"type": "BPE", "vocab": {"a": 2**32}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
        {"added_tokens": 7},
    ],
    ids=["charsmap", "frame", "regex", "id", "merges", "type"],
)
def test_panics_and_errors_of_the_library_become_model_file_errors(folder: Path, parts: Any) -> None:
    replace_parts(folder, **parts)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: (not a tokenizer|the tokenizer failed)"):
        hf_tokenizer(folder)


def test_a_tokenizer_that_merges_at_random_is_rejected(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    replace_parts(folder, model={**model, "dropout": 0.0})
    assert hf_tokenizer(folder).encode("a b") == TOKENIZERS["llama3"].encode("a b")
    replace_parts(folder, model={**model, "dropout": 0.5})
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: dropout 0\.5 is not supported"):
        hf_tokenizer(folder)


def test_a_decoder_panic_fails_only_that_text(folder: Path) -> None:
    """Strip panics if it removes more characters than a token has, in the current version of the library."""
    replace_parts(folder, decoder={"type": "Strip", "content": "a", "start": 1, "stop": 3})
    tokenizer = hf_tokenizer(folder)
    [letter] = tokenizer.encode("a")
    assert tokenizer.encode("b")
    with pytest.raises(TokenizerError, match="the tokenizer failed on these token ids"):
        tokenizer.decode([letter])
    with pytest.raises(TokenizerError, match="the decoder failed on these tokens"):
        tokenizer.stream().push(letter)


def test_a_pathological_pattern_fails_only_that_text(folder: Path) -> None:
    replace_parts(folder, pre_tokenizer=split("(a+)+$"))
    tokenizer = hf_tokenizer(folder)
    with pytest.raises(TokenizerError, match="the tokenizer failed on this text"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("b")


def test_randomly_broken_tokenizer_files_work_or_raise_a_clean_error(tmp_path: Path) -> None:
    """`python tests/tokenizer_fuzz.py` tries more."""
    outcomes = set()
    for source in broken_files(500, seed=1):
        (tmp_path / "tokenizer.json").write_text(source)
        outcomes.add(outcome(tmp_path))
    assert outcomes == {"works", "rejected", "fails"}


def test_the_vocabulary_size_covers_gaps_between_ids(folder: Path) -> None:
    """`Checkpoint.check` rejects models that have fewer rows than the largest id."""
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 5000}, "unk_token": "a"}
    nothing = dict.fromkeys(("pre_tokenizer", "normalizer", "post_processor"))
    replace_parts(folder, model=words, added_tokens=[], **nothing)
    tokenizer = hf_tokenizer(folder)
    assert tokenizer.vocab_size == 5001
    assert tokenizer.encode("b") == [5000]
    assert tokenizer.token_text(7) == ""
